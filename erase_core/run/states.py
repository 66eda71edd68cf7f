"""The pool: frozen sampling trajectories with every teacher score that training needs.

Each sampler step evaluates the batch ``[0, e, a]`` at one latent. That gives the guidance for the
sampler and, at the same price, ``g*(e)`` and ``g*(a)`` at this very state. ESD and its kin throw
all states but one away and then compute the scores again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method.encoded import EncodedPair
from ..method.guidance import guidance_term
from ..model.denoiser import Denoiser
from ..model.prompt import Encoded
from ..settings.settings import EraseSettings
from .given import Given
from .meter import PredictionError, TrainingError
from .plan import trajectory_counts


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
) -> States:
    """Sample trajectories side by side on the frozen model; every state of them, by step.

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


def sample_pairs(given: Given, count: int, stage: str) -> States:
    """States of the prompt pairs, from ``count`` trajectories.

    Args:
        stage: what to call it, in words.
    """
    shape = given.model.latent_shape(given.settings.resolution)
    driven_by = given.settings.driven_by
    return _sampled(
        given, draw_pairs(given.prompts.pairs, count, shape, given.random, driven_by), stage
    )


def sample_held_out(given: Given) -> States | None:
    """States to check on; None where nothing is sampled.

    Raises:
        TrainingError: the guidance of the concepts and their alternatives is the same.
        StopAsked: it is to stop.
    """
    if not given.settings.samples:
        return None
    _, checking = trajectory_counts(given.settings)
    states = _kept(
        given, "heldout", lambda: sample_pairs(given, checking, "Sampling states to check on")
    )
    _refuse_if_nothing_to_move(given.settings, states)
    return states


def sample_to_train_on(
    given: Given, sampled: States | None = None, per_concept: int | None = None
) -> States:
    """States to train on.

    Args:
        sampled: those among them that there are already.
        per_concept: from how many trajectories for each concept; None for all.
    """
    settings = given.settings
    most, _ = trajectory_counts(settings)
    if per_concept is not None:
        most = min(most, per_concept * len(settings.concepts))
    if sampled is not None:
        most -= len(sampled) // settings.sampling_steps
        if not most:
            return sampled

    def sample() -> States:
        more = sample_pairs(given, most, "Sampling states")
        return more if sampled is None else States.join([sampled, more])

    return _kept(given, "training" if per_concept is None else "trial", sample)


def sample_kept(given: Given) -> States | None:
    """States of what the soft form holds; None in the hard form."""
    kept = given.prompts.held
    if given.settings.form != "soft" or not kept:
        return None

    def sample() -> States:
        shape = given.model.latent_shape(given.settings.resolution)
        noise = torch.randn(len(kept), *shape, generator=given.random)
        wanted = Trajectories([[k] for k in kept], [0] * len(kept), range(len(kept)), noise)
        return _sampled(given, wanted, "Sampling states to keep")

    return _kept(given, "kept", sample)


def _kept(given: Given, name: str, sample: Callable[[], States]) -> States:
    """States that an earlier run has sampled, else what ``sample`` gives."""
    return States(**given.journal.tensors(name, lambda: vars(sample())))


def _sampled(given: Given, wanted: Trajectories, stage: str) -> States:
    settings, model = given.settings, given.model
    given.meter.say(stage)
    sampling = Sampling(model.sigmas(settings.sampling_steps).cpu(), settings.guidance_scale)
    with given.meter.stoppable():
        parts = [
            sample_states(
                model, given.prompts.null, wanted[start : start + settings.batch], sampling
            )
            for start in range(0, len(wanted), settings.batch)
        ]
    return States.join(parts)


def _refuse_if_nothing_to_move(settings: EraseSettings, states: States) -> None:
    distance = (states.g_erased - states.g_alternative).double().square().sum()
    if distance <= 1e-12 * states.g_erased.double().square().sum():
        raise TrainingError(
            f"The model already draws {settings.concepts[0].text!r} like its replacement: there is "
            "no guidance to change. Check the spelling, or name a different alternative."
        )


def balanced_states(states: States, pairs: Sequence[EncodedPair], wanted: int) -> States:
    """``wanted`` of the states, evenly over the concepts and each concept's noise levels.

    In order of falling noise.
    """
    concept = torch.tensor([pairs[i].concept for i in states.index.tolist()])
    groups = [(concept == c).nonzero().flatten() for c in concept.unique()]
    chosen = []
    for number, members in enumerate(groups):
        share = (number + 1) * wanted // len(groups) - number * wanted // len(groups)
        by_sigma = members[states.sigma[members].argsort(descending=True, stable=True)]
        chosen.append(by_sigma[middles(len(members), min(share, len(members)))])
    index = torch.cat(chosen)
    return states[index[states.sigma[index].argsort(descending=True, stable=True)]]


def middles(count: int, wanted: int) -> Tensor:
    """``wanted`` indices below ``count``, each in the middle of its share of the range.

    Not the ends: at the lowest noise level x0 is x but for rounding, and a drift taken there would
    be the rounding's.
    """
    return ((torch.arange(wanted) + 0.5) * count / wanted).long()
