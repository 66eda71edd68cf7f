"""What the user asked for: one frozen, validated settings object."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

KINDS = ("object", "style")


class SettingsError(ValueError):
    """A setting that can't work. The message says what is wrong, what was given, what to do."""


@dataclass(frozen=True)
class EraseSettings:
    """One erasure, as asked for.

    Texts are stripped on construction and the prompt lists lose blank and repeated lines.

    Attributes:
        concept: what the model must stop drawing, as a user types it ("cat", "Van Gogh").
        alternative: what takes its place; empty means the same prompt without the concept.
        keep: prompts whose pictures must stay as they are, most important first.
        negative_prompts: negative prompts the user samples with; kept exact like the null prompt.
        kind: "object" or "style"; decides the prompt templates.
        eta: push beyond the alternative, in multiples of g(a) - g(e). Turns the concept in a
            *negative* prompt around, see :func:`guidance.surgical_target`.
        rank: columns of the shared basis R, i.e. the rank of every weight change.
        protection: weight of the ridge on ordinary language (mu of the hard form), in the closed
            form that training starts from and in training.
        steps: optimiser steps.
        batch: states per optimiser step.
        learning_rate: Adam's step relative to the root mean square of each matrix.
        trajectories: frozen trajectories in the pool; a quarter of them is held out.
        sampling_steps: sampler steps of each trajectory.
        guidance_scale: guidance scale of the trajectories (1 for distilled models).
        resolution: side of the training pictures in pixels.
        captions: how many plain captions stand for ordinary language.
        seed: seed of noise, templates and draws.

    Raises:
        SettingsError: on any value that can't work.
    """

    concept: str
    alternative: str = ""
    keep: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    kind: str = "object"
    eta: float = 0.0
    rank: int = 64
    protection: float = 1.0
    steps: int = 60
    batch: int = 2
    learning_rate: float = 0.003
    trajectories: int = 16
    sampling_steps: int = 9
    guidance_scale: float = 5.0
    resolution: int = 512
    captions: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("concept", "alternative", "kind"):
            object.__setattr__(self, name, _text(name, getattr(self, name)))
        for name in ("keep", "negative_prompts"):
            object.__setattr__(self, name, _lines(name, getattr(self, name)))
        self._check_texts()
        self._check_numbers()

    def _check_texts(self) -> None:
        if not self.concept:
            raise SettingsError(
                "Nothing to erase: the concept is empty. Type what the model must stop drawing, "
                "for example 'cat'."
            )
        if "\n" in self.concept or "\n" in self.alternative:
            raise SettingsError(
                f"One concept at a time: {self.concept!r} => {self.alternative!r} has several "
                "lines. Use one Train Concept Erasure node per concept and apply them in a row."
            )
        if same_text(self.concept, self.alternative):
            raise SettingsError(
                f"The concept and what replaces it are the same: {self.concept!r}. Name something "
                "else, or leave 'replace with' empty to remove the concept."
            )
        if self.kind not in KINDS:
            raise SettingsError(f"Unknown kind {self.kind!r}. Choose one of: {', '.join(KINDS)}.")

    def _check_numbers(self) -> None:
        for name, low, high in _INTEGER_RANGES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise SettingsError(f"{_label(name)} must be a whole number, not {value!r}.")
            if not low <= value <= high:
                raise SettingsError(_range_message(name, value, low, high))
        for name, low, high in _FLOAT_RANGES:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise SettingsError(f"{_label(name)} must be a finite number, not {value!r}.")
            if not low <= value <= high:
                raise SettingsError(_range_message(name, value, low, high))
        if self.resolution % 8:
            raise SettingsError(
                f"resolution must be a multiple of 8, not {self.resolution}. "
                f"Try {self.resolution // 8 * 8 or 8}."
            )

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, for the record of an erasure."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }


PRESETS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "thorough": {"steps": 160, "trajectories": 24, "sampling_steps": 12},
}


def preset_settings(preset: str, **values: Any) -> EraseSettings:
    """Settings of a named preset, with every given value that is not None put over it.

    Args:
        preset: a key of :data:`PRESETS`.
        **values: fields of :class:`EraseSettings`; ``concept`` is required, None means
            "as the preset says".

    Raises:
        SettingsError: unknown preset, or a value that can't work.
    """
    if preset not in PRESETS:
        raise SettingsError(f"Unknown preset {preset!r}. Choose one of: {', '.join(PRESETS)}.")
    given = {key: value for key, value in values.items() if value is not None}
    return EraseSettings(**{**PRESETS[preset], **given})


def same_text(one: str, other: str) -> bool:
    """Whether two texts are one prompt to a text encoder that folds case and white space."""
    return one.casefold().split() == other.casefold().split()


_INTEGER_RANGES = (
    ("rank", 1, 256),
    ("steps", 1, 10_000),
    ("batch", 1, 64),
    ("trajectories", 2, 256),
    ("sampling_steps", 2, 200),
    ("resolution", 8, 4096),
    ("captions", 8, 100_000),
    ("seed", 0, 2**64 - 1),
)
_FLOAT_RANGES = (
    ("eta", 0.0, 10.0),
    ("protection", 0.0, 1e4),
    ("learning_rate", 1e-6, 10.0),
    ("guidance_scale", 0.0, 100.0),
)
_ADVICE = {
    "steps": "60 is the balanced preset's choice.",
    "rank": "64 is usual; more only helps when the report says that little is left of the edit.",
    "eta": "0 moves to the alternative, 1 pushes as far again beyond it.",
    "learning_rate": "0.003 is usual; above 0.005 the start is undone.",
    "trajectories": "Two are the least: one to train on, one to check on.",
}


def _label(name: str) -> str:
    return name.replace("_", " ")


def _range_message(name: str, value: float, low: float, high: float) -> str:
    advice = _ADVICE.get(name, "")
    return f"{_label(name)} must be between {low:g} and {high:g}, not {value!r}. {advice}".strip()


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SettingsError(f"{_label(name)} must be text, not {value!r}.")
    return value.strip()


def _lines(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.splitlines()
    kept: list[str] = []
    for line in value:
        line = _text(name, line)
        if line and not any(same_text(line, other) for other in kept):
            kept.append(line)
    return tuple(kept)
