"""What trains of an edit, by which rule, and how fast."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..model.low_rank import LowRankEdit
from ..settings.settings import EraseSettings

WARMUP_SHARE = 0.1
FINAL_RATE = 0.05


def trained_values(edit: LowRankEdit) -> dict[str, Tensor]:
    """What trains of an edit: B of each matrix and, in the soft form, its R, by name."""
    trained = {f"B.{name}": factor for name, factor in edit.factors.items()}
    return trained | {f"R.{n}": basis for n, basis in edit.bases.items() if basis.requires_grad}


def optimiser(
    edit: LowRankEdit, matrices: Mapping[str, Tensor], settings: EraseSettings
) -> torch.optim.Adam:
    """Adam whose step is a fixed share of each matrix's own size, so one rate fits all models."""
    rate = settings.learning_rate
    groups = []
    for name, value in trained_values(edit).items():
        kind, _, matrix = name.partition(".")
        size = _root_mean_square(matrices[matrix] if kind == "B" else value.detach())
        groups.append({"params": [value], "lr": rate * size})
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def warmup_then_cosine(steps: int) -> Callable[[int], float]:
    """The factor of the learning rate by step."""
    warmup = max(1, round(WARMUP_SHARE * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def _root_mean_square(weight: Tensor) -> float:
    return float(weight.float().square().mean().sqrt())
