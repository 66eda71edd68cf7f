"""Architectures that are no family of their own, built small from the host's classes."""

from __future__ import annotations

import copy

import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import torch
from concept_surgery.erase_core import Erasure, GradientError, erase, preset_settings
from concept_surgery.erase_core.artefact.report import report_text
from concept_surgery.erase_core.artefact.saving import save_erasure
from concept_surgery.erase_core.settings import families
from concept_surgery.erase_core.settings.layers import LayerRuleError
from concept_surgery.erase_core.settings.texts import SettingsError
from concept_surgery.nodes import host
from concept_surgery.nodes.apply import apply_erasure, mismatches
from concept_surgery.nodes.encoding import encode_prompts
from concept_surgery.nodes.families import UnsupportedModelError, trainable_family
from concept_surgery.nodes.host import ComfyDenoiser
from concept_surgery.nodes.matrices import trained_keys
from concept_surgery.nodes.train import TrainErasure, settings_from_widgets

from .encoder import RememberingClip
from .small import built_model
from .test_families import QUICK, noisy, sampled_x0

PIXELS = {"pixart": 288}  # the host divides by zero on smaller ones there
MATRICES = {"auraflow": 5, "chroma": 3, "lumina": 2, "pixart": 4, "wan": 7}  # by name
# The layers that are edited, found by predictions: all that read what the first of them reads.
# PixArt's keys and values read too little here for a null prompt of 77 tokens to leave room.
READERS = {
    "auraflow": ("cond_seq_linear", 1),
    "chroma": ("txt_in", 1),
    "lumina": ("cap_embedder.1", 1),
    "pixart": ("y_embedder.y_proj.fc1", 1),
    "wan": ("blocks.0.cross_attn.k", 6),
}
SOFT = {"form": "soft", "layers": "prompt-fed", "learning_rate": 0.02}


def pixels(model) -> int:
    return PIXELS.get("pixart" if "PixArt" in type(model.model.model_config).__name__ else "", 64)


def train(model, clip, **values) -> Erasure:
    defaults = trainable_family(model).defaults
    given = {name: value for name, value in QUICK.items() if name not in ("steps", "protection")}
    given |= {"resolution": pixels(model), "trajectories": 8, "captions": 40, **values}
    settings = preset_settings("balanced", family=defaults, **given)
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        with ComfyDenoiser(model, clip, "s", 6, settings.resolution, settings.layers) as denoiser:
            last = erase(settings, denoiser)
    return last


@pytest.fixture(scope="module")
def small():
    """Models by architecture with their CLIP, each built once."""
    built = {}

    def get(name: str):
        if name not in built:
            model, clip = built_model(name)
            built[name] = model, RememberingClip(clip)
        return built[name]

    return get


def weights_of(model) -> dict[str, torch.Tensor]:
    return {key: weight.clone() for key, weight in model.model.state_dict().items()}


def shape_of(model) -> tuple[int, ...]:
    latent, side = model.model.latent_format, pixels(model) // 8
    frames = (1,) * (latent.latent_dimensions - 2)
    return (1, latent.latent_channels, *frames, side, side)


def x0_of(model, prompt, sigma: float = 0.7) -> torch.Tensor:
    return sampled_x0(model, prompt, sigma, shape=shape_of(model))


@pytest.mark.parametrize("name", MATRICES)
def test_it_is_asked_as_the_hosts_samplers_ask_it(small, name):
    """Prompts of different length in one batch too."""
    model, clip = small(name)
    prompts = encode_prompts(clip, ["a cat", "a cat " * 60], pooled=trainable_family(model).pooled)
    expected = [x0_of(model, prompt) for prompt in prompts]
    x = noisy(model, 0.7, shape=shape_of(model))
    with torch.inference_mode(False), ComfyDenoiser(model, clip, "", 6, pixels(model)) as denoiser:
        flat = x.clone().view(1, -1, *x.shape[-2:]).repeat(2, 1, 1, 1)
        assert denoiser.latent_shape(pixels(model)) == tuple(flat.shape[1:])
        with torch.no_grad():
            together = denoiser.predict_x0(flat, torch.full((2,), 0.7), prompts)
    expected = torch.cat(expected).view_as(together)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).norm() > 1e-4 * expected.norm()


@pytest.fixture(scope="module")
def finished(small):
    """Erasures by architecture, each trained once."""
    made = {}

    def get(name: str) -> Erasure:
        if name not in made:
            made[name] = train(*small(name))
        return made[name]

    return get


@pytest.mark.parametrize("name", READERS)
def test_the_layers_that_read_the_prompt_alone_are_found_by_predictions(small, name):
    model, clip = small(name)
    with torch.inference_mode(False), ComfyDenoiser(model, clip, "", 6, pixels(model)) as denoiser:
        edited = denoiser.ways["tokens"]
        first = "lora_unet_" + READERS[name][0].replace(".", "_")
        assert edited[0] == first and len(edited) == READERS[name][1]
        (row,) = [row for row in denoiser.found_readers if row.way]
        assert (row.name, row.matrices) == READERS[name]
        assert all(row.why for row in denoiser.found_readers if not row.way)
        (prompt,) = denoiser.encode(["a cat"])
        denoiser.read([prompt])
        # Tokens are read as they were encoded where nothing is in front of the layer.
        assert bool(prompt.read) is (name in ("lumina", "wan"))
        assert denoiser.own_cost < 20


@pytest.mark.parametrize("name", ["auraflow", "lumina", "wan"])
def test_it_moves_stays_exact_and_goes_through_every_loader_alike(small, finished, name, tmp_path):
    """What is kept stays within 1e-5, on tokens as encoded, normed ones, and those of a layer."""
    model, clip = small(name)
    before = weights_of(model)
    erasure = finished(name)
    record, measures = erasure.record, erasure.record["measures"]
    assert record["form"] == "hard" and record["forward_equivalents"] <= 900
    assert (record["readers"][0]["edited"], record["matrices"]) == (name != "wan", READERS[name][1])
    assert measures["moved_held_out"]["overall"] >= 0.9
    report = report_text(record)
    assert f"{READERS[name][0]}: {READERS[name][1]} of width" in report
    assert "Experimental: no trained weights of this architecture" in report
    path = save_erasure(erasure, tmp_path, "cat")
    loaded = Erasure.load(path)
    patched = apply_erasure(model, loaded, 1.0)
    assert mismatches(model, loaded, clip, "s") == []
    with torch.inference_mode():
        file = comfy.utils.load_torch_file(str(path))
        stock, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
    (tiger,) = measures["kept"]
    assert tiger["exact"] is (name != "wan")  # which is as narrow as three prompts are long
    texts = ["", "blurry", *([tiger["text"]] if tiger["exact"] else []), "a photo of a cat"]
    *kept, erased = encode_prompts(clip, texts)
    for prompt in kept:
        clean = x0_of(model, prompt)
        for one in (patched, apply_erasure(model, erasure, 1.0, "exact")):
            assert (x0_of(one, prompt) - clean).norm() <= 1e-5 * clean.norm()
    ours, clean = x0_of(patched, erased), x0_of(model, erased)
    assert torch.equal(x0_of(stock, erased), ours)
    assert torch.equal(x0_of(apply_erasure(model, erasure, 0.0), erased), clean)
    exact = x0_of(apply_erasure(model, erasure, 1.0, "exact"), erased)
    change = (ours - clean).norm()
    assert (exact - ours).norm() <= 0.01 * change and change > 1e-3 * ours.norm()
    model.unpatch_model()
    after = weights_of(model)
    assert all(torch.equal(weight, after[key]) for key, weight in before.items())


def test_the_soft_form_on_layers_by_name_is_still_a_choice(small):
    erasure = train(*small("auraflow"), **SOFT)
    record, measures = erasure.record, erasure.record["measures"]
    assert record["form"] == "soft" and record["matrices"] == MATRICES["auraflow"]
    assert record["gradient_apart"] <= 0.01 and "readers" not in record
    moved = measures["moved_held_out"]
    assert moved["overall"] >= 0.6
    assert measures["null_drift"] ** 2 <= 0.05 * moved["erased_change"] ** 2


def test_their_layers_are_not_refused_before_the_model_is_known(small):
    """The form is the family's own there: soft for those that prompt-fed is the rule of."""
    asked = {"erase": "cat", "layers": "prompt-fed", "form": "auto"}
    assert TrainErasure.validate_inputs(**asked) is True
    assert TrainErasure.validate_inputs(erase="cat", layers="prompt-fed") is True
    family = trainable_family(small("auraflow")[0])
    assert settings_from_widgets(asked, family).form == "soft"
    refused = {
        "Choose the soft form": [{"form": "hard"}, {"layers": "transformer"}],
        "no instant variant": [{"preset": "instant"}],
    }
    for words, cases in refused.items():
        for values in cases:
            assert words in TrainErasure.validate_inputs(**{**asked, **values})
    with pytest.raises(SettingsError, match="Choose the soft form"):
        settings_from_widgets(asked, families.SD1)


def test_cross_attention_of_an_eps_model_and_a_network_that_adds_in_place_are_trained(
    small, monkeypatch
):
    assert train(*small("pixart"), steps=2).record["gradient_apart"] <= 0.01
    assert train(*small("chroma"), steps=2).record["gradient_apart"] <= 0.01
    monkeypatch.setattr(host, "OutOfPlace", host.contextlib.nullcontext)
    with pytest.raises(GradientError, match="can't be trained through: .*inplace"):
        train(*small("chroma"), steps=2)


def test_a_gradient_that_is_cut_off_ends_the_run(small, monkeypatch):
    """An architecture nobody looked at is trained only where the check passes."""
    model, clip = small("lumina")
    inner = ComfyDenoiser.predict_x0

    def cut(self, x, sigma, prompts, edit=None):
        x0 = inner(self, x, sigma, prompts, edit)
        return x0 if edit is None else x0.detach() + 0 * sum(b.sum() for b in edit.factors.values())

    monkeypatch.setattr(ComfyDenoiser, "predict_x0", cut)
    with pytest.raises(GradientError, match="No gradient reaches"):
        train(model, clip, steps=2)


def test_a_rule_that_matches_nothing_lists_the_rules(small):
    model, clip = small("wan")
    with pytest.raises(LayerRuleError, match="'text-input' match none .* prompt-fed .*attn2_to_k"):
        ComfyDenoiser(model, clip, "", 6, 64, "text-input")


def test_the_hard_form_is_refused_on_layers_by_name(small):
    model, clip = small("chroma")
    with pytest.raises(SettingsError, match="The hard form .*prompt and nothing else"):
        train(model, clip, form="hard", layers="prompt-fed")
    with pytest.raises(SettingsError, match="none are known by name.*'readers' as the layers"):
        train(model, clip, form="hard", layers="text-input")


def test_the_instant_preset_predicts_only_to_find_what_reads_the_prompt(small):
    model, clip = small("lumina")
    settings = preset_settings(
        "instant", family=trainable_family(model).defaults, concepts="cat => dog", captions=40
    )
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        with ComfyDenoiser(model, clip, "s", 6, settings.resolution, settings.layers) as denoiser:
            record = erase(settings, denoiser).record
    assert record["form"] == "hard" and record["concepts"][0]["keys_and_values_moved"] >= 0.5
    assert record["measures"]["null_drift"] <= 1e-6
    assert 0 < record["forward_equivalents"] < 10


def built(config):
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, "", device=cpu), cpu, cpu)


def test_what_takes_more_than_a_prompt_is_refused_by_name(small):
    """A picture beside the noise, latents of sound."""
    unet, clip = small("wan")[0].model.model_config.unet_config, small("wan")[1]
    fields = {k: v for k, v in unet.items() if k not in ("disable_unet_model_creation", "dtype")}
    from_picture = built(comfy.supported_models.WAN21_T2V({**fields, "in_dim": 36}))
    with pytest.raises(UnsupportedModelError, match="WAN21_T2V.*a picture or a mask beside"):
        ComfyDenoiser(from_picture, clip, "", 6, 64)
    model = small("lumina")[0]
    sound = model.clone()
    sound.model = copy.copy(model.model)
    sound.model.latent_format = comfy.supported_models.StableAudio.latent_format()
    with pytest.raises(UnsupportedModelError, match="latents have 1 dimensions"):
        trainable_family(sound)


def test_the_rule_takes_keys_by_the_name_made_from_the_hosts_key(small):
    model = small("wan")[0]
    for name, key in trained_keys(model).items():
        assert name == "lora_unet_" + key[len("diffusion_model.") : -len(".weight")].replace(
            ".", "_"
        )
