"""Shrunken models of other families than SD1.x, with text encoders that the host can't load small.

The host's own classes throughout: the U-Nets come through the stock loader, the text encoders are
the host's with fewer layers and random weights.
"""

from __future__ import annotations

import math

import comfy.sd
import torch

from tools.checkpoint import build_checkpoint
from tools.environment import BUILD

LAYERS = 3  # the fewest that have a last but one beside the first
_GAINS = {"q_proj": 3.0, "k_proj": 3.0, "out_proj": 0.3, "fc2": 0.1}  # as in tools.checkpoint


def load_family(layout: str):
    """MODEL and CLIP of a shrunken checkpoint, made as the host's executor would."""
    path = build_checkpoint(BUILD / "checkpoints" / f"{layout}.safetensors", layout=layout)
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(path))
        return model, random_text_encoder(model)


def random_text_encoder(model):
    """The CLIP that belongs to a model, a few layers deep."""
    encoders = ("clip_l", "clip_g", "clip_h")
    options = {
        f"{name}_model_config": {"num_hidden_layers": LAYERS, "intermediate_size": 64}
        for name in encoders
    }
    target = model.model.model_config.clip_target({})
    clip = comfy.sd.CLIP(target, model_options=options)
    generator = torch.Generator().manual_seed(0)
    for name, weight in clip.cond_stage_model.named_parameters():
        if weight.ndim < 2:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        gain = _GAINS.get(name.split(".")[-2], 1.0)
        std = gain if "embedding" in name else gain / math.sqrt(weight.shape[1])
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return clip
