"""The words on a sheet that compares pictures, and charts, drawn with the host's Pillow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..erase_core.artefact.chart import PAPER, Chart, neighbour_chart
from ..erase_core.artefact.sheet import (
    EMPTY,
    ERASED,
    KEPT,
    MORE,
    UNNAMED,
    Layout,
    Row,
    one_line,
    wrapped,
)

BACKGROUND = (238, 238, 238)  # neutral, so that it tints no picture
INK, FAINT = (32, 32, 32), (110, 110, 110)
COLOURS = {ERASED: (176, 42, 36), KEPT: (24, 112, 60), UNNAMED: (32, 84, 160), EMPTY: FAINT}
NOTES = {0.0: "untouched", 1.0: "as trained"}
NO_PROMPT = "(no prompt)"
# Pillow's own letters are those of English. Others are looked for among what systems come with.
OTHER_FONTS = (
    "DejaVuSans.ttf",
    "arial.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "YuGothM.ttc",
    "malgun.ttf",
    "Hiragino Sans GB.ttc",
)
_NO_LETTER = "\U0010ffff"


def labelled(
    layout: Layout, rows: Sequence[Row], strengths: Sequence[float], caption: str
) -> Tensor:
    """A sheet without its pictures, (height, width, 3) from 0 to 1.

    Args:
        caption: the line at the end, of how the pictures were drawn.
    """
    from PIL import Image, ImageDraw  # no other node draws letters

    image = Image.new("RGB", layout.size, BACKGROUND)
    pen = ImageDraw.Draw(image)
    texts = [one_line(row.text) or NO_PROMPT for row in rows]
    font = _font(layout.text, "".join(texts))
    _write(pen, font, layout, (layout.margin, layout.margin), "strength", FAINT)
    for column, strength in enumerate(strengths):
        left = layout.cell(0, column)[0]
        across = layout.pitch[0] - layout.gap
        lines = [(f"{strength:g}", INK), (NOTES.get(strength, ""), FAINT)]
        for number, (text, ink) in enumerate(lines):
            place = (left, layout.margin + number * layout.line)
            _write(pen, font, layout, place, text, ink, across)
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        top = layout.cell(number, 0)[1]
        _write(pen, font, layout, (layout.margin, top), row.kind, COLOURS[row.kind])
        most = (layout.pitch[1] - layout.gap) // layout.line - 1
        place = (layout.margin, top + layout.line)
        _write(pen, font, layout, place, text, INK, layout.label_width, most)
    bottom = layout.size[1] - layout.margin - layout.line
    across = layout.size[0] - 2 * layout.margin
    _write(pen, font, layout, (layout.margin, bottom), caption, FAINT, across)
    return _values(image)


def map_picture(record: Mapping[str, Any]) -> Tensor:
    """What an erasure does to its concepts and to their neighbours, (height, width, 3)."""
    return charted(neighbour_chart(record))


def charted(chart: Chart) -> Tensor:
    """A chart as a picture, (height, width, 3) from 0 to 1."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (chart.width, chart.height), PAPER)
    pen = ImageDraw.Draw(image)
    for box in chart.boxes:
        pen.rectangle((box.left, box.top, box.right - 1, box.bottom - 1), box.colour)
    for line in chart.lines:
        font = _font(line.size, line.text)
        for text in wrapped(line.text, line.width, 1, _measure(font)):
            pen.text((line.left, line.top), _drawable(text, font), line.colour, font)
    return _values(image)


def _values(image: Any) -> Tensor:
    """A picture of Pillow's, (height, width, 3) from 0 to 1."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).float() / 255


def _measure(font: Any) -> Callable[[str], float]:
    """The width of a text as it can be drawn."""
    return lambda text: font.getlength(_drawable(text, font))


def _write(
    pen: Any,
    font: Any,
    layout: Layout,
    place: tuple[int, int],
    text: str,
    ink: tuple[int, int, int],
    width: int = 0,
    most: int = 1,
) -> None:
    """A text from (left, top) on, in ``most`` lines; by default in one as wide as the labels."""
    across = width or layout.label_width
    lines = wrapped(text, across, most, _measure(font))
    for number, line in enumerate(lines):
        spot = (place[0], place[1] + number * layout.line)
        pen.text(spot, _drawable(line, font), ink, font)


def _font(size: int, letters: str) -> Any:
    """Pillow's own font; where it lacks letters, the font at hand that lacks the fewest."""
    from PIL import ImageFont

    try:
        own = ImageFont.load_default(size)
    except TypeError:  # before Pillow 10.1 it has one size, and no FreeType about it
        return ImageFont.load_default()
    fonts = [own]
    for name in OTHER_FONTS if _lacking(own, letters) else ():
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # this computer hasn't got it
            continue
    return min(fonts, key=lambda font: _lacking(font, letters))


def _lacking(font: Any, letters: str) -> int:
    """How many different letters a font draws as the one that stands for none."""
    none = bytes(font.getmask(_NO_LETTER))
    return sum(bytes(font.getmask(letter)) == none for letter in set(letters) - {" "})


def _drawable(text: str, font: Any) -> str:
    """The old Pillow's letters are those of Latin 1, and it refuses any other."""
    from PIL import ImageFont

    if isinstance(font, ImageFont.ImageFont):
        return text.replace(MORE, "...").encode("latin-1", "replace").decode("latin-1")
    return text
