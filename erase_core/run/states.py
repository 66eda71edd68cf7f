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

from ..method.guidance import guidance_term
from ..model.denoiser import Denoiser, Encoded


class PredictionError(RuntimeError):
    """The model's predictions can't be used."""


@dataclass(frozen=True)
class EncodedPair:
    """A prompt with the concept and its alternative.

    ``concept`` is the place of the concept in the settings.
    """

    erased: Encoded
    alternative: Encoded
    concept: int = 0


@dataclass(frozen=True)
class States:
    """Noisy latents and the frozen scores at them, all on the CPU.

    Attributes:
        x: (n, c, h, w) latents in the model's scale.
        sigma: (n,) noise levels.
        x0_null: (n, c, h, w) frozen prediction under the null prompt.
        guidance: (n, m, c, h, w) frozen guidance terms of the m prompts that went along: ``e`` and
            ``a`` of a prompt pair, or a keep prompt alone.
        index: (n,) which prompt pair, or which keep prompt.
    """

    x: Tensor
    sigma: Tensor
    x0_null: Tensor
    guidance: Tensor
    index: Tensor

    @property
    def g_erased(self) -> Tensor:
        """Frozen guidance term of the prompt with the concept, (n, c, h, w)."""
        return self.guidance[:, 0]

    @property
    def g_alternative(self) -> Tensor:
        """Frozen guidance term of its alternative, (n, c, h, w)."""
        return self.guidance[:, 1]

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


@dataclass(frozen=True)
class Trajectories:
    """What to sample side by side.

    Attributes:
        prompts: for each trajectory, the prompts evaluated along it; as many for each.
        driver: for each trajectory, which of them drives the sampler.
        index: for each trajectory, which prompt pair or keep prompt it is for.
        noise: (trajectories, c, h, w) standard normal.
    """

    prompts: Sequence[Sequence[Encoded]]
    driver: Sequence[int]
    index: Sequence[int]
    noise: Tensor

    def __getitem__(self, part: slice) -> Trajectories:
        return Trajectories(
            self.prompts[part], self.driver[part], self.index[part], self.noise[part]
        )

    def __len__(self) -> int:
        return len(self.index)


def draw_pairs(
    pairs: Sequence[EncodedPair],
    count: int,
    shape: Sequence[int],
    generator: torch.Generator,
    driven_by: str = "both",
) -> Trajectories:
    """Trajectories of prompt pairs, driven by ``e``, by ``a``, or half by each.

    The concepts take turns, and each pair of a concept comes once before any comes again.

    Args:
        shape: (c, h, w) of a latent.
        driven_by: one of :data:`settings.DRIVERS`.
    """
    concepts = max(pair.concept for pair in pairs) + 1
    members = [[i for i, p in enumerate(pairs) if p.concept == c] for c in range(concepts)]
    waiting: list[list[int]] = [[] for _ in members]
    chosen = []
    for turn in range(count):
        own, left = members[turn % concepts], waiting[turn % concepts]
        if not left:
            left += [own[i] for i in torch.randperm(len(own), generator=generator).tolist()]
        chosen.append(left.pop(0))
    roles = {"erased": [0], "alternative": [1], "both": [0, 1]}[driven_by]
    driver = [roles[turn // concepts % len(roles)] for turn in range(count)]
    noise = torch.randn(count, *shape, generator=generator)
    prompts = [(pairs[i].erased, pairs[i].alternative) for i in chosen]
    return Trajectories(prompts, driver, chosen, noise)


def sample_states(
    denoiser: Denoiser, null: Encoded, wanted: Trajectories, sampling: Sampling
) -> Iterator[int]:
    """Sample trajectories side by side on the frozen model, keeping every state.

    A generator: yields the number of images evaluated after each sampler step, and returns the
    :class:`States`, ordered by step.

    Args:
        null: the null prompt.

    Raises:
        PredictionError: a prediction is NaN or infinite.
    """
    count, along = len(wanted), len(wanted.prompts[0])
    by_role = [prompts[role] for role in range(along) for prompts in wanted.prompts]
    prompts = [null] * count + by_role
    driver = torch.tensor(wanted.driver, device=denoiser.device)
    lane = torch.arange(count, device=denoiser.device)
    x = denoiser.noisy_latent(wanted.noise.to(denoiser.device), sampling.sigmas[0])
    parts = []
    for sigma, sigma_next in zip(sampling.sigmas[:-1], sampling.sigmas[1:], strict=True):
        levels = sigma.repeat(count).to(denoiser.device)
        with torch.no_grad():
            x0 = denoiser.predict_x0(
                x.repeat(1 + along, 1, 1, 1), levels.repeat(1 + along), prompts
            )
        check_finite(x0, float(sigma))
        parts.append(states_at(x, levels, x0, wanted.index))
        x0 = x0.unflatten(0, (1 + along, count))
        x = euler_step(x, x0[0], x0[1 + driver, lane], sigma, sigma_next, sampling.guidance_scale)
        yield x0.shape[0] * count
    return States.join(parts)


def states_at(x: Tensor, sigma: Tensor, x0: Tensor, index: Sequence[int]) -> States:
    """States from one evaluation of the frozen model on the batch ``[0, ...]``.

    Args:
        x: (n, c, h, w) latents.
        sigma: (n,) noise levels.
        x0: (n + m n, c, h, w) predictions under the null prompt, then under the m prompts that
            went along, role by role.
        index: prompt pair or keep prompt of each latent.
    """
    x0_null, *along = x0.chunk(x0.shape[0] // x.shape[0])
    guidance = [guidance_term(x0_null, x0_prompt, sigma) for x0_prompt in along]
    return States(
        x=x.cpu(),
        sigma=sigma.cpu(),
        x0_null=x0_null.cpu(),
        guidance=torch.stack(guidance, dim=1).cpu(),
        index=torch.tensor(index),
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
