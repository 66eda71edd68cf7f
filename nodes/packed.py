"""Weights that aren't the numbers they stand for: scaled ones of the host, and those of GGUF files.

The host packs them into tensors of a class of its own that are made of others: bytes and scales.
ComfyUI-GGUF keeps a layer's weight as bytes in a tensor class of its own, which knows the format,
the shape of the numbers, and the patches that are added whenever they are unpacked. Its layers
unpack with ``get_weight(tensor, dtype)``. Everything here asks for those features, not for names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .families import UnsupportedModelError

# What is noted on a packed tensor beside what it holds: the patcher's patches, PyTorch's flag.
_NO_CONTENT = ("patches", "_is_param")


def is_packed(weight: Tensor | None) -> bool:
    """Whether a weight is bytes that a layer has to unpack; no weight isn't."""
    return weight is not None and not weight.is_floating_point()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what its memory holds, and it has memory."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"


def contents(tensor: Tensor) -> dict[str, Any] | None:
    """What a tensor that isn't plain consists of: plain tensors and values, by name.

    The patches that a packed tensor carries are the patcher's, and aren't part of it.

    Returns:
        None where that can't be told.
    """
    if hasattr(tensor, "__tensor_flatten__"):  # PyTorch's protocol for tensors made of others
        tensor = tensor.detach()  # the host's own notes its parts on what it is asked for
        names, rest = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return {**{name: getattr(tensor, name) for name in names}, "made with": rest}
    if type(tensor) in (Tensor, nn.Parameter) or not tensor.untyped_storage().nbytes():
        return None
    notes = {name: value for name, value in vars(tensor).items() if name not in _NO_CONTENT}
    return {"bytes": tensor.as_subclass(Tensor), **notes}


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


def numbers_of(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The matrix that a layer of a loaded model computes with, patches included, (out, width).

    Of a layer whose weight is streamed, as where memory is short, the weight itself is unpatched:
    the layer calls functions on it whenever it has been cast. So it is for weights that nodes
    wrapped.

    Args:
        device, dtype: where and in which precision the layer computes.

    Raises:
        UnsupportedModelError: packed in a way that the layer can't undo, or not there.
    """
    weight: Tensor = module.get_parameter("weight").detach()
    functions: Sequence[Callable[[Tensor], Tensor]] = getattr(module, "weight_function", ())
    if weight.device.type == "meta":
        raise UnsupportedModelError(
            f"This host hasn't loaded the weights that are to be trained ({type(module).__name__} "
            "has a placeholder without content). Use a core loader such as Load Checkpoint, or "
            "start ComfyUI with --highvram."
        )
    if is_packed(weight) or not functions:  # a packed one carries its patches itself
        return as_numbers(module, weight)
    with torch.no_grad():
        cast = weight.to(device=device, copy=True).to(dtype)
        if hasattr(cast, "dequantize") and not is_plain(cast):
            cast = cast.dequantize()
        for function in functions:
            cast = function(cast)
        return as_numbers(module, cast).to(weight.device)


def compute_with_numbers(network: nn.Module) -> None:
    """Let the layers of a twin compute with the numbers that their packed weights stand for.

    The host's kernels for packed weights round what a layer reads as well, in steps that no
    gradient sees, and some of them have no backward. A layer with a function on its weight computes
    without them: the host unpacks the weight for the function.
    """
    for module in network.modules():
        functions = getattr(module, "weight_function", None)
        if functions is not None and _unpacked_by_itself(module):
            vars(module)["weight_function"] = [*functions, unpacked]


def unpacked(weight: Tensor) -> Tensor:
    """The weight that a layer has unpacked, as it is."""
    return weight


def _unpacked_by_itself(module: nn.Module) -> bool:
    """Whether a weight is a tensor made of others that stands for numbers wherever it is used."""
    weight = module._parameters.get("weight")
    return weight is not None and not is_plain(weight) and not is_packed(weight)


def coarse_format(weight: Tensor) -> str:
    """What a weight is kept in, where a patch merged into it is rounded to a few bits; else "".

    Bytes that the layers unpack themselves, as of GGUF files, are patched when they are unpacked.
    """
    if is_plain(weight):
        kept = weight
    elif is_packed(weight) or not hasattr(weight, "__tensor_flatten__"):
        return ""
    else:
        weight = weight.detach()  # the host's own notes its parts on what it is asked for
        kept = getattr(weight, weight.__tensor_flatten__()[0][0])  # type: ignore[attr-defined]
    return str(kept.dtype).removeprefix("torch.") if kept.element_size() == 1 else ""


def unpatched(weight: Tensor) -> Tensor:
    """The weight without the patches that a packed one carries with it."""
    if not getattr(weight, "patches", None):
        return weight
    plain = like(Tensor.detach(weight), weight)
    vars(plain)["patches"] = []
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
