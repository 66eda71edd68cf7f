"""How a picture is purified: what a person sets, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .prompts import plain_phrase
from .texts import MOST_CHARACTERS, SettingsError, plain_text

# Which part of a picture is drawn again.
AUTO, WHERE_FOUND, EVERYWHERE = "auto", "where it is seen", "everywhere"
AREAS = (AUTO, WHERE_FOUND, EVERYWHERE)
STEPS = (1, 1000)
LOWEST_LEVEL = 0.01
STYLE_EXAMPLE = "a house in {} style"
STRONGEST, STRONGEST_GUIDANCE = 5.0, 100.0


@dataclass(frozen=True)
class Purification:
    """How it is done.

    Attributes:
        steps: of the way up and of each way down.
        start_level: how far up the noise schedule the picture is taken, from 0 to 1; 0 leaves it as
            it is.
        guidance: scale of the guidance that draws what takes the concept's place.
        strength: of the erasure.
        prompt: what is on the picture, with the concept in it; "" for the concepts themselves.
        area: which part of the picture is drawn again, one of :data:`AREAS`.

    Raises:
        SettingsError: a value that can't work.
    """

    steps: int = 20
    start_level: float = 0.8
    guidance: float = 4.0
    strength: float = 1.0
    prompt: str = ""
    area: str = AUTO

    def __post_init__(self) -> None:
        for name, (low, high) in (
            ("steps", STEPS),
            ("start_level", (0.0, 1.0)),
            ("guidance", (0.0, STRONGEST_GUIDANCE)),
            ("strength", (0.0, STRONGEST)),
        ):
            _check_range(name, getattr(self, name), low, high)
        if 0 < self.start_level < LOWEST_LEVEL:
            raise SettingsError(
                f"start level is {self.start_level:g}. Below {LOWEST_LEVEL:g} nothing can change: "
                "type at least that, or 0 to leave the picture as it is.",
                "start_level",
            )
        if self.area not in AREAS:
            raise SettingsError(
                f"Unknown area {self.area!r}. Choose one of: {', '.join(AREAS)}.", "area"
            )
        if len(plain_text("prompt", self.prompt)) > MOST_CHARACTERS:
            raise SettingsError(
                f"prompt has {len(self.prompt)} characters, and at most {MOST_CHARACTERS} can be "
                "read. Make it shorter.",
                "prompt",
            )

    def everywhere(self, record: Mapping[str, Any]) -> bool:
        """Whether all of the picture is drawn again: a style is all over it."""
        if self.area != AUTO:
            return self.area == EVERYWHERE
        return any(kind == "style" for _, kind in _concepts(record))


def asked_prompts(asked: Purification, record: Mapping[str, Any]) -> list[str]:
    """The prompts that name what is to go: the person's own, else each concept in a plain phrase.

    Every name of a concept has one. A style has none: it is all over a picture, and a prompt that
    names nothing but a style draws a picture of nothing.

    Raises:
        SettingsError: a style, and no prompt.
    """
    if asked.prompt.strip():
        return [asked.prompt.strip()]
    concepts = _concepts(record)
    styles = [name for name, kind in concepts if kind == "style"]
    if styles:
        raise SettingsError(
            f"This erasure takes the style {styles[0]!r}, which is all over a picture: all of it "
            "is drawn again. Type what is on the picture, with the style in it, for "
            f"example: {STYLE_EXAMPLE.format(styles[0])}",
            "prompt",
        )
    own = record["settings"].get("templates") or []
    return list(dict.fromkeys(plain_phrase(name, kind, own) for name, kind in concepts))


def _concepts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and kind of everything that an erasure takes."""
    default = record["settings"].get("kind") or "object"
    return [
        (name, concept.get("kind") or default)
        for concept in record["concepts"]
        for name in (concept["text"], *concept.get("also", ()))
        if name.strip() and len(name) <= MOST_CHARACTERS
    ]


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or (name == "steps" and value != int(value)):
        raise SettingsError(
            f"{name.replace('_', ' ')} is {value!r}, and must be "
            f"{'a whole number ' if name == 'steps' else ''}between {low:g} and {high:g}.",
            name,
        )
