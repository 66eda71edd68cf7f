"""The numbers of the report: how far the guidance moved, and what else moved with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method.guidance import guidance_term, moved, surgical_target, weighted_error
from ..model.activations import BlockRun
from ..model.denoiser import Denoiser, Encoded, LowRankEdit
from ..model.memory import ADVICE, out_of_memory
from .states import (
    EncodedPair,
    PredictionError,
    Sampling,
    States,
    Trajectories,
    check_finite,
    euler_step,
    states_at,
)

PLAIN_GRADIENT = 3  # forward-equivalents of a forward with its backward


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


class CountedDenoiser:
    """A denoiser that counts what it is asked for, in forward-equivalents per image.

    A prediction is 1; one whose gradient is wanted is 3, since a backward costs two forwards, or
    what the way its blocks are run costs (:class:`activations.BlockRun`). What doesn't fit the
    device's memory is predicted in smaller parts, unless its gradient is wanted: then it is the
    caller that must ask for less.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._most: int | None = None  # images at a time, once memory has run out
        self._with_gradient = PLAIN_GRADIENT
        self.forward_equivalents = 0

    def __getattr__(self, name: str):
        return getattr(self._denoiser, name)

    @contextmanager
    def around_blocks(self, run: BlockRun) -> Iterator[None]:
        """As the denoiser's own, and counted for what it costs."""
        before, self._with_gradient = self._with_gradient, run.forward_equivalents
        try:
            with self._denoiser.around_blocks(run):
                yield
        finally:
            self._with_gradient = before

    def predict_x0(
        self,
        x: Tensor,
        sigma: Tensor,
        prompts: Sequence[Encoded],
        edit: LowRankEdit | None = None,
    ) -> Tensor:
        """As the denoiser's own, and counted.

        Raises:
            PredictionError: there isn't memory for a single image.
        """
        if edit is not None and torch.is_grad_enabled():
            self.forward_equivalents += self._with_gradient * len(x)
            return self._denoiser.predict_x0(x, sigma, prompts, edit)
        self.forward_equivalents += len(x)
        while True:
            most = min(len(x), self._most or len(x))
            try:
                parts = [
                    self._denoiser.predict_x0(
                        x[i : i + most], sigma[i : i + most], prompts[i : i + most], edit
                    )
                    for i in range(0, len(x), most)
                ]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if most == 1:
                    raise PredictionError(ADVICE.format(task="predict")) from error
            self._most = (most + 1) // 2


def movement_on(
    denoiser: Denoiser,
    pairs: Sequence[EncodedPair],
    states: States,
    edit: LowRankEdit,
    eta: float,
    batch: int,
) -> Iterator[int]:
    """Evaluate the edited model on frozen states (a generator; returns a :class:`Movement`)."""
    students = []
    for part in torch.arange(len(states)).split(batch):
        prompts = [pairs[i].erased for i in states.index[part].tolist()]
        x0 = _predict(denoiser, states.x[part], states.sigma[part], prompts, edit)
        check_finite(x0, float(states.sigma[part].min()))
        students.append(guidance_term(states.x0_null[part], x0, states.sigma[part]))
        yield len(part)
    return summarise(torch.cat(students), states, pairs, eta, denoiser.loss_weight(states.sigma))


def movement_sampled(
    denoiser: Denoiser,
    null: Encoded,
    pairs: Sequence[EncodedPair],
    wanted: Trajectories,
    sampling: Sampling,
    edit: LowRankEdit,
    eta: float,
    null_is_exact: bool = True,
) -> Iterator[int]:
    """Sample with the edited model and see how far its guidance moved where *it* goes.

    A generator; yields images evaluated, returns a :class:`Movement`.

    Args:
        wanted: trajectories of prompt pairs; the prompt with the concept drives them all.
        null_is_exact: whether the edited model's null score is the original's, as in the hard
            form, so that one evaluation serves both.
    """
    count = len(wanted)
    erased = [pairs[i].erased for i in wanted.index]
    frozen_prompts = [null] * count + erased + [pairs[i].alternative for i in wanted.index]
    edited_prompts = erased if null_is_exact else [*erased, *[null] * count]
    x = denoiser.noisy_latent(wanted.noise.to(denoiser.device), sampling.sigmas[0]).cpu()
    parts, students = [], []
    for sigma, sigma_next in zip(sampling.sigmas[:-1], sampling.sigmas[1:], strict=True):
        levels = sigma.repeat(count).cpu()
        frozen = _predict(denoiser, x.repeat(3, 1, 1, 1), levels.repeat(3), frozen_prompts)
        again = len(edited_prompts) // count
        edited = _predict(
            denoiser, x.repeat(again, 1, 1, 1), levels.repeat(again), edited_prompts, edit
        )
        check_finite(edited, float(sigma))
        states = states_at(x, levels, frozen, wanted.index)
        student, *own_null = edited.chunk(again)
        students.append(guidance_term(states.x0_null, student, levels))
        parts.append(states)
        x0_null = own_null[0] if own_null else states.x0_null
        x = euler_step(x, x0_null, student, sigma, sigma_next, sampling.guidance_scale)
        yield (3 + again) * count
    states = States.join(parts)
    weight = denoiser.loss_weight(states.sigma)
    return summarise(torch.cat(students), states, pairs, eta, weight)


def summarise(
    student: Tensor, states: States, pairs: Sequence[EncodedPair], eta: float, weight: Tensor
) -> Movement:
    """:class:`Movement` of the student's guidance (n, c, h, w) at the states; weight (n,)."""
    target = surgical_target(states.g_erased, states.g_alternative, eta)

    def on(part: Tensor) -> float:
        return moved(student[part], states.g_erased[part], target[part], weight[part])

    concept = torch.tensor([pairs[i].concept for i in states.index.tolist()])
    by_sigma = states.sigma.argsort(descending=True, stable=True)
    eps_erased = (states.x - states.x0_null) / states.sigma.view(-1, 1, 1, 1) + states.g_erased
    change = (student - states.g_erased).norm() / eps_erased.norm()
    return Movement(
        on(by_sigma),
        [on((concept == c).nonzero().flatten()) for c in range(int(concept.max()) + 1)],
        *(on(part) for part in by_sigma.tensor_split(3)),
        float(change),
    )


def prompt_drift(
    denoiser: Denoiser,
    prompts: Sequence[Encoded],
    states: States,
    edit: LowRankEdit,
    batch: int,
) -> Iterator[int]:
    """Relative change of the prediction, ``|eps_th - eps*| / |eps*|``, of each prompt.

    Prompt i is tried at state i. A generator; yields images evaluated, returns a list with one
    figure a prompt.
    """
    changes: list[float] = []
    for start in range(0, len(prompts), batch):
        part = torch.arange(start, min(start + batch, len(prompts)))
        x, sigma, asked = states.x[part], states.sigma[part], [prompts[i] for i in part.tolist()]
        frozen = _predict(denoiser, x, sigma, asked)
        edited = _predict(denoiser, x, sigma, asked, edit)
        # eps = (x - x0) / sigma on both sides: the noise level cancels.
        size = (x - frozen).flatten(1).norm(dim=1)
        changes += ((edited - frozen).flatten(1).norm(dim=1) / size).tolist()
        yield 2 * len(part)
    return changes


def pooled_leak(
    denoiser: Denoiser,
    pairs: Sequence[EncodedPair],
    states: States,
    edit: LowRankEdit,
    batch: int,
) -> Iterator[int]:
    """What comes through the pooled vector alone (a generator).

    Yields images evaluated, returns ``leak``: the share of the way from the alternative back to
    the concept that the original model goes when the alternative's tokens come with the concept's
    pooled vector, ``|g*(C_a, p_e) - g*(C_a, p_a)|^2 / |g*(e) - g*(a)|^2``; and ``left``: the same
    difference of the edited model's, over the same way.
    """
    ways: list[list[Tensor]] = [[], []]
    for part in torch.arange(len(states)).split(batch):
        here, asked = states[part], [pairs[i] for i in states.index[part].tolist()]
        mixed = [Encoded(pair.alternative.tokens, pair.erased.pooled) for pair in asked]
        alternatives = [pair.alternative for pair in asked]
        before = _predict(denoiser, here.x, here.sigma, mixed)
        after, home = (
            _predict(denoiser, here.x, here.sigma, prompts, edit)
            for prompts in (mixed, alternatives)
        )
        ways[0].append(guidance_term(here.x0_null, before, here.sigma) - here.g_alternative)
        ways[1].append(guidance_term(home, after, here.sigma))
        yield 3 * len(part)
    weight = denoiser.loss_weight(states.sigma)
    whole = weighted_error(states.g_erased - states.g_alternative, weight)
    shares = [float(weighted_error(torch.cat(way), weight) / whole) for way in ways]
    return {"leak": shares[0], "left": shares[1]}


def guidance_drift(
    denoiser: Denoiser,
    prompts: Sequence[Encoded],
    states: States,
    edit: LowRankEdit,
    batch: int,
) -> Iterator[int]:
    """``|g_th(c) - g*(c)| / |g*(c)|`` of each prompt, at one state each.

    A generator; yields images evaluated, returns a list. The guidance term, since that is what a
    sampler multiplies: relative to the whole prediction, which is mostly noise, a ruin looks small.
    """
    changes = []
    for part in torch.arange(len(states)).split(batch):
        here, asked = states[part], [prompts[i] for i in part.tolist()]
        before, after = (_predict(denoiser, here.x, here.sigma, asked, e) for e in (None, edit))
        own = guidance_term(here.x0_null, before, here.sigma).flatten(1).norm(dim=1)
        change = guidance_term(before, after, here.sigma).flatten(1).norm(dim=1)
        changes += (change / own.clamp(min=1e-12)).tolist()
        yield 2 * len(part)
    return changes


def key_value_drift(erasure: LowRankEdit, matrices: Mapping[str, Tensor], tokens: Tensor) -> float:
    """Largest relative change of a prompt's keys or values, ``max_m |C dW^T| / |C W^T|``.

    Args:
        matrices: W by name, (out, width), of those that read tokens.
        tokens: token embeddings C of the prompt, (tokens, width).
    """
    changes = []
    for name, matrix in matrices.items():
        before = tokens @ matrix.float().cpu().T
        change = (tokens @ erasure.bases[name].cpu()) @ erasure.factors[name].cpu().T
        changes.append(float(change.norm() / before.norm().clamp(min=1e-12)))
    return max(changes)


def _predict(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    prompts: Sequence[Encoded],
    edit: LowRankEdit | None = None,
) -> Tensor:
    device = denoiser.device
    with torch.no_grad():
        x0 = denoiser.predict_x0(x.to(device), sigma.to(device), prompts, edit)
    return x0.cpu()
