"""Prompts through the host's CLIP, as the engine takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..erase_core.model.prompt import Encoded
from .batches import BatchEncoder, Tokens
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
    clip, prompts: Sequence[str], pooled: bool | None = False, extras: bool = False
) -> list[Encoded]:
    """The embeddings of each prompt, one by one, float32 on the CPU.

    Args:
        pooled: whether the pooled vector goes along with the tokens; None is if there is one.
        extras: whether what else the encoder gives does.
    """
    return [_encode_tokens(clip, clip.tokenize(prompt), pooled, extras) for prompt in prompts]


def batch_encoder(clip) -> BatchEncoder:
    """Encodes many prompts at once; rounding may differ from one by one in the last digits."""

    def encode(tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        encoded = _encode_tokens(clip, tokens, pooled=None)
        return encoded.tokens, encoded.pooled

    return BatchEncoder(clip, encode)


def _encode_tokens(
    clip, tokens: Mapping[str, Any], pooled: bool | None, extras: bool = False
) -> Encoded:
    """With the pooled vector or without; None is with it if there is one."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    more: dict[str, Any] = {}
    # The encoder's weights are inference tensors: run it as the host does, copy what comes out.
    with torch.inference_mode():
        if extras:
            more = dict(clip.encode_from_tokens(tokens, return_dict=True))
            rows, vector = more.pop("cond"), more.pop("pooled_output", None)
        else:
            rows, vector = clip.encode_from_tokens(tokens, return_pooled=True)
    if pooled and vector is None:
        raise UnsupportedModelError(
            "The connected text encoder gives no pooled vector, which this model needs. Connect "
            "the CLIP that belongs to the model."
        )
    with_vector = vector is not None if pooled is None else pooled
    given = {name: _kept(value) for name, value in more.items() if value is not None}
    own = [part[0].float().cpu().clone() for part in ((rows, vector) if with_vector else (rows,))]
    return Encoded(own[0], own[1] if with_vector else None, given)


def _kept(value: Any) -> Any:
    """A copy of what the encoder gives, on the CPU; other things than tensors as they are."""
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
