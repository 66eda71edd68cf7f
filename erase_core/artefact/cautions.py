"""What a person must be told about a run, in words: it stands in the record and at the node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..method.language import MOSTLY_UNKNOWN
from ..method.protection import HARM, RUIN
from ..method.subspace import KEEP_FLOOR, ExactSet
from ..settings.settings import EraseSettings
from .record import WORSE

# The same for the guidance, which changes by more than keys and values do.
GUIDANCE_HARM, GUIDANCE_RUIN = 0.4, 1.0
WORST = 3


def harm_grade(measures: Mapping[str, Any], others: Mapping[str, Any] | None) -> str:
    """ "ruin", "harm" or "": how much of what nobody named changes, by the worse of two figures.

    A figure that is no number is of a model that no longer predicts any.
    """
    changed = others["change"] if others else 0.0
    guidance = guidance_change(measures) or 0.0
    if not (changed <= RUIN and guidance <= GUIDANCE_RUIN):
        return "ruin"
    return "" if changed <= HARM and guidance <= GUIDANCE_HARM else "harm"


def guidance_change(measures: Mapping[str, Any]) -> float | None:
    """How far the guidance of unnamed words changes; None where nothing was predicted."""
    if measures.get("unnamed_of") != "guidance":
        return None
    return measures.get("unnamed_guidance", measures["unnamed_drift"])


def harm_warnings(
    settings: EraseSettings, measures: Mapping[str, Any], others: Mapping[str, Any] | None
) -> list[str]:
    """What else changes, where that is much, with what to do about it."""
    grade = harm_grade(measures, others)
    if not grade:
        return []
    figures = []
    if others:
        figures.append(f"their keys and values by {others['change']:.0%} on average")
    guidance = guidance_change(measures)
    if guidance is not None:
        figures.append(f"their guidance by {guidance:.0%}")
    words = ", ".join(f"{one['text']} {one['drift']:.0%}" for one in _worst(measures, others))
    what = "is ruined for" if grade == "ruin" else "suffers in"
    return [
        f"The model {what} much that nobody named: {' and '.join(figures)} (most: {words}). "
        f"{_advice(settings)}"
    ]


def _worst(measures: Mapping[str, Any], others: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    entries = others["words"] if others else measures["unnamed"]
    return sorted(entries, key=lambda one: -one["drift"])[:WORST]


def _advice(settings: EraseSettings) -> str:
    if settings.protection is not None:
        return "Leave the protection to the run, or raise it."
    removed = any(not concept.alternative for concept in settings.concepts)
    closer = f"ame a replacement that is {'close' if removed else 'closer'} to the concept"
    if len(settings.concepts) > 1:
        return f"Erase fewer concepts in one run, or n{closer}."
    return f"N{closer}."


def training_warnings(settings: EraseSettings, training: str) -> list[str]:
    """That training was of no use, where it wasn't."""
    if training != WORSE:
        return []
    return [
        "Training ended worse than it began, so the start is handed on: the closed form, as the "
        f"preset 'instant' gives it. Lower the learning rate (it is {settings.learning_rate:g}) or "
        "raise the protection."
    ]


def room_warnings(settings: EraseSettings, exact: ExactSet) -> list[str]:
    """That keep prompts were made exact in less room than is usual, where they were."""
    tight = [one.text for one in exact.kept if one.exact and one.share_left < KEEP_FLOOR]
    if not tight:
        return []
    return [
        f"What is kept exactly leaves only {exact.share_left:.0%} of its edit to a concept (usual "
        f"is {KEEP_FLOOR:.0%} or more), so other words may change more. Look at what else changes, "
        f"and raise the room beside kept prompts (it is {settings.keep_room:g}) if it is too much."
    ]


def unknown_warnings(share: float) -> list[str]:
    """That the plain captions say little to the text encoder at hand."""
    if share < MOSTLY_UNKNOWN:
        return []
    return [
        f"This text encoder knows only {1 - share:.0%} of the words in the plain captions. What it "
        "protects beside them are words of its own vocabulary."
    ]
