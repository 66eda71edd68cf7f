"""The guidance term, its surgical target and the losses. Pure functions of predictions.

Notation of docs/method.md: ``x`` a noisy latent, ``c`` a prompt, ``0`` the null prompt, ``e`` a
prompt with the concept, ``a`` its alternative, ``*`` the untouched model, ``theta`` the edited one.
A sampler uses ``eps(x,0) + w g(c)`` with the guidance term ``g(c) = eps(x,c) - eps(x,0)``. All But
One (Hong, Lee, Woo, AAAI 2024) changes ``g(e)`` only and holds ``eps(x,0)``; the exact form of its
losses is not public, ours is stated at :func:`surgery_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..settings.settings import NULL_SCORES, WEIGHTINGS

SIGMA_FLOOR = 0.02


@dataclass(frozen=True)
class Movement:
    """How far the guidance term of the erased prompts went, 1 being all the way.

    Attributes:
        overall: over all states.
        concepts: over the states of each concept.
        high, middle, low: over the third of the states with the highest noise, and so on.
        erased_change: ``|eps_th(e) - eps*(e)| / |eps*(e)|``, the yardstick for every drift.
    """

    overall: float
    concepts: list[float]
    high: float
    middle: float
    low: float
    erased_change: float


def guidance_term(x0_null: Tensor, x0_prompt: Tensor, sigma: Tensor) -> Tensor:
    """``g(c) = eps(x,c) - eps(x,0)`` from two x0 predictions at the same latent.

    ``eps = (x - x0) / sigma``, so the difference is formed first and ``x`` cancels. For flow
    models the same quotient is the velocity.

    Args:
        x0_null, x0_prompt: (n, c, h, w).
        sigma: (n,) noise levels, clamped at 0.02 against the rounding of nearly equal x0.
    """
    return (x0_null - x0_prompt) / _per_image(sigma.clamp(min=SIGMA_FLOOR), x0_null)


def surgical_target(g_erased: Tensor, g_alternative: Tensor, eta: float = 0.0) -> Tensor:
    """``G = g*(a) + eta (g*(a) - g*(e))``, what the guidance term of ``e`` must become.

    ``eta = 0`` is replacement; with ``a`` the null prompt, ``eta > 0`` is ESD's negative guidance.
    A sampler given ``e`` as *negative* prompt then moves towards it, ``+(w - 1) eta g*(e)``:
    with eta > 0 a negative prompt that names the concept draws it.
    """
    if eta == 0.0:
        return g_alternative
    return g_alternative + eta * (g_alternative - g_erased)


def weighted_error(difference: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over the batch of ``w |difference|^2`` per element; weight (n,) or None for 1."""
    squared = difference.square().flatten(1).mean(dim=1)
    return (squared if weight is None else squared * weight).mean()


class SigmaWeight:
    """``w(sigma)`` of the loss, which acts on ``g = eps(x,c) - eps(x,0)``.

    "output" takes the error of what the network itself puts out, "image" that of the predicted
    x0, ``w = sigma^2``, and "relative" every noise level alike, each against what is to move.

    Args:
        kind: one of :data:`settings.WEIGHTINGS`.
        sigma: (n,) noise levels of the states that are trained on.
        differences: ``g*(e) - G`` at these states, (n, c, h, w).
        of_output: what a squared difference of eps counts in the network's own terms.
    """

    def __init__(
        self,
        kind: str,
        sigma: Tensor,
        differences: Tensor,
        of_output: Callable[[Tensor], Tensor],
    ) -> None:
        if kind not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, not {kind!r}.")
        self._kind, self._of_output = kind, of_output
        self._levels, place = sigma.float().cpu().unique(return_inverse=True)
        squared = differences.square().flatten(1).mean(dim=1).cpu()
        total = squared.new_zeros(len(self._levels)).index_add_(0, place, squared)
        self._distances = total / place.bincount()

    def __call__(self, sigma: Tensor) -> Tensor:
        """The weights at noise levels (n,), on their device."""
        if self._kind == "output":
            return self._of_output(sigma).to(sigma.device)
        if self._kind == "image":
            return sigma.clamp(min=SIGMA_FLOOR).square()
        nearest = (sigma.cpu()[:, None] - self._levels).abs().argmin(dim=1)
        floor = 1e-6 * self._distances.max()
        return (1 / self._distances.clamp(min=floor))[nearest].to(sigma.device)


def surgery_loss(
    guidance: Tensor,
    target: Tensor,
    *,
    drift: Tensor | None = None,
    drift_weight: float = 0.0,
    kept_drifts: Sequence[Tensor] = (),
    keep_weight: float = 0.0,
    null_score: str = "frozen",
    weight: Tensor | None = None,
    kept_weight: Tensor | None = None,
) -> Tensor:
    """The loss of the edit: move the guidance term of ``e``, hold everything that must stay.

    ``w ( |eps_th(e) - eps_0 - G|^2 + lambda |eps_th(0) - eps*(0)|^2
    + mu sum_k |eps_th(k) - eps*(k)|^2 )``

    ``eps_0`` is the frozen unconditional score by default, so that the first term can't be
    lowered by moving the unconditional score. In the hard form ``eps_th(0) = eps*(0)`` holds by
    construction: no drift term, no keep term, and all three choices of ``null_score`` coincide.

    Every argument is a difference from a frozen score, in which ``x`` has cancelled:

    Args:
        guidance: ``eps_theta(x, e) - eps*(x, 0)``, (n, c, h, w).
        target: ``G``, same shape.
        drift: ``eps_theta(x, 0) - eps*(x, 0)``, same shape.
        drift_weight: lambda.
        kept_drifts: ``eps_theta(x, k) - eps*(x, k)`` of each kept prompt.
        keep_weight: mu.
        null_score: which ``eps_0`` stands in the first term: "frozen", "student" or "detached".
        weight: w(sigma), (n,); None for 1.
        kept_weight: w(sigma) at the states of the kept prompts, likewise.

    Raises:
        ValueError: an unknown ``null_score``, or a term without the drift that it needs.
    """
    if null_score not in NULL_SCORES:
        raise ValueError(f"null_score must be one of {NULL_SCORES}, not {null_score!r}.")
    if drift is None and (drift_weight or null_score != "frozen"):
        raise ValueError("The drift term and a student's null score need the drift.")
    if drift is not None and null_score != "frozen":
        guidance = guidance - (drift if null_score == "student" else drift.detach())
    loss = weighted_error(guidance - target, weight)
    if drift is not None and drift_weight:
        loss = loss + drift_weight * weighted_error(drift, weight)
    if keep_weight:
        for kept in kept_drifts:
            loss = loss + keep_weight * weighted_error(kept, kept_weight)
    return loss


def moved(
    g_student: Tensor, g_original: Tensor, target: Tensor, weight: Tensor | None = None
) -> float:
    """How far the guidance went: ``1 - sum w |g_th - G|^2 / sum w |g* - G|^2``; 1 is all the way.

    Returns 0 when there was nowhere to go.

    Args:
        weight: w(sigma), (n,); None for 1.
    """

    def squared(difference: Tensor) -> Tensor:
        each = difference.double().square()
        return (each if weight is None else each * _per_image(weight, each)).sum()

    distance = squared(g_original - target)
    if distance == 0:
        return 0.0
    return float(1 - squared(g_student - target) / distance)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(device=like.device, dtype=torch.float32)
