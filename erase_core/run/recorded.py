"""The record of a run: what the artefact says about itself."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, cast

from ..artefact.cautions import harm_warnings, room_warnings, training_warnings, unknown_warnings
from ..artefact.record import STOPPED, TRAINED, WORSE, Record
from ..files.fingerprint import fingerprint
from ..method.closed_form import ClosedForm
from ..method.subspace import ExactSet
from ..settings.prompts import prompt_warnings
from ..settings.settings import EraseSettings
from ..settings.texts import concept_values
from ..version import VERSION
from .given import Given
from .heard import Heard
from .meter import CurvePoint
from .training import Start, Trained

CURVE_POINTS = 200  # of a curve in the record, at most


def record_of(
    given: Given,
    start: Start,
    trained: Trained,
    exact: ExactSet,
    measures: Mapping[str, Any],
    heard: Heard,
) -> Record:
    """The record, which holds what is read again and more."""
    settings, edit, solution = given.settings, trained.edit, start.solution
    subjects = given.prompts.subjects
    collateral = start.others.report(edit, subjects) if start.others else None
    measures = _with_collateral(measures, collateral, start.held_out is not None)
    found: dict[str, Any] = {
        "version": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017
        "family": given.model.family,
        "base": dict(given.model.base),
        "text_encoder": fingerprint({"null prompt": given.prompts.null.tokens}),
        "settings": settings.as_dict(),
        "form": settings.form,
        "concepts": _concepts(settings, exact, solution, measures),
        "matrices": len(edit.factors),
        "rank": max(factor.shape[1] for factor in edit.factors.values()),
        "subspace": {"exact_rank": exact.basis.shape[1], "share_left": exact.share_left},
        "protection": start.choice.ridge if start.choice else 0.0,
        "harm": solution.harm if solution else None,
        "measures": measures,
        "others": collateral,
        "warnings": _warnings(given, trained, exact, measures, collateral, heard),
        **_training(given, trained),
        **_readers(given, edit.factors),
        "curve": thinned(given.meter.curve),
        "forward_equivalents": given.meter.spent,
        "seconds": round(time.monotonic() - given.began, 2),
    }
    return cast(Record, found)


def _readers(given: Given, edited: Collection[str]) -> dict[str, Any]:
    """The layers that were found to read the prompt alone; nothing where names tell them."""
    rows = []
    for found in given.model.found_readers:
        names = given.model.ways.get(found.way, ()) if found.way else ()
        inside = any(name in edited for name in names)
        why = "" if inside else found.why or "what must stay leaves no room in them"
        row = {"name": found.name, "matrices": found.matrices, "width": found.width}
        rows.append({**row, "edited": inside, "why": why})
    return {"readers": rows} if rows else {}


def _training(given: Given, trained: Trained) -> dict[str, Any]:
    """What became of the training."""
    settings, edit, steps = given.settings, trained.edit, len(trained.losses)
    added = given.journal.history
    did_train = trained.outcome in (TRAINED, WORSE, STOPPED)
    values = [*edit.factors.values()]
    values += edit.bases.values() if settings.form == "soft" else []
    return {
        "training": trained.outcome,
        "losses": trained.losses,
        "steps_done": steps,
        "values_trained": sum(t.numel() for t in values) if trained.outcome == TRAINED else 0,
        "converged": trained.converged,
        "complete": trained.outcome != STOPPED
        and (trained.converged or not did_train or steps == settings.steps),
        "stopped_early": trained.outcome == STOPPED or (did_train and steps < settings.steps),
        "ended_by": trained.ended_by,
        "gradient_apart": trained.gradient.apart if trained.gradient else None,
        "memory": trained.memory,
        **({"steps_added": [list(one) for one in added]} if added else {}),
    }


def thinned(curve: Sequence[CurvePoint], most: int = CURVE_POINTS) -> list[list[float | None]]:
    """The curve with at most so many points, the first and the last among them."""
    last = len(curve) - 1
    count = min(len(curve), most)
    places = sorted({round(i * last / max(1, count - 1)) for i in range(count)})
    return [list(curve[place]) for place in places]


def _warnings(
    given: Given,
    trained: Trained,
    exact: ExactSet,
    measures: Mapping[str, Any],
    collateral: Mapping[str, Any] | None,
    heard: Heard,
) -> list[str]:
    """What a person must be told, the worst first."""
    settings = given.settings
    return [
        *harm_warnings(settings, measures, collateral),
        *training_warnings(settings, trained.outcome),
        *room_warnings(settings, exact),
        *unknown_warnings(heard.language.unknown if heard.language else 0.0),
        *given.prompts.warnings,
        *prompt_warnings(settings),
    ]


def _with_collateral(
    measures: Mapping[str, Any], collateral: Mapping[str, Any] | None, sampled: bool
) -> dict[str, Any]:
    """The measures with the change of what nobody named: the worse of guidance, keys and values.

    At states of the concept's own pictures another word's guidance is large, and its change looks
    small beside it.
    """
    if collateral is None:
        return dict(measures)
    if not sampled:
        unnamed = {"unnamed": collateral["words"], "unnamed_drift": collateral["change"]}
        return {**measures, **unnamed}
    guidance = measures["unnamed_drift"]
    worse = max(guidance, collateral["change"])
    return {**measures, "unnamed_guidance": guidance, "unnamed_drift": worse}


def _concepts(
    settings: EraseSettings,
    exact: ExactSet,
    solution: ClosedForm | None,
    measures: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """What became of each concept."""
    held_out = measures["moved_held_out"]
    return [
        {
            **concept_values(concept),
            "share_left": exact.shares_left[index],
            "keys_and_values_moved": solution.moved[index] if solution else None,
            "moved": held_out["concepts"][index] if held_out else None,
            "columns": list(solution.columns[index])
            if solution and settings.form == "hard"
            else None,
        }
        for index, concept in enumerate(settings.concepts)
    ]
