"""From a picture back to the noise that gives it, and which part of it shows a concept.

A deterministic sampler, Euler's on the probability flow, which is DDIM, goes from ``x`` at noise
level ``s`` to ``y`` at the lower level ``t`` by

    y = x + (t - s) d(x, s)        with        d(x, s) = (x - x0(x, s)) / s

whatever the network predicts: ``d`` is eps for eps- and v-models, the velocity for flows. DDIM
inversion (Song et al. 2021) turns that around with ``d`` taken at ``y``, which is wrong by as much
as ``d`` changes over a step. What is wanted solves ``x = y + (s - t) d(x, s)``, and is found by
inserting the guess again (fixed point: Pan et al. 2023, arXiv 2309.04907; Garibi et al. 2024, arXiv
2403.14602). Then the sampler leads back to the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Relative change between two guesses at which a step counts as inverted: some 60 dB on our models.
TOLERANCE = 1e-3
MOST_GUESSES = 10  # four or five are enough on our models
# Share of the strongest evidence from which on a place shows the concept.
THRESHOLD = 0.2
# The strongest evidence must be that part of the mean error that is left; else nothing is seen. On
# the emoji it was 1.1 at least in twelve pictures with the concept, .2 at most in fifteen without.
FAINTEST = 0.4
STRONGEST = 0.98  # quantile of the evidence that counts as its strongest
# The shorter side is that many times as long as what evidence is averaged over, in each direction.
NEIGHBOURHOOD = 16

# x0 at latents (n, c, h, w) of one noise level.
Predict = Callable[[Tensor, float], Tensor]


def euler_step(x: Tensor, sigma: float, after: float, x0: Tensor) -> Tensor:
    """One step of the sampler from a noise level to another, in either direction."""
    return x + (after - sigma) / sigma * (x - x0)


def sampled(x: Tensor, sigmas: Sequence[float], predict: Predict) -> Tensor:
    """What the sampler leads to from ``x`` (n, c, h, w) at the first of falling noise levels."""
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = euler_step(x, sigma, after, predict(x, sigma))
    return x


def inverted(
    picture: Tensor,
    sigmas: Sequence[float],
    predict: Predict,
    guesses: int = MOST_GUESSES,
    tolerance: float = TOLERANCE,
) -> list[Tensor]:
    """The way from noise to a picture: latents (n, c, h, w) at each of falling noise levels.

    The last is the picture itself. Nothing in it is random.

    Args:
        picture: latents (n, c, h, w).
        sigmas: falling noise levels, the last one 0.
        predict: the model under the prompt that the way is for.
        guesses: at most, for each step; 1 is plain DDIM inversion.
        tolerance: relative change between guesses at which the next step is taken.
    """
    way = [picture]
    for sigma, after in reversed(list(zip(sigmas[:-1], sigmas[1:], strict=True))):
        way.append(_before(way[-1], sigma, after, predict, guesses, tolerance))
    return way[::-1]


def _before(
    y: Tensor, sigma: float, after: float, predict: Predict, guesses: int, tolerance: float
) -> Tensor:
    """The latent from which one step of the sampler leads to ``y``."""
    guess, change = y, float("inf")
    for _ in range(guesses):
        better = y + (sigma - after) / sigma * (guess - predict(guess, sigma))
        changed = _largest(better - guess) / _largest(better)
        if changed >= change:
            break  # it leads away from here: the step is too long for the model
        guess, change = better, changed
        if change < tolerance:
            break
    return guess


def _largest(x: Tensor) -> float:
    return max(float(x.flatten(1).norm(dim=1).max()), 1e-12)


def evidence(picture: Tensor, told: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How much better a picture is explained with the concept than without, (n, h, w).

    A denoiser that is told what is on a picture finds it again under more noise; which text helps
    most names the picture (Li et al. 2023, arXiv 2303.16203), and where it helps is where that is.
    It has to help more than any other: beside a cat's replacement alone a car may look like a cat.

    Args:
        picture: latents (n, c, h, w).
        told: what the untouched model, told the concept, takes a noisy version of the picture for.
        others: the same of the erased model, which no longer knows it, and of no prompt at all.

    Returns:
        The evidence, and the squared error that is left with the concept.
    """
    radius = max(1, min(picture.shape[-2:]) // NEIGHBOURHOOD)

    def error(x0: Tensor) -> Tensor:
        squared = (picture - x0).square().mean(1, keepdim=True)
        return F.avg_pool2d(squared, 2 * radius + 1, 1, radius, count_include_pad=False)[:, 0]

    own = error(told)
    return torch.stack([error(other) for other in others]).amin(0) - own, own


def places(found: Tensor, left: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Where a concept is, 1 or 0, (n, 1, h, w); all 0 where nothing speaks for it.

    Args:
        found: evidence (n, h, w).
        left: the error that is left, likewise.
        threshold: share of the strongest evidence from which on a place counts.
    """
    radius = max(1, min(found.shape[-2:]) // NEIGHBOURHOOD)
    strongest = found.flatten(1).quantile(STRONGEST, dim=1).view(-1, 1, 1)
    seen = strongest > FAINTEST * left.mean((1, 2)).view(-1, 1, 1)
    marked = (found > threshold * strongest) & seen
    return F.max_pool2d(marked.float()[:, None], 2 * radius + 1, 1, radius)


def psnr(picture: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two pictures with values from 0 to 1; inf if equal."""
    error = (picture.double() - other.double()).square().mean()
    return float("inf") if error == 0 else float(-10 * torch.log10(error))
