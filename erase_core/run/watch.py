"""Pictures of a run on its way, from predictions that it makes anyway.

One step from a noisy latent to the picture that the model expects there: blurred, but with the
thing in it, and at the same latent once as the untouched model has it and once as the edited one.
Where there is much noise the prompt decides what is seen, where there is little the latent does;
so those shown lie in between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..method.guidance import SIGMA_FLOOR
from .given import Given
from .meter import DRAWN, ERASED, KEPT, Preview
from .states import States
from .trainer import SurgeryTrainer

# Which steps of a trajectory are shown, in shares of it; and the one that is shown of several.
SHOWN, BEST = (0.2, 0.6), 0.4

Seen = Callable[[States, Tensor, Tensor], None]


class Watch:
    """Shows states of one trajectory, which is one seed, whenever they are trained on.

    Args:
        given: the run's.
        states: those that are trained on.
        trainer: what trains on them.
    """

    def __init__(self, given: Given, states: States, trainer: SurgeryTrainer) -> None:
        self._given, self._states, self._trainer = given, states, trainer
        if given.meter.preview is None:
            return
        steps = given.settings.sampling_steps
        # States are sampled side by side, step by step: the first of every step are one trajectory.
        alike = (states.sigma == states.sigma[0]).long()
        count = int(alike.cumprod(0).sum())
        first, last = (round(share * steps) for share in SHOWN)
        trainer.watched = {count * step for step in range(first, max(last, first + 1))}

    def show(self) -> None:
        """Show the state that was in the latest batch, if one was."""
        watched = self._trainer.latest_watched()
        if watched is not None:
            row, guidance = watched
            _show_pair(self._given, self._states[row : row + 1], guidance.cpu())


def show_measured(given: Given) -> Callable[[States, Tensor], None] | None:
    """Shows one of the states that an edit is measured on, always the same of the same ones."""
    if given.meter.preview is None:
        return None

    def show(states: States, guidance: Tensor) -> None:
        concepts = [given.prompts.pairs[i].concept for i in states.index.tolist()]
        rows = [row for row, concept in enumerate(concepts) if concept == 0]
        rows.sort(key=lambda row: -float(states.sigma[row]))
        row = rows[int(BEST * len(rows))]
        _show_pair(given, states[row : row + 1], guidance[row])

    return show


def show_kept(given: Given) -> Seen | None:
    """Shows the first of the kept prompts."""
    if given.meter.preview is None:
        return None
    shown = False

    def show(states: States, before: Tensor, now: Tensor) -> None:
        nonlocal shown
        if not shown and given.meter.preview is not None:
            shown = True
            null, scale = states.x0_null[0], given.settings.guidance_scale
            pair = (null + scale * (x0[0].cpu() - null) for x0 in (before, now))
            given.meter.preview(Preview(KEPT, *pair))

    return show


def show_drawn(given: Given) -> Callable[[Tensor], None] | None:
    """Shows a picture that the edited model drew from the prompt with the concept."""
    preview = given.meter.preview
    if preview is None:
        return None
    return lambda pictures: preview(Preview(DRAWN, None, pictures[0].cpu()))


def _show_pair(given: Given, states: States, guidance: Tensor) -> None:
    """What is predicted at one state with guidance, before and now.

    Args:
        states: one.
        guidance: the edited model's guidance term at it, (c, h, w).
    """
    preview = given.meter.preview
    if preview is None:
        return
    # x0(c) = x0(0) - sigma g(c), and a sampler goes guidance_scale times as far.
    way = given.settings.guidance_scale * states.sigma[0].clamp(min=SIGMA_FLOOR)
    null = states.x0_null[0]
    before, now = (torch.sub(null, way * g) for g in (states.g_erased[0], guidance))
    preview(Preview(ERASED, before, now))
