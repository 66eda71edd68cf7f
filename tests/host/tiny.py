"""The shrunken SD1.5 in this process: trained on quickly, and asked what it predicts."""

from __future__ import annotations

import hashlib

import comfy.model_management
import torch
from concept_surgery.erase_core import Erasure, erase, preset_settings
from concept_surgery.nodes.encoding import encode_prompts
from concept_surgery.nodes.host import ComfyDenoiser

QUICK = {"steps": 4, "trajectories": 4, "sampling_steps": 4, "captions": 24, "resolution": 32}


def train(loaded, store, name="tiny", **values) -> Erasure:
    """The balanced preset with few steps, on MODEL and CLIP, as the host's executor runs nodes."""
    settings = preset_settings("balanced", **{**QUICK, **values})
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        with ComfyDenoiser(*loaded, name, 6, settings.resolution, settings.layers) as denoiser:
            last = erase(settings, denoiser, store)
    return last


def interrupting(stage):
    """A meter's report that presses the host's cancel button when a stage begins."""

    def report(progress) -> None:
        if progress.stage.startswith(stage):
            comfy.model_management.interrupt_current_processing(True)

    return report


def weights_hash(model) -> str:
    """Of every weight of a MODEL as it was before patches, wherever the host keeps it."""
    digest = hashlib.sha256()
    state = model.model.state_dict()
    for key in sorted(state):
        weight = model.backup[key].weight if key in model.backup else state[key]
        digest.update(key.encode() + weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def tokens_of(clip, prompts, together=False) -> list[torch.Tensor]:
    """The tokens of prompts, (length, width) each."""
    return [prompt.tokens for prompt in encode_prompts(clip, prompts, together)]


def noise_prediction(model, tokens, sigma: float) -> torch.Tensor:
    """What the host's own sampling code predicts, with the model's patches in place."""
    comfy.model_management.load_models_gpu([model])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 8, 8, generator=generator) * (1 + sigma**2) ** 0.5
    with torch.inference_mode():
        x0 = model.model.apply_model(x, torch.tensor([sigma]), c_crossattn=tokens[None])
    return (x - x0) / sigma


def relative_change(model, patched, tokens, sigma=2.0) -> float:
    """Of the predicted noise, by the patches that one MODEL has and the other hasn't."""
    before = noise_prediction(model, tokens, sigma)
    after = noise_prediction(patched, tokens, sigma)
    return float((after - before).norm() / before.norm())
