"""The report's numbers, for programs: plain JSON values under names that stay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .cautions import guidance_change
from .record import KEYS_AND_VALUES, PREDICTION
from .verdict import EXACT, changed_words, grade, kept_prompts, moved, names_of, outcome, verdict

# Raised when a name or a meaning below changes; a new name alone raises nothing.
SCHEMA = 1


def report_numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the report says in numbers.

    All shares are of 1. A figure that was not measured, or is no number, is None, so that any JSON
    reader takes it.

    Args:
        record: the record of an erasure, of any version.

    Returns:
        ``schema``: 1. ``version``, ``created``, ``family``, ``base``, ``form``: of the erasure.
        ``grade``: "good", "traces", "harm", "not gone" or "ruin". ``verdict``: its sentences.
        ``concepts``: for each its ``names``, ``alternative``, ``outcome`` ("gone",
        "traces may remain", "not gone", "can't be told"), ``moved`` (share of the way),
        ``moved_of`` ("prediction" or "keys and values") and ``share_left``.
        ``kept``, ``negative_prompts``: for each its ``text``, ``exact`` and ``drift``; a kept one
        that isn't exact has a ``reason``. ``empty_prompt``: ``exact`` and ``drift``.
        ``drift_of``: what drifts are of. ``others``: ``keys_and_values`` and ``guidance``, average
        changes of what nobody named, and ``words``, each with its ``change``, the most changed
        first. ``taken_out``: concepts. ``training``: ``outcome``, ``steps``, ``of``, ``complete``,
        ``stopped_early``. ``cost``: ``forward_equivalents`` and ``seconds``. ``warnings``: texts.
    """
    measures, others = record["measures"], record.get("others")
    found = {
        "schema": SCHEMA,
        **{name: record[name] for name in ("version", "created", "family", "form")},
        "base": record["base"].get("name", ""),
        "grade": grade(record),
        "verdict": verdict(record),
        "concepts": [_concept(record, concept) for concept in record["concepts"]],
        **_staying(record),
        "others": {
            "keys_and_values": others["change"] if others else None,
            "guidance": guidance_change(measures),
            "unnamed": measures["unnamed_drift"],
            "of": measures.get("unnamed_of", measures["drift_of"]),
            "words": [
                {"text": one["text"], "change": one["drift"]} for one in changed_words(record)
            ],
        },
        "taken_out": list(record.get("taken_out") or []),
        **_making(record),
        "warnings": list(record["warnings"]),
    }
    return _plain(found)


def _concept(record: Mapping[str, Any], concept: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "names": names_of(concept),
        "alternative": concept["alternative"],
        "outcome": outcome(record, concept),
        "moved": moved(concept),
        "moved_of": KEYS_AND_VALUES if concept["moved"] is None else PREDICTION,
        "share_left": concept["share_left"],
    }


def _staying(record: Mapping[str, Any]) -> dict[str, Any]:
    measures, hard = record["measures"], record["form"] == "hard"
    kept = []
    for one in kept_prompts(record):
        kept.append({"text": one.text, "exact": one.exact, "drift": one.drift})
        if one.reason:
            kept[-1]["reason"] = one.reason
    return {
        "kept": kept,
        "negative_prompts": [
            {"text": one["text"], "exact": hard and one["drift"] <= EXACT, "drift": one["drift"]}
            for one in measures["negative_prompts"]
        ],
        "empty_prompt": {
            "exact": hard and measures["null_drift"] <= EXACT,
            "drift": measures["null_drift"],
        },
        "drift_of": measures["drift_of"],
    }


def _making(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "training": {
            "outcome": record.get("training"),
            "steps": record["steps_done"],
            "of": record["settings"]["steps"],
            "complete": record["complete"],
            "stopped_early": record["stopped_early"],
        },
        "cost": {
            "forward_equivalents": record["forward_equivalents"],
            "seconds": record["seconds"],
        },
    }


def _plain(value: Any) -> Any:
    """The same with None for what is no number."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
