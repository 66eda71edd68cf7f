"""This project's engine with its presets."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from concept_surgery.erase_core import EraseSettings, erase, preset_settings
from concept_surgery.erase_core.artefact.language_store import LanguageStore
from concept_surgery.erase_core.model.denoiser import Denoiser

from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods.base import Method, Outcome
from tools.environment import BUILD

RESOLUTION = 64


@cache
def _language() -> LanguageStore:
    return LanguageStore(BUILD / "erasure" / "language")


def asked(case: Case, seed: int, settings: Mapping[str, Any]) -> EraseSettings:
    """What the engine is asked for."""
    given = {"concepts": case.text, "keep": case.keep, "kind": case.kind, "seed": seed}
    return preset_settings(**given, resolution=RESOLUTION, **settings)


def train(denoiser: Denoiser, case: Case, seed: int, settings: Mapping[str, Any]) -> Outcome:
    """Run the engine as the node does."""
    last = erase(asked(case, seed, settings), denoiser, _language())
    record = last.record
    moved = record["measures"]["moved_held_out"]
    notes = {
        "protection": record["protection"],
        "rank": record["rank"],
        "steps": record["steps_done"],
        "exact": sum(kept["exact"] for kept in record["measures"]["kept"]),
        "share_left": record["subspace"]["share_left"],
        "moved": moved and moved["overall"],
        "moved_sampled": moved and record["measures"]["moved_sampled"]["overall"],
        "unnamed_drift": record["measures"]["unnamed_drift"],
    }
    return Outcome(last.edit(), notes)


def _method(name: str, **settings: Any) -> Method:
    return Method(f"ours/{name}", train, settings, "key-value", ("ours.py",), uses_engine=True)


INSTANT = _method("instant", preset="instant")
BALANCED = _method("balanced", preset="balanced")
THOROUGH = _method("thorough", preset="thorough")
BALANCED_SOFT = _method("balanced-soft", preset="balanced", form="soft")
THOROUGH_SOFT = _method("thorough-soft", preset="thorough", form="soft")
METHODS = (INSTANT, BALANCED, THOROUGH, BALANCED_SOFT, THOROUGH_SOFT)
CLOSED_GRID = ({}, {"protection": 0.3}, {"protection": 3.0}, {"protection": 30.0})
TRAINED_GRID = ({}, {"learning_rate": 0.001}, {"protection": 0.3}, {"protection": 30.0})
