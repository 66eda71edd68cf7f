"""The report as Markdown: the verdict first, then the details in tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .report import note_lines
from .verdict import (
    EXACT,
    GONE,
    changed_words,
    grade,
    keep_room,
    kept_prompts,
    moved,
    names_of,
    of_words,
    outcome,
    percent,
    plain,
    verdict,
    way_gone,
)

# What begins something in Markdown wherever it stands. Tags and entities are escaped as HTML, so
# that a page that takes the text for HTML shows them as text, too.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\`*_\[\]{}|~#!$^]")
# What does so at the beginning of a line, and what makes an address a link.
_BEGINNING = re.compile(r"^(\d*)([.)](?=\s|$)|[-+=:](?!\d))")
_ADDRESS = re.compile(r":(?=//)|(?<=www)\.|@", re.IGNORECASE)
MOST_WORDS = 16  # rows of the table of what else changes


def report_markdown(record: Mapping[str, Any], notes: Sequence[str] | None = None) -> str:
    """The whole report; nothing in a prompt or a name from a file takes effect in it.

    Args:
        record: the record of an erasure, of any version.
        notes: more lines, for example what the host could not take into account.
    """
    first, *rest = verdict(record, escaped)
    parts = [f"**{first}**" if grade(record) == "good" else f"**⚠ {first}**", *rest]
    parts += [*_list("Warnings", record["warnings"]), *_concepts(record), *_staying(record)]
    parts += [*_others(record), *_making(record)]
    parts += [*_list("Notes", [*note_lines(record), *(notes or ())]), *_words(record)]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """A text on one line that Markdown and HTML show as it is."""
    line = plain(text)
    line = _SPECIAL.sub(lambda found: "\\" + found[0], line)
    line = _BEGINNING.sub(r"\1\\\2", line)
    line = _ADDRESS.sub(lambda found: "\\" + found[0], line)
    return re.sub("[&<>]", lambda found: _ENTITIES[found[0]], line)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of cells that are escaped already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    return [f"## {title}", "\n".join(f"- {escaped(line)}" for line in lines)]


def _concepts(record: Mapping[str, Any]) -> list[str]:
    """What became of each concept."""
    head = ("concept", "what takes its place", "verdict", "how far it went", "room left for it")
    rows = [
        (
            escaped(" or ".join(names_of(concept))),
            escaped(concept["alternative"]) or "nothing in particular",
            outcome(record, concept)
            if outcome(record, concept) == GONE
            else f"**{outcome(record, concept)}**",
            way_gone(moved(concept)),
            percent(concept["share_left"]),
        )
        for concept in record["concepts"]
    ]
    return ["## What was erased", _table(head, rows), *_movement(record)]


def _movement(record: Mapping[str, Any]) -> list[str]:
    """How far the pictures went, at the beginning, in the middle and at the end of a picture."""
    held_out, sampled = record["measures"]["moved_held_out"], record["measures"]["moved_sampled"]
    if held_out is None:
        return []
    head = ("how far, all concepts together", "share of the way")
    rows = [
        ("on pictures of the untouched model", way_gone(held_out["overall"])),
        ("of these, first steps of a picture", way_gone(held_out["high"])),
        ("of these, middle steps", way_gone(held_out["middle"])),
        ("of these, last steps", way_gone(held_out["low"])),
        ("on pictures of the erased model", way_gone(sampled["overall"])),
    ]
    return [_table(head, rows)]


def _staying(record: Mapping[str, Any]) -> list[str]:
    """Prompts that must stay, each with how it is held."""
    measures, hard = record["measures"], record["form"] == "hard"
    head = ("prompt", "how it is kept", "how much it shifts", "why not exactly, and what helps")
    rows = [
        _held("*the empty prompt*", hard, measures["null_drift"]),
        _held("*zeros in place of a prompt*", hard, measures["zeroed_drift"]),
    ]
    for entry in measures["negative_prompts"]:
        rows.append(_held(f"{escaped(entry['text'])} *(negative)*", hard, entry["drift"]))
    for kept in kept_prompts(record):
        rows.append(_held(escaped(kept.text), kept.exact, kept.drift, kept.reason))
    return ["## What stays", _table(head, rows)]


def _held(text: str, exact: bool, drift: float, reason: str = "") -> tuple[str, ...]:
    """A row of what stays; exact is said of what was measured to be."""
    holds = exact and drift <= EXACT
    how = "exactly" if holds else "**meant to be exact, and isn't**" if exact else "nearly"
    return text, how, "rounding" if drift <= EXACT else percent(drift), reason


def _others(record: Mapping[str, Any]) -> list[str]:
    """What nobody named, the most changed first."""
    words = changed_words(record)
    if not words:
        return []
    others = record.get("others") or {}
    nearest = {one["text"] for one in others.get("nearest", ())}
    rows = [
        (
            escaped(one["text"]),
            percent(one["drift"]),
            "close to what is erased" if one["text"] in nearest else "",
        )
        for one in words[:MOST_WORDS]
    ]
    average = percent(record["measures"]["unnamed_drift"])
    text = f"On average, what nobody named changes by {average}. The most changed that were tried:"
    return ["## What else changes", text, _table(("word", "change", ""), rows)]


def _making(record: Mapping[str, Any]) -> list[str]:
    """On what, when and how it was made."""
    base = record["base"].get("name") or record["family"]
    rows = [
        ("model", f"{escaped(base)} ({escaped(record['family'])})"),
        ("made", f"{escaped(record['created'])}, version {escaped(record['version'])}"),
        ("steps", f"{record['steps_done']} of {record['settings']['steps']}"),
        ("evaluations of the model", f"{record['forward_equivalents']}"),
        ("seconds", f"{record['seconds']:.0f}"),
        ("size", f"rank {record['rank']} in {record['matrices']} matrices"),
        ("protection of other words", f"{record['protection']:g}"),
    ]
    return ["## How it was made", _table(("", ""), rows)]


def _words(record: Mapping[str, Any]) -> list[str]:
    """The figures, explained once."""
    of = "what the model makes of the words" if of_words(record) else "the model's prediction"
    lines = [
        "**How far it went**: 100 % is all the way from the concept to what takes its place, "
        "measured on samples that nothing was learned from. Where nothing was sampled, it is "
        "measured on what the model makes of the words.",
        "**Exactly**: the change is built so that it can't see the prompt. What is left is "
        "rounding, a hundred-thousandth at most.",
        f"**How much it shifts**: the change of {of}, relative to itself.",
        "**Room left for it**: what the exactly kept prompts leave to the concept. They must leave "
        f"{percent(keep_room(record))}.",
        "**Change** of a word: how much what the model reads of it (its keys and values) changes, "
        "relative to itself. Up to 20 % is hardly seen in pictures.",
    ]
    return ["## What the figures mean", "\n".join(f"- {line}" for line in lines)]
