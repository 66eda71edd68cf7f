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
MATRICES = {"auraflow": 5, "chroma": 3, "lumina": 2, "pixart": 4, "wan": 7}


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


@pytest.mark.parametrize("name", ["auraflow", "lumina", "wan"])
def test_it_moves_holds_and_goes_through_every_loader_alike(small, name, tmp_path):
    model, clip = small(name)
    before = weights_of(model)
    erasure = train(model, clip)
    record, measures = erasure.record, erasure.record["measures"]
    assert record["form"] == "soft" and record["matrices"] == MATRICES[name]
    assert record["gradient_apart"] <= 0.01
    moved = measures["moved_held_out"]
    assert moved["overall"] >= 0.6
    assert measures["null_drift"] ** 2 <= 0.05 * moved["erased_change"] ** 2
    assert "Experimental: this architecture" in report_text(record)
    path = save_erasure(erasure, tmp_path, "cat")
    loaded = Erasure.load(path)
    patched = apply_erasure(model, loaded, 1.0)
    assert mismatches(model, loaded, clip, "s") == []
    with torch.inference_mode():
        file = comfy.utils.load_torch_file(str(path))
        stock, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
    erased = encode_prompts(clip, ["a photo of a cat"])[0]
    ours = x0_of(patched, erased)
    assert torch.equal(x0_of(stock, erased), ours)
    assert torch.equal(x0_of(apply_erasure(model, erasure, 1.0), erased), ours)
    exact = x0_of(apply_erasure(model, erasure, 1.0, "exact"), erased)
    change = (ours - x0_of(model, erased)).norm()
    assert (exact - ours).norm() <= 0.01 * change and change > 1e-4 * ours.norm()
    model.unpatch_model()
    after = weights_of(model)
    assert all(torch.equal(weight, after[key]) for key, weight in before.items())


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
        train(model, clip)


def test_a_rule_that_matches_nothing_lists_the_rules(small):
    model, clip = small("wan")
    with pytest.raises(LayerRuleError, match="'text-input' match none .* prompt-fed .*attn2_to_k"):
        ComfyDenoiser(model, clip, "", 6, 64, "text-input")


@pytest.mark.parametrize("layers", ["prompt-fed", "text-input"])
def test_the_hard_form_and_the_instant_preset_are_refused(small, layers):
    model, clip = small("chroma")
    with pytest.raises(SettingsError, match="The hard form .*Choose the soft form"):
        train(model, clip, form="hard", layers=layers)
    with pytest.raises(SettingsError, match="no instant variant"):
        preset_settings("instant", family=trainable_family(model).defaults, concepts="cat")


def built(config):
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, "", device=cpu), cpu, cpu)


def test_what_takes_more_than_a_prompt_is_refused_by_name(small):
    """A picture beside the noise, another text encoder, latents of sound."""
    unet, clip = small("wan")[0].model.model_config.unet_config, small("wan")[1]
    fields = {k: v for k, v in unet.items() if k not in ("disable_unet_model_creation", "dtype")}
    from_picture = built(comfy.supported_models.WAN21_T2V({**fields, "in_dim": 36}))
    with pytest.raises(UnsupportedModelError, match="WAN21_T2V.*a picture or a mask beside"):
        ComfyDenoiser(from_picture, clip, "", 6, 64)
    model = small("lumina")[0]

    class TwoEncoders(RememberingClip):
        def encode_from_tokens(self, tokens, **options):
            given = super().encode_from_tokens(tokens, **options)
            return {**given, "conditioning_llama3": 1} if options.get("return_dict") else given

    with pytest.raises(UnsupportedModelError, match="text encoder also gives it conditioning_lla"):
        ComfyDenoiser(model, TwoEncoders(clip), "", 6, 64)
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
