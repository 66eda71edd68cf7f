"""The pool: frozen sampling trajectories with every teacher score that training needs.

Each sampler step evaluates the batch ``[0, e, a]`` at one latent. That gives the guidance for the
sampler and, at the same price, ``g*(e)`` and ``g*(a)`` at this very state. ESD and its kin throw
all states but one away and then compute the scores again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Denoiser, stack_tokens
from .guidance import guidance_term


class PredictionError(RuntimeError):
    """The model's predictions can't be used."""


@dataclass(frozen=True)
class EncodedPair:
    """Token embeddings (tokens, width) of a prompt with the concept and of its alternative."""

    erased: Tensor
    alternative: Tensor


@dataclass(frozen=True)
class States:
    """Noisy latents and the frozen scores at them, all on the CPU.

    Attributes:
        x: (n, c, h, w) latents in the model's scale.
        sigma: (n,) noise levels.
        x0_null: (n, c, h, w) frozen prediction under the null prompt.
        g_erased: (n, c, h, w) frozen guidance term of the prompt with the concept.
        g_alternative: (n, c, h, w) frozen guidance term of its alternative.
        pair: (n,) which prompt pair drove or accompanied the trajectory.
    """

    x: Tensor
    sigma: Tensor
    x0_null: Tensor
    g_erased: Tensor
    g_alternative: Tensor
    pair: Tensor

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, index: Tensor | slice) -> States:
        return States(**{name: getattr(self, name)[index] for name in self.__dataclass_fields__})

    @staticmethod
    def join(parts: Sequence[States]) -> States:
        """All states of the parts, in order."""
        names = States.__dataclass_fields__
        return States(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})


@dataclass(frozen=True)
class Sampling:
    """How trajectories are sampled.

    Attributes:
        sigmas: (steps + 1,) falling noise levels, the last one 0.
        guidance_scale: w of ``eps(0) + w g``.
    """

    sigmas: Tensor
    guidance_scale: float


def sample_states(
    denoiser: Denoiser,
    null: Tensor,
    pairs: Sequence[EncodedPair],
    chosen: Sequence[int],
    driven_by_erased: Sequence[bool],
    noise: Tensor,
    sampling: Sampling,
) -> Iterator[int]:
    """Sample trajectories side by side on the frozen model, keeping every state.

    A generator: yields the number of images evaluated after each sampler step, and returns the
    :class:`States`, ordered by step.

    Args:
        null: token embeddings of the null prompt.
        chosen: for each trajectory, the index of its prompt pair.
        driven_by_erased: for each trajectory, whether ``e`` (else ``a``) drives the sampler.
        noise: (trajectories, c, h, w) standard normal.

    Raises:
        PredictionError: a prediction is NaN or infinite.
    """
    count = len(chosen)
    prompts = [pairs[i].erased for i in chosen] + [pairs[i].alternative for i in chosen]
    tokens = stack_tokens([null] * count + prompts).to(denoiser.device)
    drives = torch.tensor(driven_by_erased, device=denoiser.device).view(-1, 1, 1, 1)
    x = denoiser.noisy_latent(noise.to(denoiser.device), sampling.sigmas[0])
    parts = []
    for sigma, sigma_next in zip(sampling.sigmas[:-1], sampling.sigmas[1:], strict=True):
        levels = sigma.repeat(count).to(denoiser.device)
        with torch.no_grad():
            x0 = denoiser.predict_x0(x.repeat(3, 1, 1, 1), levels.repeat(3), tokens)
        check_finite(x0, float(sigma))
        parts.append(states_at(x, levels, x0, chosen))
        x0_null, x0_erased, x0_alternative = x0.chunk(3)
        x0_prompt = torch.where(drives, x0_erased, x0_alternative)
        x = euler_step(x, x0_null, x0_prompt, sigma, sigma_next, sampling.guidance_scale)
        yield x0.shape[0]
    return States.join(parts)


def states_at(x: Tensor, sigma: Tensor, x0: Tensor, chosen: Sequence[int]) -> States:
    """States from one evaluation of the frozen model on the batch ``[0, e, a]``.

    Args:
        x: (n, c, h, w) latents.
        sigma: (n,) noise levels.
        x0: (3 n, c, h, w) predictions under the null prompt, then ``e``, then ``a``.
        chosen: prompt pair of each latent.
    """
    x0_null, x0_erased, x0_alternative = x0.chunk(3)
    return States(
        x=x.cpu(),
        sigma=sigma.cpu(),
        x0_null=x0_null.cpu(),
        g_erased=guidance_term(x0_null, x0_erased, sigma).cpu(),
        g_alternative=guidance_term(x0_null, x0_alternative, sigma).cpu(),
        pair=torch.tensor(chosen),
    )


def euler_step(
    x: Tensor,
    x0_null: Tensor,
    x0_prompt: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    guidance_scale: float,
) -> Tensor:
    """One step of Euler's method along ``dx/dsigma = (x - x0) / sigma`` with guided ``x0``."""
    x0 = x0_null + guidance_scale * (x0_prompt - x0_null)
    return x + (x - x0) / sigma * (sigma_next - sigma)


def check_finite(x0: Tensor, sigma: float) -> None:
    """Raise :class:`PredictionError` when a prediction holds NaN or infinity."""
    if not torch.isfinite(x0).all():
        raise PredictionError(
            f"The model's prediction at sigma {sigma:.3g} contains NaN or infinity, so nothing "
            "can be learned from it. Check that the checkpoint draws normal pictures; if it was "
            "loaded in fp16 or fp8, try loading it in bf16 or fp32."
        )
