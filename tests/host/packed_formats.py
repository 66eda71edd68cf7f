"""Matrices in the formats that the host's own packed files have, made with the host's own code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy import quant_ops
from torch import Tensor

# What a layer is said to be in, what the file says besides, and what making it takes.
_ROTATED: dict[str, Any] = {"convrot": True, "convrot_groupsize": 256}
_MADE: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "fp8": ("float8_e4m3fn", {}, {"scale": "recalculate"}),
    "fp8 with fewer digits": ("float8_e5m2", {}, {"scale": "recalculate"}),
    "int8": ("int8_tensorwise", {}, {}),
    "int8 rotated": ("int8_tensorwise", _ROTATED, {"per_channel": True, **_ROTATED}),
    "nvfp4": ("nvfp4", {}, {}),
    "mxfp8": ("mxfp8", {}, {}),
    "int4 rotated": ("convrot_w4a4", {}, {}),
    "int4 in int8": ("asym_w4a8_int8", {}, {}),
}
# The host's name of each format's algorithm, by ours of the format.
FORMATS = {name: algorithm for name, (algorithm, _, _) in _MADE.items()}


def known_formats() -> set[str]:
    """Algorithms that the host at hand reads from what a layer says; none for older hosts."""
    says_itself = hasattr(quant_ops.QuantizedTensor, "state_dict")
    return set(getattr(quant_ops, "QUANT_ALGOS", {})) if says_itself else set()


def packed_in(name: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """What stands in a file for a matrix (out, width), by what follows the layer's name."""
    algorithm, said, given = _MADE[name]
    layout = quant_ops.QUANT_ALGOS[algorithm]["comfy_tensor_layout"]

    def pack(weight: Tensor) -> dict[str, Tensor]:
        groups = _group(weight.shape[1]) if said else {}
        own = quant_ops.QuantizedTensor.from_float(weight.float(), layout, **{**given, **groups})
        text = json.dumps({"format": algorithm, **said, **groups})
        note = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return {**own.state_dict("weight"), "comfy_quant": note}

    return pack


def _group(width: int) -> dict[str, int]:
    """Rotated in as many numbers as divide the width, a power of 4."""
    return {"convrot_groupsize": next(size for size in (256, 64, 16) if width % size == 0)}
