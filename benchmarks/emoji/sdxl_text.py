"""SDXL's CLIP with the emoji model's text encoder in both of its parts.

Random text encoders give prompts that are alike in everything but their words; the emoji model's
was trained, so related words are near and unrelated ones aren't.
"""

from __future__ import annotations

import math
import re

import comfy.sd
import torch
from safetensors.torch import load_file

from benchmarks.emoji.build import WEIGHTS, text_tensors, unpack
from benchmarks.emoji.text import HIDDEN, REAL_LAYERS, WIDTH

# The two that are real, behind which SDXL takes the tokens, and one that adds nothing, behind
# which it takes the pooled vector.
FEWEST_LAYERS = 3


def trained_sdxl_encoder(config, whole: bool = False):
    """The CLIP that belongs to the host's configuration of SDXL.

    Args:
        whole: as deep and wide as SDXL's, for what it costs; what is more adds nothing.
    """
    small = {"num_hidden_layers": FEWEST_LAYERS, "intermediate_size": HIDDEN}
    sizes = {} if whole else {f"{name}_model_config": small for name in ("clip_l", "clip_g")}
    clip = comfy.sd.CLIP(config.clip_target({}), model_options=sizes)
    known = text_tensors(unpack(load_file(WEIGHTS))[1])
    for part in (clip.cond_stage_model.clip_l, clip.cond_stage_model.clip_g):
        projection = part.transformer.text_projection.weight
        projection.copy_(torch.eye(len(projection)))
        turn = _turn(len(projection))
        for key, weight in part.transformer.text_model.named_parameters():
            weight.copy_(_turned(key, known, turn, weight.shape))
    return clip


def _turn(wide: int) -> torch.Tensor:
    """Q (wide, 768): orthonormal columns of mean zero, so that norms do to Q x what they do to x.

    But for their gain: of Q x they give sqrt(wide / 768) times Q of what they give of x.
    """
    if wide == WIDTH:
        return torch.eye(wide)
    drawn = torch.randn(wide, WIDTH, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn - drawn.mean(0)).Q


def _turned(
    key: str, known: dict[str, torch.Tensor], turn: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    """What a parameter must be for the states to be Q times those of the emoji model's encoder."""
    if "norm" in key:
        return (torch.ones if key.endswith("weight") else torch.zeros)(shape)
    if "embedding" in key:
        return known[key] @ turn.T
    number = int(re.search(r"layers\.(\d+)", key)[1])
    if number >= len(REAL_LAYERS):
        return torch.zeros(shape)
    value = known[key.replace(f"layers.{number}", f"layers.{REAL_LAYERS[number]}")]
    if "fc1" in key:
        value = value[:HIDDEN]
    if "fc2.weight" in key:
        value = value[:, :HIDDEN]
    if "out_proj" in key or "fc2" in key:
        value = turn @ value  # writes states
    elif value.dim() > 1:
        value = math.sqrt(WIDTH / len(turn)) * value @ turn.T  # reads normed states
    # Heads that the narrower encoder doesn't have stay empty.
    whole = torch.zeros(shape)
    whole[tuple(slice(size) for size in value.shape)] = value
    return whole
