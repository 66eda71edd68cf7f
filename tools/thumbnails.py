"""Thumbnails of the example workflows: before and after, drawn by the small model of the demo.

Runs in ``build/venv``, and takes minutes: each case is really trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from concept_surgery.erase_core import erase, preset_settings
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from PIL import Image, ImageDraw, ImageFont

from benchmarks.emoji.build import build_emoji_checkpoint
from benchmarks.erasure.painter import Painter
from benchmarks.erasure.run import leave_out_empty_layers
from tools.environment import BUILD
from tools.templates import FOLDER, TEMPLATES

CELL, GAP, LINE = 160, 8, 24  # pixels
BACKGROUND, INK = (32, 33, 36), (235, 235, 235)
STEPS, SEED = 20, 7
QUALITY = 85


@dataclass(frozen=True)
class Case:
    """What a thumbnail shows.

    Attributes:
        concepts: as they are typed.
        prompts: one picture each, and the name over it.
        strengths: one row each.
        settings: others than the preset's.
    """

    concepts: str
    prompts: tuple[tuple[str, str], ...]
    strengths: tuple[float, ...] = (0.0, 1.0)
    settings: tuple[tuple[str, Any], ...] = ()


CASES = {
    "replace": Case(
        "cat => rabbit", (("a photo of a cat", "cat"), ("a dog", "dog"), ("a tiger", "tiger"))
    ),
    "remove": Case(
        "umbrella",
        (("a photo of an umbrella", "umbrella"), ("a house", "house"), ("a rose", "rose")),
    ),
    "style": Case(
        "ink => flat",
        (("a fox, ink", "fox, ink"), ("a tree, ink", "tree, ink"), ("a fox, clay", "fox, clay")),
        settings=(("kind", "style"),),
    ),
    "several": Case(
        "cat => dog\ncar => bicycle",
        (("a photo of a cat", "cat"), ("a photo of a car", "car"), ("a house", "house")),
    ),
    "tags": Case(
        "crown => star",
        (("crown, cartoon", "crown"), ("heart, cartoon", "heart"), ("owl, cartoon", "owl")),
        settings=(("kind", "tags"),),
    ),
    "sdxl": Case(
        "cat => dog", (("a photo of a cat", "cat"), ("a lion", "lion"), ("a koala", "koala"))
    ),
    "distilled": Case(
        "cat => dog", (("a cat, clay", "cat"), ("a panda, clay", "panda"), ("a bus, clay", "bus"))
    ),
    "sweep": Case(
        "cat => rabbit", (("a photo of a cat", "cat"), ("a dog", "dog")), (0.0, 0.5, 1.0)
    ),
}


def draw(folder: Path = FOLDER, cases: Sequence[str] = tuple(CASES)) -> None:
    """Train each case, and draw the thumbnails of the templates that show it."""
    path = build_emoji_checkpoint(BUILD / "checkpoints" / "emoji.safetensors")
    painter = Painter(path, STEPS, fast=False)
    leave_out_empty_layers(painter.clip)
    for name in cases:
        image = _picture(CASES[name], _rows(painter, CASES[name]))
        for template in TEMPLATES:
            if template.shown == name:
                image.save(folder / f"{template.stem}.jpg", quality=QUALITY, optimize=True)
                print(template.stem, flush=True)


def _rows(painter: Painter, case: Case) -> list[np.ndarray]:
    """The pictures of each strength, (n, height, width, 3)."""
    settings = preset_settings(
        "instant", concepts=case.concepts, resolution=64, captions=200, **dict(case.settings)
    )
    with painter.denoiser("key-value") as denoiser:
        edit = erase(settings, denoiser).edit()
    texts = [text for text, _ in case.prompts]
    # Pictures of 64 pixels, as latents. The generator makes the same ones everywhere.
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn((len(texts), 4, 8, 8), generator=generator)
    return [
        painter.pages(painter.latents(texts, [""] * len(texts), noise, _at(edit, strength)))
        for strength in case.strengths
    ]


def _at(edit: LowRankEdit, strength: float) -> LowRankEdit | None:
    if not strength:
        return None
    factors = {name: strength * factor for name, factor in edit.factors.items()}
    return LowRankEdit(edit.bases, factors)


def _picture(case: Case, rows: Sequence[np.ndarray]) -> Image.Image:
    """The pictures under their names, a row for each strength with a word in front."""
    label = 64
    width = label + len(case.prompts) * (CELL + GAP) + GAP
    height = LINE + len(rows) * (CELL + GAP) + GAP
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for column, (_, name) in enumerate(case.prompts):
        pen.text((label + GAP + column * (CELL + GAP), 4), name, INK, font)
    for row, (strength, pages) in enumerate(zip(case.strengths, rows, strict=True)):
        top = LINE + GAP + row * (CELL + GAP)
        words = {0.0: "before", 1.0: "after"} if len(rows) == 2 else {}
        pen.text((GAP, top + CELL // 2), words.get(strength, f"{strength:g}"), INK, font)
        for column, page in enumerate(pages):
            cell = Image.fromarray(page).resize((CELL, CELL), Image.Resampling.BICUBIC)
            canvas.paste(cell, (label + GAP + column * (CELL + GAP), top))
    return canvas


if __name__ == "__main__":
    draw()
