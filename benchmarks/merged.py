"""An edit in the weights of a network that is drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from torch import Tensor


@contextmanager
def merged(weights: Mapping[str, Tensor], edit: LowRankEdit | None) -> Iterator[None]:
    """Inside, ``W + B R^T`` stands in the place of each edited W; afterwards W, bit for bit.

    Args:
        weights: W by matrix name, (out, width), float32, on any device.
        edit: None for no change.
    """
    before = {} if edit is None else {name: weights[name].clone() for name in edit.factors}
    try:
        with torch.no_grad():
            for name, weight in before.items():
                basis, factor = (
                    part[name].to(weight.device, torch.float32)
                    for part in (edit.bases, edit.factors)
                )
                weights[name].add_(factor @ basis.T)
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                weights[name].copy_(weight)
