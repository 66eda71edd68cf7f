"""Finding the run to go on with among those that were left, or saying what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..artefact.formats import concept_list
from ..artefact.identity import RESUME, TRAIN_AGAIN, result_key, steps_added_key
from ..artefact.unfinished import Part
from ..files.digest import Digest, tensor_bytes
from ..settings.settings import EraseSettings
from ..settings.texts import label
from ..version import VERSION
from .given import Given
from .journal import ABOUT, PROGRESS, Journal, forget

# Of two runs that differ in these alone, the one may go on where the other is: they train on the
# same states towards the same target.
MAY_DIFFER = ("steps", "trial_steps", "stop_below")
LONGEST_VALUE, MOST_DIFFERENCES = 60, 6


class NothingToResumeError(ValueError):
    """There is no run to go on with; says what is kept and in what it differs."""


@dataclass(frozen=True)
class Left:
    """A run that was left, or one that begins.

    Attributes:
        key: that its parts, and its result, are kept under.
        source: the key of the run that is gone on with; "" for none.
        history: for each time that steps were added, how many were done and planned until then.
    """

    key: str
    source: str = ""
    history: tuple[tuple[int, int], ...] = ()


def left_run(parts: MutableMapping[str, Part] | None, given: Given, key: str, reuse: str) -> Left:
    """Where a run goes on, or that it begins.

    Exactly the same run goes on by itself, since it ends as if it had never been interrupted. One
    with other steps goes on if it is asked to.

    Args:
        parts: what is kept, by name; None for nothing.
        key: of the run's result.
        reuse: what to do about a stored result, one of :data:`identity.REUSE`.

    Raises:
        NothingToResumeError: it shall go on, and there is no such run.
    """
    if reuse == TRAIN_AGAIN:
        forget(parts, key)
    if parts is None or reuse == TRAIN_AGAIN:
        return _or_refuse(Left(key), reuse, "")
    if f"{key}.{ABOUT}" in parts:
        return Left(key, key)
    if reuse != RESUME:
        return Left(key)
    made_from = _made_from(given)
    abouts = list(_abouts(parts))
    found = [
        (left, planned, done)
        for about in abouts
        if about.get("made_from", {}).get("same") == made_from["same"]
        and (left := _added_to(parts, about, given.settings, key)) is not None
        for planned, done in [_steps_of(parts, about)]
    ]
    if found:
        return max(found, key=lambda one: (one[1] == given.settings.steps, one[2]))[0]
    return _or_refuse(Left(key), reuse, _what_differs(made_from, abouts, parts))


def _or_refuse(left: Left, reuse: str, kept: str) -> Left:
    if reuse != RESUME:
        return left
    raise NothingToResumeError(
        f"There is nothing to resume for these settings. {kept or 'No run is kept.'} "
        "Choose 'use if there' to train from the start."
    )


def journal_of(parts: MutableMapping[str, Part] | None, given: Given, left: Left) -> Journal:
    """The journal of a run, with what an earlier one found out.

    Args:
        parts: where it is kept, by name; None keeps nothing.
    """
    if parts is None or not given.settings.samples:
        return Journal(meter=given.meter)  # all of it is made in no time
    about = {"key": left.key, "history": left.history, "made_from": _made_from(given)}
    return Journal(parts, left.key, left.source, about, given.random, given.meter)


def _added_to(
    parts: Mapping[str, Part], about: Mapping[str, Any], settings: EraseSettings, key: str
) -> Left | None:
    """How a run that was left goes on with the steps of the settings; None if it can't."""
    source, (planned, done) = about["key"], _steps_of(parts, about)
    history = tuple((int(a), int(b)) for a, b in about.get("history", ()))
    if not done or done > settings.steps:
        return None
    if planned == settings.steps:
        return Left(source, source, history)
    history = (*history, (done, planned))
    own = steps_added_key(key, history)
    return Left(own, own if f"{own}.{ABOUT}" in parts else source, history)


def _steps_of(parts: Mapping[str, Part], about: Mapping[str, Any]) -> tuple[int, int]:
    """How many steps a run planned, and how many of them are done."""
    progress = parts.get(f"{about['key']}.{PROGRESS}")
    planned = about["made_from"]["settings"]["steps"]
    return planned, int(progress.values["steps"]) if progress else 0


def _abouts(parts: MutableMapping[str, Part]) -> Iterator[Mapping[str, Any]]:
    """What the runs that are kept are made from."""
    for name in list(parts):
        part = parts.get(name) if name.endswith(f".{ABOUT}") else None
        if part is not None and part.values.get("key") == name.removesuffix(f".{ABOUT}"):
            yield part.values


def _made_from(given: Given) -> dict[str, Any]:
    """What a run is made from, to be compared and told."""
    settings = given.settings
    same = dataclasses.replace(settings, steps=min(settings.steps, 1), trial_steps=0, stop_below=0)
    embeddings, read = given.prompts.tensors(), Digest()
    read.add("null", tensor_bytes(given.prompts.null.tokens))
    return {
        "same": result_key(same, embeddings, given.model.identity, VERSION),
        "settings": settings.as_dict(),
        "model": given.model.identity,
        "name": str(given.model.base.get("name", "")),
        "text encoder": read.hexdigest(),
        "version": VERSION,
    }


def _what_differs(
    asked: Mapping[str, Any], abouts: Sequence[Mapping[str, Any]], parts: Mapping[str, Part]
) -> str:
    """Of the run that is nearest to what was asked, what it is and in what it differs."""
    each = [(_differences(asked, about["made_from"]), about) for about in abouts]
    if not each:
        return ""
    differences, about = min(each, key=lambda pair: len(pair[0]))
    planned, done = _steps_of(parts, about)
    made_from = about["made_from"]
    if not differences:  # or it would have been gone on with
        differences = [
            f"steps ({planned} there, of which {done} are done; {asked['settings']['steps']} here)"
        ]
    concepts = concept_list({"concepts": made_from["settings"]["concepts"]})
    shown = "; ".join(differences[:MOST_DIFFERENCES])
    more = len(differences) - MOST_DIFFERENCES
    beside = f"; and {more} more" if more > 0 else ""
    return (
        f"The nearest run that is kept ({concepts}, {done} of {planned} steps done) differs in: "
        f"{shown}{beside}. Put that back to go on with it."
    )


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """In words, what keeps one run from going on where the other is."""
    found = []
    if here["version"] != there["version"]:
        found.append(f"the version ({there['version']} there, {here['version']} here)")
    if here["model"] != there["model"]:
        names = f" ({there['name']!r} there, {here['name']!r} here)"
        found.append("the model or a LoRA on it" + names * (here["name"] != there["name"]))
    if here["text encoder"] != there["text encoder"]:
        found.append("the text encoder")
    for name, value in here["settings"].items():
        other = there["settings"].get(name)
        if other != value and name not in MAY_DIFFER:
            found.append(f"{label(name)} ({_short(other)} there, {_short(value)} here)")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"
