"""The sheet that compares a model with and without an erasure: what it shows, and where."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..method.reading import those_naming
from ..settings.prompts import name_of, plain_phrase
from ..settings.texts import (
    MOST_CHARACTERS,
    SettingsError,
    distinct_lines,
    folded,
    plain_text,
)
from .stack import STRONGEST

# What a prompt is to an erasure.
ERASED, KEPT, UNNAMED, EMPTY = "erased", "kept", "nobody named", "empty"
# Of each kind, where the record chooses: with the empty prompt eleven rows, which still are read.
MOST_ERASED, MOST_KEPT, MOST_UNNAMED = 4, 3, 3
# A sheet of these is 8,700 by 4,100 pixels at most, some 430 MB as the host hands pictures on.
MOST_PROMPTS, MOST_STRENGTHS, LONGEST_SIDE = 16, 6, 512
EMPTY_LINE = '""'  # a line that means the empty prompt, since blank lines are left out

SIDES = (16, 4096)  # pixels
STEPS = (1, 10_000)
STRONGEST_GUIDANCE = 100.0

MORE = "\N{HORIZONTAL ELLIPSIS}"  # marks what was left out of a label
# Characters of a prompt that are looked at to label it; no label has room for as many.
MOST_SHOWN = 400
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
_UNDRAWABLE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Row:
    """A prompt of the sheet, and what it is to the erasure."""

    text: str
    kind: str


@dataclass(frozen=True)
class Drawing:
    """How each picture of a sheet is drawn.

    Attributes:
        negative: the negative prompt.
        cfg: the guidance scale.
        width: of a picture, in pixels, like ``height``.
    """

    negative: str
    seed: int
    steps: int
    cfg: float
    width: int
    height: int
    sampler_name: str
    scheduler: str

    def __str__(self) -> str:
        return (
            f"seed {self.seed}, {self.steps} steps, cfg {self.cfg:g}, {self.sampler_name} "
            f"{self.scheduler}, {self.width} x {self.height}"
        )


def rows_of(given: Any, record: Mapping[str, Any]) -> list[Row]:
    """The prompts that a text names, one a line; for an empty text those that a record suggests.

    Raises:
        SettingsError: too many prompts, or lines that can't be read.
    """
    typed = typed_prompts(given)
    return [Row(text, kind_of(text, record)) for text in typed] or suggested_rows(record)


def typed_prompts(given: Any) -> list[str]:
    """The prompts of a text, one a line; blank, repeated and comment lines are left out.

    Raises:
        SettingsError: too many prompts, or lines that can't be read.
    """
    lines = distinct_lines("prompts", given)
    if len(lines) > MOST_PROMPTS:
        raise SettingsError(
            f"At most {MOST_PROMPTS} prompts fit on one sheet, not {len(lines)}. Take some out, or "
            "draw the rest with a second Compare Erasure.",
            "prompts",
        )
    return ["" if line == EMPTY_LINE else line for line in lines]


def kind_of(text: str, record: Mapping[str, Any]) -> str:
    """What a prompt is to an erasure. What must stay may well name what is erased."""
    if not text:
        return EMPTY
    measures = record["measures"]
    held = [one["text"] for one in (*measures["kept"], *measures["negative_prompts"])]
    if folded(text) in map(folded, held):
        return KEPT
    # By its words alone, and as it was typed.
    names = [
        name
        for concept, kind in _concepts(record, every_name=True)
        for name in (name_of(concept, kind), concept)
    ]
    return ERASED if names and those_naming([text], names) else UNNAMED


def suggested_rows(record: Mapping[str, Any]) -> list[Row]:
    """Prompts that show what an erasure does: concepts, what was kept, what it may have hit."""
    own = record["settings"].get("templates") or []
    erased = [plain_phrase(concept, kind, own) for concept, kind in _concepts(record)]
    kept = _readable(one["text"] for one in record["measures"]["kept"])
    rows: dict[str, Row] = {}
    for kind, texts, most in (
        (ERASED, erased, MOST_ERASED),
        (KEPT, kept, MOST_KEPT),
        (UNNAMED, _unnamed(record, own), MOST_UNNAMED),
        (EMPTY, [""], 1),
    ):
        fresh = [text for text in texts if folded(text) not in rows]
        for text in list(dict.fromkeys(fresh))[:most]:
            rows.setdefault(folded(text), Row(text, kind))
    return list(rows.values())


def _unnamed(record: Mapping[str, Any], own: Sequence[str]) -> list[str]:
    """What nobody named, by turns what is nearest to the concepts and what changes most."""
    others = record.get("others")
    if not others:
        return _readable(one["text"] for one in record["measures"]["unnamed"])
    turns = chain.from_iterable(zip_longest(others["nearest"], others["most_changed"]))
    words = _readable(one["text"] for one in turns if one)
    kinds = {kind for _, kind in _concepts(record)}
    # A word may be anything; only among things it is likely to be one itself.
    kind = "object" if kinds <= {"object"} else "tags"
    return [plain_phrase(word, kind, own) for word in words]


def _concepts(record: Mapping[str, Any], every_name: bool = False) -> list[tuple[str, str]]:
    """Text and kind of each concept that can be read; a file may hold anything as text.

    Args:
        every_name: whether its other names are given, too.
    """
    default = record["settings"].get("kind") or "object"
    return [
        (text, concept.get("kind") or default)
        for concept in record["concepts"]
        for text in _readable([concept["text"], *(concept.get("also", ()) if every_name else ())])
    ]


def _readable(texts: Iterable[str]) -> list[str]:
    lines = (" ".join(text.split()) for text in texts)
    return [line for line in lines if line and len(line) <= MOST_CHARACTERS]


def strengths_of(given: Any) -> tuple[float, ...]:
    """The strengths that a text names, in its order, each once.

    Raises:
        SettingsError: none, too many, or one that is no number or too large.
    """
    text = plain_text("strengths", given).replace("\N{MINUS SIGN}", "-")
    found = tuple(dict.fromkeys(_strength(part) for part in re.split(r"[\s,;]+", text) if part))
    if not found:
        raise SettingsError(
            "strengths is empty. Type the strengths to compare, for example: 0, 0.5, 1", "strengths"
        )
    if len(found) > MOST_STRENGTHS:
        raise SettingsError(
            f"At most {MOST_STRENGTHS} strengths fit on one sheet, not {len(found)}. Take some "
            "out.",
            "strengths",
        )
    return found


def columns_of(strengths: Sequence[float]) -> tuple[float, ...]:
    """The strengths with the untouched model among them: where nobody asked for it, in front."""
    return tuple(strengths) if 0.0 in strengths else (0.0, *strengths)


def _strength(part: str) -> float:
    value = float(part) if _NUMBER.fullmatch(part) else math.nan
    if not -STRONGEST <= value <= STRONGEST:
        raise SettingsError(
            f"{part[:40]!r} is no strength. Type numbers between {-STRONGEST:g} and {STRONGEST:g} "
            "with a comma between them, for example: 0, 0.5, 1",
            "strengths",
        )
    return value + 0.0  # -0 as 0


def drawing_of(
    record: Mapping[str, Any],
    *,
    negative: str,
    seed: int,
    steps: int,
    cfg: float,
    width: int,
    height: int,
    sampler_name: str,
    scheduler: str,
) -> Drawing:
    """How pictures are drawn; 0 leaves size and guidance to the record.

    Links bring values that no host has checked, and a file may hold any size.

    Raises:
        SettingsError: a value out of its range.
    """
    asked = record["settings"]
    width, height = (side or asked["resolution"] for side in (width, height))
    cfg = cfg or asked["guidance_scale"]
    for name, value, (low, high) in (
        ("width", width, SIDES),
        ("height", height, SIDES),
        ("steps", steps, STEPS),
        ("cfg", cfg, (0.0, STRONGEST_GUIDANCE)),
    ):
        if not low <= value <= high:
            raise SettingsError(
                f"{name} is {value!r}, and must be between {low:g} and {high:g}. Where you left it "
                "to the erasure, type a number here.",
                name,
            )
    return Drawing(negative, seed, steps, cfg, width, height, sampler_name, scheduler)


@dataclass(frozen=True)
class Layout:
    """Where everything is on a sheet, in pixels: labels at the left, strengths above.

    Attributes:
        rows: number of prompts.
        columns: number of strengths.
        width: of a picture on the sheet, like ``height``.
    """

    rows: int
    columns: int
    width: int
    height: int

    @classmethod
    def of(cls, pictures: Sequence[Sequence[Tensor]]) -> Layout:
        """Of pictures (height, width, 3) that are all of one size, those of each row."""
        height, width = pictures[0][0].shape[:2]
        return cls(len(pictures), len(pictures[0]), width, height)

    @property
    def text(self) -> int:
        """Size of the letters: small pictures have small ones, but such as can be read."""
        return min(24, max(12, self.height // 20))

    @property
    def margin(self) -> int:
        """Space around everything."""
        return self.text

    @property
    def gap(self) -> int:
        """Space between two pictures."""
        return max(4, self.text // 3)

    @property
    def label_width(self) -> int:
        """Width of what stands at the left."""
        return 12 * self.text

    @property
    def line(self) -> int:
        """From one line of text to the next."""
        return self.text * 5 // 4

    @property
    def pitch(self) -> tuple[int, int]:
        """From one picture to the next; very small ones stand apart, for the labels' sake."""
        across, down = max(self.width, 5 * self.text), max(self.height, 3 * self.line)
        return across + self.gap, down + self.gap

    @property
    def first(self) -> tuple[int, int]:
        """(left, top) of the first picture: two lines of header are above it."""
        return (
            self.margin + self.label_width + self.margin,
            self.margin + 2 * self.line + self.gap,
        )

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the sheet, which ends with a line of text."""
        right, bottom = self.cell(self.rows, self.columns)
        return right - self.gap + self.margin, bottom + self.line + self.margin

    def cell(self, row: int, column: int) -> tuple[int, int]:
        """(left, top) of a picture."""
        (left, top), (across, down) = self.first, self.pitch
        return left + column * across, top + row * down

    def filled(self, background: Tensor, pictures: Sequence[Sequence[Tensor]]) -> Tensor:
        """The sheet with its pictures in their places.

        Args:
            background: (height, width, 3), with the labels on it.
            pictures: those of each row, (height, width, 3) each.
        """
        sheet = background.clone()
        for row, of_row in enumerate(pictures):
            for column, picture in enumerate(of_row):
                left, top = self.cell(row, column)
                sheet[top : top + self.height, left : left + self.width] = picture
        return sheet


def fitted(picture: Tensor, longest: int = LONGEST_SIDE) -> Tensor:
    """A picture (height, width, 3) as large as a sheet has room for; a smaller one as it is."""
    height, width = picture.shape[:2]
    if max(height, width) <= longest:
        return picture
    size = [max(1, round(side * longest / max(height, width))) for side in (height, width)]
    smaller = F.interpolate(picture.movedim(-1, 0)[None].float(), size=size, mode="area")
    return smaller[0].movedim(0, -1)


def one_line(text: str) -> str:
    """A prompt as it can be drawn: on one line, short enough to look at, with printable letters."""
    line = " ".join(text[: 2 * MOST_SHOWN].split())
    line = "".join(letter if letter.isprintable() else _UNDRAWABLE for letter in line)
    return line if len(line) <= MOST_SHOWN else line[:MOST_SHOWN] + MORE


def wrapped(text: str, width: float, most: int, measure: Callable[[str], float]) -> list[str]:
    """A text on lines; what doesn't fit is left out and marked.

    Args:
        width: of a line.
        most: lines, at least 1.
        measure: width of a text.
    """
    lines: list[str] = []
    rest = text.strip()
    while rest and len(lines) < most:
        fits = 1
        while fits < len(rest) and measure(rest[: fits + 1]) <= width:
            fits += 1
        blank = rest.rfind(" ", 0, fits + 1)
        end = blank if blank > 0 and fits < len(rest) else fits
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and measure(last + MORE) > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + MORE
    return lines
