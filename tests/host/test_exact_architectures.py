"""Exact erasures on the kinds of networks that people use, each built small."""

from __future__ import annotations

import os

import comfy.lora
import comfy.sd
import comfy.utils
import pytest
import torch
from concept_surgery.erase_core import Erasure, erase, preset_settings
from concept_surgery.erase_core.artefact.saving import save_erasure
from concept_surgery.nodes.apply import apply_erasure
from concept_surgery.nodes.families import latent_pixels, trainable_family
from concept_surgery.nodes.host import ComfyDenoiser
from safetensors import safe_open

from .architectures import ARCHITECTURES, build, noisy, predicted

ALL = os.environ.get("ARCHITECTURES", "") not in ("", "0")
# A chat's template with a norm behind it; two ways, one of them the tokens' mean.
SAMPLE = ("Qwen-Image", "Hunyuan Image 2.1")
KEPT = "a photo of a tree"
FLOAT32 = 1e-5


def train(model, clip, name: str) -> Erasure:
    side = ARCHITECTURES[name].latent * latent_pixels(model)
    settings = preset_settings(
        "balanced",
        family=trainable_family(model).defaults,
        concepts="cat => dog",
        keep=(KEPT,),
        templates="a photo of {}\n{} in a garden",
        captions=40,
        trajectories=6,
        sampling_steps=4,
        resolution=side,
        layers="readers",
    )
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        with ComfyDenoiser(model, clip, "small", 6, side, settings.layers) as denoiser:
            return erase(settings, denoiser)


def chosen() -> list:
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                bool(entry.lacking) or not (ALL or name in SAMPLE),
                reason=entry.lacking or "waits for ARCHITECTURES=1",
            ),
        )
        for name, entry in ARCHITECTURES.items()
    ]


@pytest.mark.parametrize("name", chosen())
def test_it_is_erased_and_what_must_stay_stays_to_the_last_digits(name, tmp_path):
    model, clip = build(name)
    before = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    erasure = train(model, clip, name)
    record = erasure.record
    assert record["form"] == "hard" and record["forward_equivalents"] <= 900
    assert record["measures"]["moved_held_out"]["overall"] >= 0.85
    assert sum(row["matrices"] for row in record["readers"] if row["edited"]) == record["matrices"]

    path = save_erasure(erasure, tmp_path, "cat")
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    with safe_open(path, "pt") as file:
        assert all(
            key.partition(".lora_")[0].removesuffix(".alpha") in known for key in file.keys()
        )
    with torch.inference_mode():
        file = comfy.utils.load_torch_file(str(path))
        stock, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
    ours = apply_erasure(model, Erasure.load(path), 1.0)
    x = noisy(model, ARCHITECTURES[name], 0.7)

    def drawn(patched, text: str) -> torch.Tensor:
        return predicted(patched, clip.conditioning(text), x, 0.7)

    (kept,) = record["measures"]["kept"]
    for text in ("", *([KEPT] if kept["exact"] else [])):
        clean = drawn(model, text)
        for patched in (ours, apply_erasure(model, erasure, 1.0, "exact")):
            assert (drawn(patched, text) - clean).norm() <= FLOAT32 * (x - clean).norm()
    clean, changed = (drawn(one, "a photo of a cat") for one in (model, ours))
    assert (changed - clean).norm() > 1e-3 * (x - clean).norm()
    assert torch.equal(drawn(stock, "a photo of a cat"), changed)
    assert torch.equal(drawn(apply_erasure(model, erasure, 0.0), "a photo of a cat"), clean)
    model.unpatch_model()
    after = model.model.state_dict()
    assert all(torch.equal(weight, after[key]) for key, weight in before.items())
