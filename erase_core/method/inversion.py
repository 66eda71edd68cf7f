"""From a picture back to the noise that gives it, and which part of it shows a concept.

A deterministic sampler, Euler's on the probability flow, which is DDIM, goes from ``x`` at noise
level ``s`` to ``y`` at the lower level ``t`` by

    y = x + (t - s) d(x, s)        with        d(x, s) = (x - x0(x, s)) / s

whatever the network predicts: ``d`` is eps for eps- and v-models, the velocity for flows. DDIM
inversion (Song et al. 2021) turns that around with ``d`` taken at ``y``, which is wrong by as much
as ``d`` changes over a step. What is wanted solves ``x = y + (s - t) d(x, s)``, and is found by
inserting the guess again (fixed point: Pan et al. 2023, arXiv 2309.04907, who mix guesses, too;
Garibi et al. 2024, arXiv 2403.14602). Then the sampler leads back to the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Relative change between two guesses at which a step counts as inverted: some 60 dB on our models.
TOLERANCE = 1e-3
MOST_GUESSES = 20  # four or five are enough for most steps on our models
# Guesses before the last that are mixed with it, and how far that is drawn towards the last alone:
# with three as with ten, pictures came back at 66 dB that gave 15 without.
REMEMBERED, RIDGE = 4, 1e-8
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
    """The latent from which one step of the sampler leads to ``y``.

    Where inserting a guess again leads away from what is wanted, as it does on some pictures that
    the model finds unlikely, the guesses so far say in which direction that is.
    """
    guess, best, least = y, y, float("inf")
    tried: list[tuple[Tensor, Tensor]] = []  # what the latest guesses led to, and how far off
    for _ in range(guesses):
        led = y + (sigma - after) / sigma * (guess - predict(guess, sigma))
        change = _largest(led - guess) / _largest(led)
        if change < least:
            best, least = led, change
        if least < tolerance:
            break
        tried = [*tried[-REMEMBERED:], (led, led - guess)]
        guess = _mixed(tried)
    return best


def _mixed(tried: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The next guess by Anderson's mixing (1965), of each picture by itself.

    It is the combination of what was tried that would be off least, were all of it linear.
    """
    led, off = (torch.stack(one).flatten(2).transpose(0, 1) for one in zip(*tried, strict=True))
    if off.shape[1] == 1:
        return tried[-1][0]
    led_steps, off_steps = led.diff(dim=1), off.diff(dim=1)  # (n, guesses - 1, numbers)
    among = (off_steps @ off_steps.mT).cpu().double()
    wanted = (off_steps @ off[:, -1:].mT).cpu().double()
    scale = among.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30).view(-1, 1, 1)
    among = among + RIDGE * scale * torch.eye(among.shape[-1], dtype=among.dtype)
    shares = torch.linalg.solve(among, wanted).to(led)
    return (led[:, -1] - (led_steps * shares).sum(1)).view_as(tried[-1][0])


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
