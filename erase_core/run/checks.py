"""The checks at the end of a run: how far it moved, and what else moved with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..method.encoded import EncodedPrompts
from ..method.subspace import ExactSet, leakage
from ..model.denoiser import Denoiser, Encoded, LowRankEdit
from ..settings.families import by_name
from ..settings.layers import reads_prompt
from ..settings.settings import EraseSettings
from .measure import (
    Movement,
    guidance_drift,
    key_value_drift,
    movement_on,
    movement_sampled,
    pooled_leak,
    prompt_drift,
)
from .states import EncodedPair, Sampling, States, draw_pairs

HELD_OUT_STATES = 18
SAMPLED_TRAJECTORIES = 2
SAMPLED_STEPS = 5
NULL_STATES = 2
UNNAMED_PROMPTS = 16
POOLED_STATES = 3

PREDICTION, KEYS_AND_VALUES, GUIDANCE = "prediction", "keys and values", "guidance"


class Checks:
    """Measures a finished edit.

    Args:
        settings: of the run.
        denoiser: the model.
        prompts: the prompts of the run.
        matrices: W by name.
        generator: the run's random numbers.
    """

    def __init__(
        self,
        settings: EraseSettings,
        denoiser: Denoiser,
        prompts: EncodedPrompts,
        matrices: dict[str, Tensor],
        generator: torch.Generator,
    ) -> None:
        self._settings, self._denoiser, self._prompts = settings, denoiser, prompts
        self._matrices, self._generator = matrices, generator
        self._batch = 3 * settings.batch  # what the pool was sampled with fits the device

    def run(
        self,
        edit: LowRankEdit,
        exact: ExactSet,
        held_out: States | None,
        unnamed: Mapping[str, Encoded],
        movement: Movement | None = None,
    ) -> Iterator[str]:
        """Everything the report says; a generator that yields what it is doing.

        Args:
            unnamed: prompts that the run doesn't name, by text.
            movement: of this edit on held-out states, where it was measured before.

        Without sampled states the drifts are those of keys and values, which need no prediction,
        and nothing is said about predictions.
        """
        measures: dict[str, Any] = {
            "moved_held_out": None,
            "moved_sampled": None,
            "pooled": None,
        }
        if held_out is not None:
            wanted = checked_states(self._settings, len(held_out))
            checked = spread_over(held_out, self._prompts.pairs, wanted)
            measures |= yield from self._movements(edit, checked, movement)
            measures["pooled"] = yield from self._pooled(edit, checked)
        else:
            checked = None
        measures |= yield from self._drifts(edit, checked, exact, unnamed)
        return {**measures, "null_leakage": self._null_leakage(edit)}

    def _null_leakage(self, edit: LowRankEdit) -> float | None:
        """What R sees of the null prompt in the hard form; None in the soft one."""
        if self._settings.form != "hard":
            return None
        null, pooled_matrix = self._prompts.null, by_name(self._denoiser.family).pooled_matrix
        seen = {}
        for name, basis in edit.bases.items():
            if id(basis) not in seen:
                read = null.tokens
                if name == pooled_matrix:  # which reads the pooled vector before anything else
                    read = functional.pad(null.pooled, (0, len(basis) - len(null.pooled)))[None]
                seen[id(basis)] = leakage(basis.cpu(), read)
        return max(seen.values())

    def _movements(
        self, edit: LowRankEdit, checked: States, on_frozen: Movement | None
    ) -> Iterator[str]:
        settings, denoiser, pairs = self._settings, self._denoiser, self._prompts.pairs
        if on_frozen is None:
            on_frozen = yield from _saying(
                movement_on(denoiser, pairs, checked, edit, settings.eta, self._batch),
                "Checking on held-out states",
            )
        shape = tuple(checked.x.shape[1:])
        wanted = draw_pairs(pairs, SAMPLED_TRAJECTORIES, shape, self._generator)
        sampling = Sampling(denoiser.sigmas(SAMPLED_STEPS).cpu(), settings.guidance_scale)
        on_sampled = yield from _saying(
            movement_sampled(
                denoiser,
                self._prompts.null,
                pairs,
                wanted,
                sampling,
                edit,
                settings.eta,
                null_is_exact=settings.form == "hard",
            ),
            "Checking on the edited model's own states",
        )
        return {
            "moved_held_out": dataclasses.asdict(on_frozen),
            "moved_sampled": dataclasses.asdict(on_sampled),
        }

    def _pooled(self, edit: LowRankEdit, checked: States) -> Iterator[str]:
        """What comes through the pooled vector; None on models without one."""
        if self._prompts.null.pooled is None:
            return None
        states = checked[evenly(len(checked), POOLED_STATES)]
        leak = pooled_leak(self._denoiser, self._prompts.pairs, states, edit, self._batch)
        found = yield from _saying(leak, "Checking the pooled vector")
        edited = by_name(self._denoiser.family).pooled_matrix in edit.factors
        return found if edited else {**found, "left": None}

    def _drifts(
        self,
        edit: LowRankEdit,
        checked: States | None,
        exact: ExactSet,
        unnamed: Mapping[str, Encoded],
    ) -> Iterator[str]:
        prompts, settings = self._prompts, self._settings

        def drift(asked: Sequence[Encoded]) -> Iterator[str]:
            return (
                yield from _saying(self._drift(edit, asked, checked), "Checking what must stay")
            )

        null = yield from drift([prompts.null] * NULL_STATES)
        zeroed = yield from drift([prompts.null.zeroed()])
        kept = yield from drift([prompt for _, prompt in prompts.keep])
        negatives = yield from drift(prompts.negatives)
        asked = list(unnamed.values())
        others = yield from self._unnamed(edit, asked, checked)
        return {
            "drift_of": KEYS_AND_VALUES if checked is None else PREDICTION,
            "null_drift": max(null),
            "zeroed_drift": max(zeroed),
            "negative_prompts": _with_texts(settings.negative_prompts, negatives),
            "kept": [
                {**dataclasses.asdict(prompt), "drift": change}
                for prompt, change in zip(exact.kept, kept, strict=True)
            ],
            "unnamed_of": KEYS_AND_VALUES if checked is None else GUIDANCE,
            "unnamed": _with_texts(unnamed, others),
            "unnamed_drift": sum(others) / max(1, len(others)),
        }

    def _unnamed(
        self, edit: LowRankEdit, asked: Sequence[Encoded], checked: States | None
    ) -> Iterator[str]:
        """How far prompts that nobody named change: their guidance, else keys and values."""
        if checked is None:
            return (yield from self._drift(edit, asked, None))
        states = checked[evenly(len(checked), len(asked))]
        drift = guidance_drift(self._denoiser, asked, states, edit, self._batch)
        return (yield from _saying(drift, "Checking what nobody named"))

    def _drift(
        self, edit: LowRankEdit, asked: Sequence[Encoded], checked: States | None
    ) -> Iterator[int]:
        """Drift of each prompt: at one state each, the states spread over the noise levels."""
        if checked is not None:
            states = checked[evenly(len(checked), len(asked))]
            return (yield from prompt_drift(self._denoiser, asked, states, edit, self._batch))
        readers = {name: w for name, w in self._matrices.items() if reads_prompt(name)}
        return [key_value_drift(edit, readers, prompt.tokens) for prompt in asked]


def planned_checks(settings: EraseSettings, held_out: int, pooled: bool) -> int:
    """Forward-equivalents of the checks.

    Args:
        held_out: how many trajectories are held out.
        pooled: whether the model takes pooled vectors.
    """
    prompts = len(settings.keep) + len(settings.negative_prompts) + UNNAMED_PROMPTS
    sampled = 4 if settings.form == "hard" else 5
    return (
        checked_states(settings, held_out * settings.sampling_steps)
        + sampled * SAMPLED_TRAJECTORIES * SAMPLED_STEPS
        + 2 * (NULL_STATES + 1)
        + 2 * prompts
        + 3 * POOLED_STATES * pooled
    )


def checked_states(settings: EraseSettings, available: int) -> int:
    """How many held-out states the movement is measured on: some for each concept."""
    return min(available, max(HELD_OUT_STATES, 6 * len(settings.concepts)))


def spread_over(states: States, pairs: Sequence[EncodedPair], wanted: int) -> States:
    """``wanted`` of the states, evenly over the concepts and each concept's noise levels.

    In order of falling noise.
    """
    concept = torch.tensor([pairs[i].concept for i in states.index.tolist()])
    groups = [(concept == c).nonzero().flatten() for c in concept.unique()]
    chosen = []
    for number, members in enumerate(groups):
        share = (number + 1) * wanted // len(groups) - number * wanted // len(groups)
        by_sigma = members[states.sigma[members].argsort(descending=True, stable=True)]
        chosen.append(by_sigma[evenly(len(members), min(share, len(members)))])
    index = torch.cat(chosen)
    return states[index[states.sigma[index].argsort(descending=True, stable=True)]]


def evenly(count: int, wanted: int) -> Tensor:
    """``wanted`` indices below ``count``, each in the middle of its share of the range.

    Not the ends: at the lowest noise level x0 is x but for rounding, and a drift taken there would
    be the rounding's.
    """
    return ((torch.arange(wanted) + 0.5) * count / wanted).long()


def _saying(stage: Iterator, text: str) -> Iterator[str]:
    """Run a stage to its end, yielding ``text`` for whatever it yields."""
    while True:
        try:
            next(stage)
        except StopIteration as end:
            return end.value
        yield text


def _with_texts(prompts: Iterable[str], changes: Sequence[float]) -> list[dict[str, Any]]:
    return [{"text": text, "drift": change} for text, change in zip(prompts, changes, strict=True)]
