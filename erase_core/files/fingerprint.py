"""Recognising a model or a text encoder again, whatever precision it is loaded in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

TENSORS = 8
SAME_WITHIN = 0.02
PACKED_WITHIN = 0.3  # of weights packed into 2 to 8 bits; two models differ by 1 and more


def fingerprint(tensors: Mapping[str, Tensor]) -> list[float]:
    """One number a tensor (at most eight, spread over the names): a random projection.

    Each is ``u^T W v / |W|`` with fixed random signs u and v, so it is of order one for any weight,
    moves by less than 0.01 when the weight is rounded to half precision, and by much more
    when the weight is another.

    Args:
        tensors: matrices (rows, columns) by name.
    """
    names = sorted(tensors)
    chosen = names[:: max(1, len(names) // TENSORS)][:TENSORS]
    return [round(_projection(tensors[name]), 4) for name in chosen]


def same_fingerprint(
    one: Sequence[float], other: Sequence[float], within: float = SAME_WITHIN
) -> bool:
    """Whether two fingerprints are of the same weights up to rounding."""
    return len(one) == len(other) and all(
        abs(a - b) <= within for a, b in zip(one, other, strict=True)
    )


def _projection(weight: Tensor) -> float:
    weight = weight.detach().float().cpu()
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rows * 100_003 + columns)
    left = torch.randint(0, 2, (rows,), generator=generator).float() * 2 - 1
    right = torch.randint(0, 2, (columns,), generator=generator).float() * 2 - 1
    return float(left @ weight @ right / weight.norm().clamp(min=1e-12))
