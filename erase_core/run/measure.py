"""The numbers of the report: how far the guidance moved, and what else moved with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..method.encoded import EncodedPair
from ..method.guidance import Movement, guidance_term, moved, surgical_target, weighted_error
from ..model.denoiser import Denoiser
from ..model.low_rank import LowRankEdit
from ..model.prompt import Encoded
from .states import Sampling, States, Trajectories, check_finite, euler_step, states_at


def movement_on(
    denoiser: Denoiser,
    pairs: Sequence[EncodedPair],
    states: States,
    edit: LowRankEdit,
    eta: float,
    batch: int,
    seen: Callable[[States, Tensor], None] | None = None,
) -> Movement:
    """How far the edited model's guidance moved on frozen states.

    Args:
        batch: states at a time.
        seen: called with the states and the edited model's guidance term at them.
    """
    students = []
    for part in torch.arange(len(states)).split(batch):
        prompts = [pairs[i].erased for i in states.index[part].tolist()]
        x0 = _predict(denoiser, states.x[part], states.sigma[part], prompts, edit)
        check_finite(x0, float(states.sigma[part].min()))
        students.append(guidance_term(states.x0_null[part], x0, states.sigma[part]))
    if seen is not None:
        seen(states, torch.cat(students))
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
    drawn: Callable[[Tensor], None] | None = None,
) -> Movement:
    """Sample with the edited model and see how far its guidance moved where *it* goes.

    Args:
        wanted: trajectories of prompt pairs; the prompt with the concept drives them all.
        null_is_exact: whether the edited model's null score is the original's, as in the hard
            form, so that one evaluation serves both.
        drawn: called with the pictures in the end, (n, c, h, w).
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
    if drawn is not None:
        drawn(x)
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
    high, middle, low = by_sigma.tensor_split(3)
    return Movement(
        on(by_sigma),
        [on((concept == c).nonzero().flatten()) for c in range(int(concept.max()) + 1)],
        on(high),
        on(middle),
        on(low),
        float(change),
    )


def prompt_drift(
    denoiser: Denoiser,
    prompts: Sequence[Encoded],
    states: States,
    edit: LowRankEdit,
    batch: int,
    seen: Callable[[States, Tensor, Tensor], None] | None = None,
) -> list[float]:
    """Relative change of the prediction, ``|eps_th - eps*| / |eps*|``, of each prompt.

    Prompt i is tried at state i.

    Args:
        seen: called with states and the predicted x0 before and now, (n, c, h, w).
    """
    changes: list[float] = []
    for start in range(0, len(prompts), batch):
        part = torch.arange(start, min(start + batch, len(prompts)))
        x, sigma, asked = states.x[part], states.sigma[part], [prompts[i] for i in part.tolist()]
        frozen = _predict(denoiser, x, sigma, asked)
        edited = _predict(denoiser, x, sigma, asked, edit)
        if seen is not None:
            seen(states[part], frozen, edited)
        # eps = (x - x0) / sigma on both sides: the noise level cancels.
        size = (x - frozen).flatten(1).norm(dim=1)
        changes += ((edited - frozen).flatten(1).norm(dim=1) / size).tolist()
    return changes


def pooled_leak(
    denoiser: Denoiser,
    pairs: Sequence[EncodedPair],
    states: States,
    edit: LowRankEdit,
    batch: int,
) -> dict[str, float]:
    """What comes through the pooled vector alone.

    Returns ``leak``: the share of the way from the alternative back to
    the concept that the original model goes when the alternative's tokens come with the concept's
    pooled vector, ``|g*(C_a, p_e) - g*(C_a, p_a)|^2 / |g*(e) - g*(a)|^2``; and ``left``: the same
    difference of the edited model's, over the same way.
    """
    ways: list[list[Tensor]] = [[], []]
    for part in torch.arange(len(states)).split(batch):
        here, asked = states[part], [pairs[i] for i in states.index[part].tolist()]
        mixed = [pair.alternative.with_pooled(pair.erased.pooled) for pair in asked]
        alternatives = [pair.alternative for pair in asked]
        before = _predict(denoiser, here.x, here.sigma, mixed)
        after, home = (
            _predict(denoiser, here.x, here.sigma, prompts, edit)
            for prompts in (mixed, alternatives)
        )
        ways[0].append(guidance_term(here.x0_null, before, here.sigma) - here.g_alternative)
        ways[1].append(guidance_term(home, after, here.sigma))
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
) -> list[float]:
    """``|g_th(c) - g*(c)| / |g*(c)|`` of each prompt, at one state each.

    The guidance term, since that is what a
    sampler multiplies: relative to the whole prediction, which is mostly noise, a ruin looks small.
    """
    changes: list[float] = []
    for part in torch.arange(len(states)).split(batch):
        here, asked = states[part], [prompts[i] for i in part.tolist()]
        before, after = (_predict(denoiser, here.x, here.sigma, asked, e) for e in (None, edit))
        own = guidance_term(here.x0_null, before, here.sigma).flatten(1).norm(dim=1)
        change = guidance_term(before, after, here.sigma).flatten(1).norm(dim=1)
        changes += (change / own.clamp(min=1e-12)).tolist()
    return changes


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
