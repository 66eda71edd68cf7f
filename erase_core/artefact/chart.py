"""The map of neighbours as a bar chart: what is drawn and where. A face draws it.

Everything is boxes and lines of text at given places, so that a face needs nothing but a pen.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .cautions import HARM
from .sheet import one_line, wrapped
from .verdict import (
    GONE,
    THERE,
    TRACES,
    UNTOLD,
    changed_words,
    grade,
    kept_prompts,
    moved,
    outcome,
    percent,
    verdict,
    way_gone,
)

# Of the picture; where it is shown at half its size, its letters are 13 pixels high.
WIDTH, MARGIN, TEXT, PITCH = 1024, 32, 26, 44
NAMES, FIGURES = 340, 150  # widths of what stands at the left and at the right of the bars
MOST_CONCEPTS, MOST_KEPT, MOST_WORDS = 4, 4, 12
# Of the verdict: sentences, lines of each, from one line to the next, and the width of a letter
# as a share of its height.
MOST_SENTENCES, LINES, LINE, LETTER = 7, 3, 34, 0.52
FULL = 1.0  # the share that is a whole bar; longer ones end there and their figure says it
THINNEST = 3  # pixels of a bar that isn't nothing

Colour = tuple[int, int, int]
PAPER: Colour = (250, 250, 248)
INK: Colour = (32, 32, 32)
FAINT: Colour = (104, 104, 104)
GROOVE: Colour = (228, 228, 224)
GOOD: Colour = (24, 112, 60)
BAD: Colour = (176, 42, 36)
WORD: Colour = (32, 84, 160)
WARNED: Colour = (196, 110, 20)
COLOURS = {GONE: GOOD, TRACES: WARNED, THERE: BAD, UNTOLD: FAINT}
GRADES = {"good": INK, "traces": WARNED, "harm": WARNED, "not gone": BAD, "ruin": BAD}
NO_WORDS = "This file doesn't say what else changes."


@dataclass(frozen=True)
class Box:
    """A filled rectangle, in pixels from the left and the top."""

    left: int
    top: int
    right: int
    bottom: int
    colour: Colour


@dataclass(frozen=True)
class Line:
    """A line of text that ends at its width, however long the text is.

    Attributes:
        left, top: of its letters, which are ``size`` high.
    """

    left: int
    top: int
    width: int
    text: str
    colour: Colour
    size: int = TEXT


@dataclass
class Chart:
    """Boxes and lines, drawn in this order: boxes first."""

    width: int = WIDTH
    height: int = MARGIN
    boxes: list[Box] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    def title(self, text: str, colour: Colour = FAINT) -> None:
        """A line over what follows."""
        self.height += PITCH // 4
        across = self.width - 2 * MARGIN
        self.lines.append(Line(MARGIN, self.height, across, text, colour))
        self.height += PITCH

    def bar(self, name: str, share: float, figure: str, colour: Colour) -> None:
        """A name, a bar as long as its share, and the figure behind it.

        Args:
            share: of :data:`FULL`; what is no number has a whole bar.
        """
        top, left = self.height, MARGIN + NAMES
        right = self.width - MARGIN - FIGURES
        filled = FULL if math.isnan(share) else min(FULL, max(0.0, share))
        length = round((right - left) * filled / FULL)
        if share > 0:
            length = max(THINNEST, length)
        thick = TEXT + 4
        self.boxes.append(Box(left, top, right, top + thick, GROOVE))
        if length:
            self.boxes.append(Box(left, top, left + length, top + thick, colour))
        self.lines.append(Line(MARGIN, top, NAMES - MARGIN // 2, one_line(name), INK))
        self.lines.append(Line(right + 12, top, FIGURES - 12, figure, INK))
        self.height += PITCH


def neighbour_chart(record: Mapping[str, Any]) -> Chart:
    """What is gone, what was kept, and what else changes, each as a bar.

    Args:
        record: the record of an erasure, of any version.
    """
    chart = Chart()
    _verdict(chart, record)
    _concepts(chart, record)
    _kept(chart, record)
    _words(chart, changed_words(record))
    chart.height += MARGIN // 2
    return chart


def _verdict(chart: Chart, record: Mapping[str, Any]) -> None:
    """The sentences over the bars, since not every host shows text beside a picture."""
    colour = GRADES[grade(record)]
    for sentence in verdict(record)[:MOST_SENTENCES]:
        for text in wrapped(one_line(sentence), WIDTH - 2 * MARGIN, LINES, _estimated):
            chart.lines.append(Line(MARGIN, chart.height, WIDTH - 2 * MARGIN, text, colour))
            chart.height += LINE
        colour = INK


def _estimated(text: str) -> float:
    """About how wide a text is, in pixels; the letters of some scripts are as wide as high."""
    wide = sum(unicodedata.east_asian_width(letter) in "FW" for letter in text)
    return TEXT * (wide + LETTER * (len(text) - wide))


def _concepts(chart: Chart, record: Mapping[str, Any]) -> None:
    chart.title("erased: how far it went")
    for concept in record["concepts"][:MOST_CONCEPTS]:
        colour = COLOURS[outcome(record, concept)]
        chart.bar(concept["text"], moved(concept), way_gone(moved(concept)), colour)
    _more(chart, len(record["concepts"]) - MOST_CONCEPTS)


def _kept(chart: Chart, record: Mapping[str, Any]) -> None:
    kept = kept_prompts(record)
    if not kept:
        return
    chart.title("kept: how much it shifts")
    for one in kept[:MOST_KEPT]:
        figure = "exact" if one.exact else percent(one.drift)
        colour = _colour_of(one.drift)
        chart.bar(one.text, 0.0 if one.exact else one.drift, figure, colour)
    _more(chart, len(kept) - MOST_KEPT)


def _words(chart: Chart, words: Sequence[Mapping[str, Any]]) -> None:
    if not words:
        chart.title(NO_WORDS)
        return
    chart.title("nobody named: what else changes")
    for one in words[:MOST_WORDS]:
        chart.bar(one["text"], one["drift"], percent(one["drift"]), _colour_of(one["drift"]))


def _more(chart: Chart, count: int) -> None:
    if count > 0:
        chart.title(f"and {count} more")


def _colour_of(change: float) -> Colour:
    """Red from where pictures begin to suffer; what is no number is among it."""
    return WORD if change <= HARM else BAD
