"""The checks at the end of a run: how far it moved, and what else moved with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.nn import functional

from ..artefact.record import GUIDANCE, KEYS_AND_VALUES, PREDICTION
from ..method.collateral import key_value_drift
from ..method.guidance import Movement
from ..method.subspace import ExactSet, leakage
from ..method.ways import WayIn
from ..model.low_rank import LowRankEdit
from ..model.prompt import POOLED, TOKENS, Encoded
from .given import Given
from .measure import (
    guidance_drift,
    movement_on,
    movement_sampled,
    pooled_leak,
    prompt_drift,
)
from .plan import (
    NULL_STATES,
    POOLED_STATES,
    SAMPLED_STEPS,
    SAMPLED_TRAJECTORIES,
    checked_states,
)
from .states import Sampling, States, balanced_states, draw_pairs, middles
from .watch import Seen, show_drawn, show_kept, show_measured


def measure(
    given: Given,
    edit: LowRankEdit,
    ways: Sequence[WayIn],
    exact: ExactSet,
    held_out: States | None,
    unnamed: Mapping[str, Encoded],
    movement: Movement | None = None,
) -> dict[str, Any]:
    """Everything that the report says about a finished edit, plain JSON values.

    Without sampled states the drifts are those of keys and values, which need no prediction, and
    nothing is said about predictions.

    Args:
        ways: those that are edited.
        held_out: states to check on.
        unnamed: prompts that the run doesn't name, by text.
        movement: of this edit on held-out states, where it was measured before.
    """
    measures: dict[str, Any] = {"moved_held_out": None, "moved_sampled": None, "pooled": None}
    checked = None
    if held_out is not None:
        wanted = checked_states(given.settings, len(held_out))
        checked = balanced_states(held_out, given.prompts.pairs, wanted)
        measures |= _movements(given, edit, checked, movement)
        measures["pooled"] = _pooled(given, edit, checked)
    measures |= _drifts(given, edit, ways, checked, exact, unnamed)
    return {**measures, "null_leakage": _null_leakage(given, edit)}


def _movements(
    given: Given, edit: LowRankEdit, checked: States, on_frozen: Movement | None
) -> dict[str, Any]:
    settings, model, pairs = given.settings, given.model, given.prompts.pairs
    if on_frozen is None:
        given.meter.say("Checking on held-out states")
        on_frozen = movement_on(
            model,
            pairs,
            checked,
            edit,
            settings.eta,
            given.checked_at_once,
            show_measured(given),
        )
    given.meter.say("Checking on the edited model's own states")
    shape = tuple(checked.x.shape[1:])
    on_sampled = movement_sampled(
        model,
        given.prompts.null,
        pairs,
        draw_pairs(pairs, SAMPLED_TRAJECTORIES, shape, given.random),
        Sampling(model.sigmas(SAMPLED_STEPS).cpu(), settings.guidance_scale),
        edit,
        settings.eta,
        null_is_exact=settings.form == "hard",
        drawn=show_drawn(given),
    )
    return {
        "moved_held_out": dataclasses.asdict(on_frozen),
        "moved_sampled": dataclasses.asdict(on_sampled),
    }


def _pooled(given: Given, edit: LowRankEdit, checked: States) -> dict[str, Any] | None:
    """What comes through the pooled vector; None on models without one."""
    if given.prompts.null.pooled is None:
        return None
    given.meter.say("Checking the pooled vector")
    states = checked[middles(len(checked), POOLED_STATES)]
    pairs, batch = given.prompts.pairs, given.checked_at_once
    found = pooled_leak(given.model, pairs, states, edit, batch)
    edited = any(name in edit.factors for name in given.model.ways.get(POOLED, ()))
    return dict(found) if edited else {**found, "left": None}


def _drifts(
    given: Given,
    edit: LowRankEdit,
    ways: Sequence[WayIn],
    checked: States | None,
    exact: ExactSet,
    unnamed: Mapping[str, Encoded],
) -> dict[str, Any]:
    prompts, settings = given.prompts, given.settings

    def drift(asked: Sequence[Encoded], seen: Seen | None = None) -> list[float]:
        return _drift(given, edit, ways, asked, checked, seen)

    given.meter.say("Checking what must stay")
    show = show_kept(given)
    null = drift([prompts.null] * NULL_STATES, None if prompts.keep else show)
    zeroed = drift([prompts.zeroed])
    kept = drift([prompt for _, prompt in prompts.keep], show)
    negatives = drift(prompts.negatives)
    given.meter.say("Checking what nobody named")
    others = _unnamed(given, edit, ways, list(unnamed.values()), checked)
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
    given: Given,
    edit: LowRankEdit,
    ways: Sequence[WayIn],
    asked: Sequence[Encoded],
    checked: States | None,
) -> list[float]:
    """How far prompts that nobody named change: their guidance, else keys and values."""
    if checked is None:
        return _drift(given, edit, ways, asked, None)
    states = checked[middles(len(checked), len(asked))]
    return guidance_drift(given.model, asked, states, edit, given.checked_at_once)


def _drift(
    given: Given,
    edit: LowRankEdit,
    ways: Sequence[WayIn],
    asked: Sequence[Encoded],
    checked: States | None,
    seen: Seen | None = None,
) -> list[float]:
    """Drift of each prompt: at one state each, the states spread over the noise levels."""
    if checked is not None:
        states = checked[middles(len(checked), len(asked))]
        return prompt_drift(given.model, asked, states, edit, given.checked_at_once, seen)
    readers = {name: w for way in ways if way.name == TOKENS for name, w in way.matrices.items()}
    return [key_value_drift(edit, readers, prompt.rows(TOKENS)) for prompt in asked]


def _null_leakage(given: Given, edit: LowRankEdit) -> float | None:
    """What R sees of the null prompt in the hard form; None in the soft one."""
    if given.settings.form != "hard":
        return None
    seen: dict[int, float] = {}
    for way, names in given.model.ways.items():
        read = given.prompts.null.rows(way)
        for name in names:
            basis = edit.bases.get(name)
            if basis is not None and id(basis) not in seen:
                rest = len(basis) - read.shape[1]  # what the matrix reads behind the prompt
                seen[id(basis)] = leakage(basis.cpu(), functional.pad(read, (0, rest)))
    return max(seen.values())


def _with_texts(prompts: Iterable[str], changes: Sequence[float]) -> list[dict[str, Any]]:
    return [{"text": text, "drift": change} for text, change in zip(prompts, changes, strict=True)]
