"""Hosts whose weights aren't the numbers they stand for."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import pytest
import torch
from concept_surgery.nodes.families import UnsupportedModelError
from concept_surgery.nodes.host import ComfyDenoiser, known_matrices

from .small import random_text_encoder
from .test_families import train

PREFIX, SCALE = "model.diffusion_model.", 0.01
FP8 = torch.float8_e4m3fn


def unet_tensors(checkpoint):
    tensors = comfy.utils.load_torch_file(str(checkpoint))
    return {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}


def scaled_fp8(tensors):
    """As in scaled checkpoints: the matrices that read the prompt, in fp8 and over a scale."""
    found = {"scaled_fp8": torch.tensor([], dtype=FP8)}
    for key, value in tensors.items():
        found[key] = value
        if "attn2.to_k" in key or "attn2.to_v" in key:
            found[key] = (value.float() / SCALE).to(FP8)
            found[key.replace(".weight", ".scale_weight")] = torch.tensor(SCALE)
    return found


def loaded(tensors):
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(tensors)
        return model, random_text_encoder(model.model.model_config)


def test_scaled_fp8_is_read_with_its_scale_and_trained_on(checkpoint):
    tensors = unet_tensors(checkpoint)
    plain, _ = loaded(dict(tensors))
    model, clip = loaded(scaled_fp8(tensors))
    stored = [w.dtype for k, w in model.model.state_dict().items() if "attn2.to_k.weight" in k]
    assert set(stored) == {FP8}
    expected = known_matrices(plain)
    with torch.inference_mode(False), ComfyDenoiser(model, clip, "", 2, 64) as denoiser:
        found = denoiser.matrices()
        assert found.keys() == expected.keys()
        for name, matrix in found.items():
            apart = (matrix.float() - expected[name].float()).norm() / expected[name].float().norm()
            assert apart <= 0.04, name  # fp8 has three bits of fraction
    measures = train(model, clip).record["measures"]
    assert measures["moved_held_out"]["overall"] >= 0.8


def test_packed_weights_are_refused_in_words(checkpoint):
    model, clip = loaded(unet_tensors(checkpoint))
    with torch.inference_mode(False), ComfyDenoiser(model, clip, "", 2, 64) as denoiser:
        module = next(iter(denoiser._modules.values()))
        module.weight = torch.nn.Parameter(module.weight.to(torch.uint8), requires_grad=False)
        with pytest.raises(UnsupportedModelError, match="packed.*uint8.*Train on the same model"):
            denoiser.matrices()
