"""Prompts through the host's CLIP, as the engine takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import torch

from ..erase_core.model.prompt import Encoded
from .families import UnsupportedModelError


def refuse_hooks(clip) -> None:
    """Weights that change by prompt or by step are not what one fixed change is trained for.

    The host puts a CLIP's hooks on its weights only where it encodes by its schedule, and lets the
    conditioning carry them on to the MODEL; an erasure would be trained without either.

    Raises:
        UnsupportedModelError: the CLIP carries hooks.
    """
    patcher = getattr(clip, "patcher", None)
    found = {
        "on its own weights": getattr(patcher, "forced_hooks", None),
        "for the MODEL, on every prompt it encodes": getattr(clip, "apply_hooks_to_conds", None),
    }
    where = [name for name, group in found.items() if group is not None and group.hooks]
    if where:
        kinds = {type(hook).__name__ for group in found.values() if group for hook in group.hooks}
        raise UnsupportedModelError(
            f"The connected CLIP carries hooks ({', '.join(sorted(kinds))}) {' and '.join(where)}. "
            "They change weights while sampling, so an erasure trained beside them would be for "
            "other weights. Connect the CLIP from before Set CLIP Hooks; for a LoRA that shall "
            "be part of the training, use Load LoRA on MODEL and CLIP instead of Create Hook LoRA."
        )


def encode_null(clip) -> Encoded:
    """The empty prompt, with its pooled vector where the text encoder gives one."""
    return _encode_tokens(clip, clip.tokenize(""), pooled=None)


def encode_prompts(
    clip, prompts: Sequence[str], together: bool = False, pooled: bool = False
) -> list[Encoded]:
    """The embeddings of each prompt, float32 on the CPU.

    The host encodes a long prompt as sections side by side in one batch; ``together`` uses that
    for many prompts at once, and leaves out the pooled vectors, of which a batch has only one.

    Args:
        pooled: whether the pooled vector goes along with the tokens.
    """
    tokens = [clip.tokenize(prompt) for prompt in prompts]
    if not together or len(prompts) < 2:
        return [_encode_tokens(clip, one, pooled) for one in tokens]
    merged = {name: [section for one in tokens for section in one[name]] for name in tokens[0]}
    rows = _encode_tokens(clip, merged, pooled=False).tokens
    first = next(iter(merged))
    length = rows.shape[0] // len(merged[first])
    parts = rows.split([len(one[first]) * length for one in tokens])
    return [Encoded(part) for part in parts]


def _encode_tokens(clip, tokens: Mapping[str, Any], pooled: bool | None) -> Encoded:
    """With the pooled vector or without; None is with it if there is one."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    # The encoder's weights are inference tensors: run it as the host does, copy what comes out.
    with torch.inference_mode():
        rows, vector = clip.encode_from_tokens(tokens, return_pooled=True)
    if pooled and vector is None:
        raise UnsupportedModelError(
            "The connected text encoder gives no pooled vector, which this model needs. Connect "
            "the CLIP that belongs to the model."
        )
    with_vector = vector is not None if pooled is None else pooled
    kept = [rows, vector] if with_vector else [rows]
    return Encoded(*(part[0].float().cpu().clone() for part in kept))
