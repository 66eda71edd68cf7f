"""Weights that aren't the numbers they stand for: scaled fp8, and the packed ones of GGUF files.

ComfyUI-GGUF keeps a layer's weight as bytes in a tensor class of its own, which knows the format,
the shape of the numbers, and the patches that are added whenever they are unpacked. Its layers
unpack with ``get_weight(tensor, dtype)``. Everything here asks for those features, not for names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .families import UnsupportedModelError


def is_packed(weight: Tensor | None) -> bool:
    """Whether a weight is bytes that a layer has to unpack; no weight isn't."""
    return weight is not None and not weight.is_floating_point()


def as_numbers(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as the numbers it stands for, (rows, columns), with no gradient.

    Raises:
        UnsupportedModelError: packed in a way that the layer can't undo.
    """
    weight = weight.detach()
    if is_packed(weight):
        return _unpacked(module, weight)
    convert = getattr(module, "convert_weight", None)
    return weight if convert is None else convert(weight, inplace=False)


def unpatched(weight: Tensor) -> Tensor:
    """The weight without the patches that a packed one carries with it."""
    if not getattr(weight, "patches", None):
        return weight
    plain = like(Tensor.detach(weight), weight)
    plain.patches = []
    return plain


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` in the class of ``other``, with what that class keeps beside the numbers."""
    alias = tensor.as_subclass(type(other))
    vars(alias).update(vars(other))
    return alias


def _unpacked(module: nn.Module, weight: Tensor) -> Tensor:
    unpack = getattr(module, "get_weight", None)
    if unpack is None:
        raise UnsupportedModelError(
            f"This model keeps its weights packed ({type(weight).__name__} of {weight.dtype} in "
            f"{type(module).__name__}), in a format that its layers can't give as numbers. Train "
            "on the same model in fp16, bf16, fp8 or GGUF, save the erasure, and apply the file "
            "to this one with a LoRA loader."
        )
    with torch.no_grad():
        return unpack(weight, torch.float32)
