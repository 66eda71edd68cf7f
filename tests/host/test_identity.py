"""Recognising a model again, and what a stored result saves."""

from __future__ import annotations

import time
from typing import NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfy_extras.nodes_model_merging import ModelMergeSimple
from concept_surgery.erase_core import Erasure, Meter, erase, preset_settings
from concept_surgery.erase_core.artefact.language_store import LanguageStore
from concept_surgery.nodes.apply import apply_erasure
from concept_surgery.nodes.host import ComfyDenoiser
from concept_surgery.nodes.identity import model_identity
from concept_surgery.nodes.matrices import trained_keys

from tools.checkpoint import build_checkpoint
from tools.environment import BUILD


def load(path):
    with torch.inference_mode():  # as the host loads, inside its executor
        return comfy.sd.load_checkpoint_guess_config(str(path))[:2]


def test_matrices_are_listed_in_one_order_in_every_process(checkpoint):
    """The host's own order is that of a set, and random numbers are drawn in it."""
    for layers in (None, "cross-attention"):
        names = list(trained_keys(load(checkpoint)[0], layers))
        assert len(names) > 2 and names == sorted(names)


def identity(model) -> str:
    return model_identity(model, trained_keys(model).values())


def with_lora(model, seed: int, strength: float, layer="attn2.to_k"):
    """The model with a LoRA of random values on one kind of layer, through the host's loader."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for key, weight in model.model.state_dict().items():
        if key.startswith("diffusion_model.") and key.endswith(f"{layer}.weight"):
            name = key.removesuffix(".weight")
            lora[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator)
            lora[f"{name}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=generator)
            lora[f"{name}.alpha"] = torch.tensor(4.0)
    patched = comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]
    assert patched.patches
    return patched


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint)


class Result(NamedTuple):
    erasure: Erasure
    stored: bool


def train(loaded, results, language, **values) -> Result:
    """A result without sampling and steps: which of them a result needs is not the question.

    Of one phrase and few captions, each of which takes longer to encode than all the rest.
    """
    quick = {"concepts": "cat", "captions": 8, "templates": "a photo of a {}"}
    settings = preset_settings("instant", **{**quick, **values})
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        with ComfyDenoiser(*loaded, "tiny", 6, settings.resolution) as denoiser:
            meter = Meter()
            erasure = erase(settings, denoiser, language, meter, results)
    return Result(erasure, meter.reused)


def test_the_model_is_loaded_after_the_text_encoder_is_done_and_not_for_a_stored_result(
    loaded, tmp_path, monkeypatch
):
    """A card that holds one of the two at a time makes room by moving the other away."""
    order, load_models = [], comfy.model_management.load_models_gpu

    def noted(models, *more, **named):
        order.extend("text" if model is loaded[1].patcher else "model" for model in models)
        return load_models(models, *more, **named)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", noted)
    results, sampled = {}, {"steps": 1, "trajectories": 2, "sampling_steps": 2, "resolution": 32}
    assert not train(loaded, results, LanguageStore(tmp_path), **sampled).stored
    first = order.index("model")
    assert first > 0 and set(order[:first]) == {"text"} and set(order[first:]) == {"model"}
    order.clear()
    assert train(loaded, results, LanguageStore(tmp_path), **sampled).stored
    assert set(order) == {"text"}


def test_equal_models_have_one_identity(loaded, checkpoint):
    model = loaded[0]
    plain = identity(model)
    assert identity(load(checkpoint)[0]) == identity(model.clone()) == plain
    patched = with_lora(model, 1, 0.7)
    before = identity(patched)
    assert identity(with_lora(model, 1, 0.7)) == before
    comfy.model_management.load_models_gpu([patched])  # its patches are in the weights now
    assert identity(patched) == before and identity(model) == plain
    anew = with_lora(load(checkpoint)[0], 1, 0.7)
    assert anew.patches_uuid != patched.patches_uuid and identity(anew) == before
    comfy.model_management.load_models_gpu([model])
    assert identity(model) == plain


def test_whatever_training_sees_changes_the_identity(loaded):
    model = loaded[0]
    other = load(build_checkpoint(BUILD / "checkpoints" / "other-seed.safetensors", seed=1))[0]
    sampling, merge = ModelSamplingDiscrete(), ModelMergeSimple()
    models = [
        model,
        other,
        with_lora(model, 1, 0.7),
        with_lora(model, 1, 0.5),
        with_lora(model, 2, 0.7),
        with_lora(model, 1, 0.7, "attn1.to_q"),  # not trained: a sample of it is read
        with_lora(model, 1, 0.5, "attn1.to_q"),
        with_lora(with_lora(model, 1, 0.7), 2, 0.7),
        *(sampling.patch(model, kind, False)[0] for kind in ("eps", "v_prediction", "lcm", "x0")),
        sampling.patch(model, "v_prediction", True)[0],
        *(merge.merge(model, other, ratio)[0] for ratio in (0.5, 0.6)),
        merge.merge(model, with_lora(other, 1, 0.7), 0.5)[0],
    ]
    found = [identity(one) for one in models]
    assert len(set(found)) == len(models)
    assert found == [identity(one) for one in models]
    again = sampling.patch(model, "v_prediction", True)[0]
    assert identity(again) == found[-4]
    assert identity(merge.merge(model, other, 0.6)[0]) == found[-2]


@pytest.mark.parametrize("key", ["trained", "out.2.weight", "out.0.bias", "time_embed.0.weight"])
def test_a_changed_weight_changes_the_identity(checkpoint, key):
    model = load(checkpoint)[0]
    before = identity(model)
    trained = [k for k in trained_keys(model).values() if k.endswith("to_v.weight")]
    key = trained[-1] if key == "trained" else f"diffusion_model.{key}"
    with torch.inference_mode():
        weight = model.model.state_dict()[key].reshape(-1)
        place = 0 if key in trained else len(weight) // 2
        weight[place] = weight[place].nextafter(torch.tensor(9.0, dtype=weight.dtype))
    assert identity(model) != before


def test_an_erasure_upstream_changes_the_identity(loaded, store):
    model = loaded[0]
    erasure = train(loaded, None, store).erasure
    models = [
        model,
        *(apply_erasure(model, erasure, strength, "merge") for strength in (1.0, 0.5)),
        *(apply_erasure(model, erasure, strength, "exact") for strength in (1.0, 0.5)),
    ]
    assert len({identity(one) for one in models}) == len(models)
    assert identity(apply_erasure(model, erasure, 0.5, "exact")) == identity(models[-1])
    assert identity(apply_erasure(model, erasure, 0.0, "exact")) == identity(model)


def test_what_cannot_be_recognised_is_never_found_and_said(loaded, caplog):
    model = loaded[0].clone()
    assert identity(model) == identity(model) and not caplog.messages
    model.add_object_patch("latent_format", object())
    assert identity(model) != identity(model)
    assert "(builtins.object) can't be recognised again" in caplog.text
    injected = loaded[0].clone()
    injection = comfy.patcher_extension.PatcherInjection(lambda *_: None, lambda *_: None)
    injected.set_injections("other", [injection])
    assert identity(injected) != identity(injected)


def test_functions_count_by_what_they_were_made_with(loaded):
    def patched(value):
        model = loaded[0].clone()
        model.add_object_patch("extra", lambda x, y=1: x + value + y)
        return model

    assert identity(patched(1)) == identity(patched(1)) != identity(patched(2))
    assert identity(patched({"a": [torch.ones(3)]})) == identity(patched({"a": [torch.ones(3)]}))
    assert identity(patched({"a": [torch.ones(3)]})) != identity(patched({"a": [torch.zeros(3)]}))
    endless: list = []
    endless.append(endless)
    assert identity(patched(endless)) != identity(patched(endless))


@pytest.mark.parametrize(
    "width, rows",
    [(768, [320] * 10 + [640] * 10 + [1280] * 12), (2048, [640] * 20 + [1280] * 120)],
    ids=["SD1.5", "SDXL"],
)
def test_the_identity_of_real_shapes_takes_less_than_two_seconds(width, rows):
    state = {
        f"diffusion_model.{number}.weight": torch.full((count, width), number, dtype=torch.half)
        for number, count in enumerate(rows)
    }
    inner = torch.nn.Module()
    inner.state_dict = lambda: state
    inner.model_config = inner.latent_format = inner.model_sampling = None
    inner.get_dtype = lambda: torch.half
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(inner, cpu, cpu, size=1)
    began = time.process_time()
    model_identity(model, state)
    assert time.process_time() - began < 2
