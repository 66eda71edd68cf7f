"""The gradient check before the first step: does what autograd says agree with the loss itself?

Some hosts' layers add in place or detach; then the forward is right, nothing is raised, and the
gradient is wrong. One derivative along one direction, against a central difference of the loss,
shows it for a few predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .denoiser import LowRankEdit
from .memory import out_of_memory

MOST_APART = 0.05
# Steps of the difference, in lengths of the direction. The first is half the cube root of the
# precision (the cube root is the textbook's), but no smaller than this. Measured on a shrunken
# U-Net in bf16: 0.2 is 4 % off by the loss's curvature, 0.1 and 0.05 by 1 %, 0.025 by 2 %, which
# is rounding. Smaller steps follow before the gradient is blamed.
SMALLEST_FIRST_STEP = 0.02
SHRINK, TRIES = 4, 3
# How much the loss should change along the direction of matrices that start from nothing.
PROBE_CHANGE = 0.5


class GradientError(RuntimeError):
    """The gradient that training would follow is not the loss's."""


def check_gradient(
    loss: Callable[[LowRankEdit], Tensor],
    start: LowRankEdit,
    dtype: torch.dtype,
    scale: float = 1.0,
) -> float:
    """Compare one directional derivative of a loss with a central difference.

    It is taken half way between no edit and the one that training starts from, along the way from
    one to the other: there the loss falls steeply, and every matrix has a share in it. Matrices
    that start from nothing go along their own gradient instead.

    Args:
        loss: of an edit, a scalar; the same for the same edit.
        start: where training starts.
        dtype: the precision that the model predicts in.
        scale: what the loss is multiplied with for the backward, see :class:`SurgeryTrainer`.

    Returns:
        The distance of the two derivatives relative to the larger one.

    Raises:
        GradientError: derivatives more than 5 % apart, or matrices that matter to the loss but
            get no gradient.
    """
    factors = {name: (b.detach() / 2).requires_grad_() for name, b in start.factors.items()}
    _backward(loss(LowRankEdit(start.bases, factors)) * scale)
    gradients = {n: torch.zeros_like(b) if b.grad is None else b.grad for n, b in factors.items()}
    if scale > 1 and not all(gradient.isfinite().all() for gradient in gradients.values()):
        return check_gradient(loss, start, dtype, smaller_scale(scale))
    gradients = {name: gradient / scale for name, gradient in gradients.items()}
    direction = _direction(start, gradients)
    slope = sum(float((gradients[name] * direction[name]).sum()) for name in factors)
    rounding = torch.finfo(dtype).eps
    step = max(SMALLEST_FIRST_STEP, rounding ** (1 / 3) / 2)

    def along(direction: Mapping[str, Tensor], step: float) -> float:
        ends = []
        for signed in (step, -step):
            moved = {n: b.detach() + signed * direction[n] for n, b in factors.items()}
            with torch.no_grad():
                ends.append(float(loss(LowRankEdit(start.bases, moved))))
        return (ends[0] - ends[1]) / (2 * step)

    silent = [name for name, gradient in gradients.items() if not gradient.any()]
    if silent:
        _refuse_if_it_matters(silent, along(_only(silent, direction), step), rounding**0.5)
    tried = []
    for shrunken in range(TRIES):
        difference = along(direction, step / SHRINK**shrunken)
        tried.append((_apart(slope, difference), difference))
        if tried[-1][0] <= MOST_APART:
            return tried[-1][0]
    apart, difference = min(tried)
    raise GradientError(
        f"The model's gradient is wrong: along a test direction it gives {slope:.4g}, while the "
        f"loss itself changes by {difference:.4g} ({apart:.0%} apart, at most {MOST_APART:.0%} is "
        "allowed). Training would learn the wrong thing, so nothing was trained. Some layer of "
        "this model or of a node upstream of it can't be trained through: take such nodes away or, "
        "in the hard form, use the preset 'instant', which needs no gradient."
    )


def smaller_scale(scale: float) -> float:
    """What a loss is multiplied with after its gradient overflowed; at last 1, never less.

    A gradient that is not finite at a scale of 1 is the model's own, and no scale mends it.
    """
    return max(1.0, scale / 8)


def _backward(loss: Tensor) -> None:
    """Raises :class:`GradientError` where autograd itself refuses."""
    try:
        loss.backward()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise GradientError(
            f"The model can't be trained through: {reason} Take away nodes that change how the "
            "model runs, or, in the hard form, use the preset 'instant', which needs no gradient."
        ) from error


def _apart(slope: float, difference: float) -> float:
    """Distance of two derivatives relative to the larger.

    Raises:
        GradientError: one is NaN or infinite.
    """
    if not (math.isfinite(slope) and math.isfinite(difference)):
        raise GradientError(
            "The edited model's predictions or their gradient are NaN or infinite before the first "
            "step, so nothing was trained. Load the model in bf16 or fp32, or give the protection "
            "a higher value."
        )
    larger = max(abs(slope), abs(difference))
    return abs(slope - difference) / larger if larger else 0.0


def _refuse_if_it_matters(silent: list[str], slope: float, rounding: float) -> None:
    """Matrices that get no gradient must be such that the loss doesn't depend on them."""
    if abs(slope) > rounding:
        raise GradientError(
            f"No gradient reaches {len(silent)} of the trained matrices, for example {silent[0]}, "
            "though the model depends on them: something in the model or in a node upstream of it "
            "cuts it off. Take such nodes away, train other layers, or, in the hard form, use the "
            "preset 'instant', which needs no gradient."
        )


def _only(names: list[str], direction: dict[str, Tensor]) -> dict[str, Tensor]:
    """A direction for these matrices alone: their own, or a random one where it is nothing."""
    generator = torch.Generator().manual_seed(0)
    alone = {}
    for name, along in direction.items():
        alone[name] = torch.zeros_like(along)
        if name in names:
            noise = torch.randn(along.shape, generator=generator).to(along)
            alone[name] = along if along.any() else noise / noise.norm()
    return alone


def _direction(start: LowRankEdit, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The start itself, and minus the gradient where the start is nothing."""
    fresh = [name for name, b in start.factors.items() if not b.any()]
    steepness = sum(float(gradients[name].square().sum()) for name in fresh)
    scale = -PROBE_CHANGE / steepness if steepness else 0.0
    return {
        name: gradients[name] * scale if name in fresh else b.detach()
        for name, b in start.factors.items()
    }
