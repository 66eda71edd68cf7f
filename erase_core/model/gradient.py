"""The gradient check before the first step: does what autograd says agree with the loss itself?

Some hosts' layers add in place or detach; then the forward is right, nothing is raised, and the
gradient is wrong. One derivative along one direction, against a central difference of the loss,
shows it for a few predictions; in half precision, where rounding hides it, for some more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .low_rank import LowRankEdit
from .memory import out_of_memory

# Half of the smallest fault that must be found, a gradient that is off by 5 %.
MOST_APART = 0.025
# Steps of the differences, in lengths of a direction along which the loss would be gone at 1 if it
# went on falling as it begins. In single precision a small one will do alone, as the loss's
# curvature is next to nothing there. Smaller ones follow before the gradient is blamed: on a
# shrunken PixArt that starts from nothing the loss is straight from .0002 on. Rounding is 1 %
# there, so the two must come nearer.
SMALL_STEP, SINGLE, SHRINK, SMALLER, SURE = 0.005, 1e-5, 5, 3, 0.01
# A loss in single precision is off by up to this much of itself on the toy model: at high noise x0
# is the difference of large numbers. A loss that is smaller is gone, and nothing is to be learned.
SINGLE_ROUNDED, GONE = 2e-5, 1e-6
# In half precision a small step is all rounding, and a large one bends. Differences at two steps
# tell the curvature, which is taken out (Richardson's extrapolation). The steps are such that
# rounding is 1 % at most on the toy model: there it is half the precision over the larger step.
LARGE_STEP, STEPS_OF_PRECISION, TRIES = 0.1, 51, 2
# How much doubt there may be about a derivative that is believed, relative, and how much there
# always is. Of two differences that lie apart extrapolation may be off by as much as they are.
BELIEVED, SLIGHTEST = 0.01, 1e-3
# How far matrices are moved to see whether the loss depends on them at all.
SMALLEST_NUDGE = 0.02

Loss = Callable[[LowRankEdit], Tensor]
Tensors = Mapping[str, Tensor]


class GradientError(RuntimeError):
    """The gradient that training would follow is not the loss's."""


def check_gradient(
    loss: Loss,
    start: LowRankEdit,
    dtype: torch.dtype,
    scale: float = 1.0,
    bases_too: bool = False,
    elsewhere: Sequence[Loss] = (),
) -> float:
    """Compare directional derivatives of a loss with central differences.

    That of B is taken half way between no edit and the one that training starts from, along the
    way from one to the other: there the loss falls steeply, and every matrix has a share in it.
    Matrices that start from nothing go along their own gradient instead, and so does R.

    Args:
        loss: of an edit, a scalar; the same for the same edit.
        start: where training starts.
        dtype: the precision that the model predicts in.
        scale: what the loss is multiplied with for the backward, see :class:`SurgeryTrainer`.
        bases_too: whether R trains as well as B.
        elsewhere: the loss at other states, which are asked where this one's bends or rounding
            leave the difference in doubt.

    Returns:
        The distance of the two derivatives relative to the larger one; of B or R, whichever lie
        farther apart.

    Raises:
        GradientError: derivatives farther apart than a gradient that is right, or matrices that
            matter to the loss but get no gradient.
    """
    found = [_apart_of(_factors_at, (loss, *elsewhere), start, dtype, scale)]
    if bases_too:
        found.append(_apart_of(_bases_at, (loss, *elsewhere), start, dtype, scale))
    return max(found)


@dataclass(frozen=True)
class _Line:
    """A loss along a line through the values of an edit.

    Attributes:
        at: the loss of some values, with the others of the edit in place.
        values: where the line goes through, by matrix name.
        gradients: there, as autograd has them.
        value: of the loss there.
    """

    at: Callable[[Tensors], Tensor]
    values: Tensors
    gradients: Tensors
    value: float

    def slope(self, direction: Tensors) -> float:
        """The derivative along a direction, by the gradient."""
        return sum(float((g * direction[name]).sum()) for name, g in self.gradients.items())

    def difference(self, direction: Tensors, step: float) -> float:
        """The same by a central difference."""
        ends = []
        for signed in (step, -step):
            moved = {n: value.detach() + signed * direction[n] for n, value in self.values.items()}
            with torch.no_grad():
                ends.append(float(self.at(moved)))
        return (ends[0] - ends[1]) / (2 * step)

    def falling(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Minus the gradient of some matrices, as long as would take the loss away."""
        steepness = sum(float(self.gradients[name].square().sum()) for name in names)
        length = abs(self.value) / steepness if steepness else 0.0
        return {name: -length * self.gradients[name] for name in names}

    def not_steep(self, direction: Tensors) -> dict[str, Tensor]:
        """A direction, shortened where the loss would be gone before its end."""
        slope = abs(self.slope(direction))
        length = min(1.0, abs(self.value) / slope) if slope else 1.0
        return {name: length * along for name, along in direction.items()}

    def not_far(self, direction: Tensors) -> dict[str, Tensor]:
        """A direction, shortened where it is longer than the values themselves."""
        far, size = (
            math.sqrt(sum(float(tensor.detach().square().sum()) for tensor in tensors.values()))
            for tensors in (direction, self.values)
        )
        length = min(1.0, size / far) if far else 1.0
        return {name: length * along for name, along in direction.items()}


def _factors_at(loss: Loss, start: LowRankEdit, scale: float) -> tuple[_Line, dict[str, Tensor]]:
    """The loss as B changes, half way to the start, and the direction to go in."""
    line = _line(
        lambda factors: loss(LowRankEdit(start.bases, factors)),
        {name: b.detach() / 2 for name, b in start.factors.items()},
        scale,
    )
    fresh = _fresh(start)
    direction = {name: b.detach() for name, b in start.factors.items()}
    return line, line.not_steep({**direction, **line.falling(fresh)})


def _bases_at(loss: Loss, start: LowRankEdit, scale: float) -> tuple[_Line, dict[str, Tensor]]:
    """The same as R changes. Where B is nothing R is of no effect: that B is moved first."""
    factors, fresh = {name: b.detach() / 2 for name, b in start.factors.items()}, _fresh(start)
    if fresh:
        line, _ = _factors_at(loss, start, scale)
        factors |= {name: along / 8 for name, along in line.falling(fresh).items()}
    line = _line(
        lambda bases: loss(LowRankEdit(bases, factors)),
        {name: basis.detach().clone() for name, basis in start.bases.items()},
        scale,
    )
    return line, line.not_far(line.falling(list(start.bases)))


def _fresh(start: LowRankEdit) -> list[str]:
    """The matrices that start from nothing."""
    return [name for name, b in start.factors.items() if not b.any()]


def _line(at: Callable[[Tensors], Tensor], values: Tensors, scale: float) -> _Line:
    values = {name: value.requires_grad_() for name, value in values.items()}
    loss = at(values)
    _backward(loss * scale)
    gradients = {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in values.items()}
    if scale > 1 and not all(gradient.isfinite().all() for gradient in gradients.values()):
        return _line(at, {n: v.detach() for n, v in values.items()}, smaller_scale(scale))
    gradients = {name: gradient / scale for name, gradient in gradients.items()}
    return _Line(at, values, gradients, float(loss.detach()))


def _apart_of(
    line_at: Callable[[Loss, LowRankEdit, float], tuple[_Line, dict[str, Tensor]]],
    losses: Sequence[Loss],
    start: LowRankEdit,
    dtype: torch.dtype,
    scale: float,
) -> float:
    """How far apart the derivatives of B, or of R, are; the first loss that is believed decides.

    Raises:
        GradientError: too far.
    """
    rounding = torch.finfo(dtype).eps
    found: list[_Comparison] = []
    for loss in losses:
        line, direction = line_at(loss, start, scale)
        _refuse_silent(line, direction, rounding)
        found.append(_compare(line, direction, rounding))
        if found[-1].doubt > BELIEVED:  # not steep enough: as steep as can be
            steepest = line.falling(list(line.values))
            found.append(_compare(line, steepest, rounding))
        off, doubt = _together(found)
        if doubt <= BELIEVED:
            break
    apart = _apart(1.0, 1.0 + off)
    # What is never believed is judged in its favour: a right gradient must not be refused.
    if apart > MOST_APART + (doubt if doubt > BELIEVED else 0.0):
        slope = min(found, key=lambda one: one.doubt).slope
        raise GradientError(
            f"The model's gradient is wrong: along a test direction it gives {slope:.4g}, while "
            f"the loss itself changes by {slope * (1 + off):.4g} ({apart:.1%} apart, at most "
            f"{MOST_APART:.1%} is allowed). Training would learn the wrong thing, so nothing was "
            "trained. Some layer of this model or of a node upstream of it can't be trained "
            "through: take such nodes away or, in the hard form, use the preset 'instant', which "
            "needs no gradient."
        )
    return apart


@dataclass(frozen=True)
class _Comparison:
    """A derivative by the gradient, and what differences say about it.

    Attributes:
        slope: by the gradient.
        off: how much more it is by differences, relative to the slope.
        doubt: how far that may be wrong, likewise.
    """

    slope: float
    off: float
    doubt: float

    @classmethod
    def of(cls, slope: float, difference: float, doubt: float) -> _Comparison:
        """A comparison with a difference that may be wrong by ``doubt``.

        Raises:
            GradientError: one is NaN or infinite.
        """
        _apart(slope, difference)
        if not slope:
            return cls(slope, 0.0 if abs(difference) <= doubt else 1 / SLIGHTEST, SLIGHTEST)
        return cls(slope, difference / slope - 1, max(SLIGHTEST, doubt / abs(slope)))

    @property
    def apart(self) -> float:
        """The distance of the two, relative to the larger."""
        return _apart(1.0, 1.0 + self.off)


def _together(found: Sequence[_Comparison]) -> tuple[float, float]:
    """How far a gradient is off by all comparisons, and the doubt: a mean weighted by variances."""
    weights = [1 / one.doubt**2 for one in found]
    off = sum(w * one.off for w, one in zip(weights, found, strict=True)) / sum(weights)
    return off, sum(weights) ** -0.5


def _by_small_steps(line: _Line, direction: Tensors, slope: float) -> _Comparison | None:
    """The comparison by steps as single precision allows them; None where they don't decide."""
    larger = None
    for shrunken in range(SMALLER):
        step = SMALL_STEP / SHRINK**shrunken
        found = _Comparison.of(slope, line.difference(direction, step), 0.0)
        if larger is None:
            if found.apart <= MOST_APART:
                return found
        elif abs(found.off - larger.off) <= SURE and not _rounded_away(line, slope, step):
            # The loss is straight there, and the gradient another. In doubt it may just as well be
            # that the loss is rounded to the same at both ends of both steps.
            return larger
        # Curvature falls with the step's square: a smaller one is believed where that explains
        # what was before, else rounding may have brought the two together.
        elif found.apart <= SURE and (shrunken == 1 or abs(larger.off) > SHRINK**2 * SURE):
            return found
        larger = found
    return None


def _rounded_away(line: _Line, slope: float, step: float) -> bool:
    """Whether rounding may hide what the loss should change by within a step."""
    return SINGLE_ROUNDED * abs(line.value) / step > SURE * abs(slope)


def _compare(line: _Line, direction: Tensors, rounding: float) -> _Comparison:
    """The derivative along a direction, by the gradient and by differences of the loss."""
    slope = line.slope(direction)
    if abs(line.value) <= GONE:
        return _Comparison(slope, 0.0, 1.0)
    if rounding < SINGLE:
        found = _by_small_steps(line, direction, slope)
        if found is not None:
            return found
        rounding = SINGLE_ROUNDED
    step = max(LARGE_STEP, STEPS_OF_PRECISION * rounding)
    before, tried = line.difference(direction, step), []
    for _ in range(TRIES):
        after = line.difference(direction, step / 2)
        doubt = abs(after - before) + rounding * abs(line.value) / (2 * step)
        tried.append(_Comparison.of(slope, after + (after - before) / 3, doubt))
        if tried[-1].doubt <= BELIEVED:
            break
        step, before = step / 2, after
    clearest = min(tried, key=lambda one: one.doubt)
    if clearest.apart <= MOST_APART:
        return clearest
    # A loss that has levelled off at both steps shows no bend between them. Where a far smaller
    # step comes nearer to the gradient than rounding can bring it, it is the steps that are wrong.
    step /= SHRINK**2
    doubt = rounding * abs(line.value) / step
    near = _Comparison.of(slope, line.difference(direction, step), doubt)
    nearer = abs(clearest.off) - abs(near.off) - near.doubt
    return _Comparison(slope, clearest.off, max(clearest.doubt, nearer))


def _refuse_silent(line: _Line, direction: Tensors, rounding: float) -> None:
    silent = [name for name, gradient in line.gradients.items() if not gradient.any()]
    if silent:
        nudge = max(SMALLEST_NUDGE, rounding ** (1 / 3) / 2)
        slope = line.difference(_only(silent, direction), nudge)
        _refuse_if_it_matters(silent, slope, rounding**0.5)


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


def _only(names: list[str], direction: Tensors) -> dict[str, Tensor]:
    """A direction for these matrices alone: their own, or a random one where it is nothing."""
    generator = torch.Generator().manual_seed(0)
    alone = {}
    for name, along in direction.items():
        alone[name] = torch.zeros_like(along)
        if name in names:
            noise = torch.randn(along.shape, generator=generator).to(along)
            alone[name] = along if along.any() else noise / noise.norm()
    return alone
