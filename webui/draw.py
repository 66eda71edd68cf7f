"""Pictures without and with an erasure, drawn by the host as it draws all others."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from ..erase_core.artefact.sheet import Drawing, Row, drawing_of, one_line, rows_of
from . import host, loras

JOB = "Concept Surgery: before and after"
STEPS, SAMPLER = 20, "Euler"
LONGEST_CAPTION = 80
Pair = tuple[Row, Any, Any]


def before_and_after(
    name: str, record: Mapping[str, Any], prompts: str = "", seed: int = 0, steps: int = STEPS
) -> list[Pair]:
    """Each prompt with the picture of the untouched model and that with the erasure.

    Args:
        name: of the erasure among the host's LoRAs.
        prompts: one a line; empty for those that the record suggests.

    Raises:
        SettingsError: too many prompts, or lines that can't be read.
        InterruptedByUserError: the host's Interrupt was pressed.
    """
    rows = rows_of(prompts, record)
    drawing = drawing_of(
        record,
        negative="",
        seed=seed,
        steps=steps,
        cfg=0.0,
        sampler_name=SAMPLER,
        scheduler="",
        width=0,
        height=0,
    )
    tag = loras.tag_of(name)
    return host.in_turn(
        JOB,
        lambda: [
            (row, _picture(row.text, drawing), _picture(f"{row.text} {tag}", drawing))
            for row in rows
        ],
    )


def as_gallery(pairs: list[Pair]) -> list[tuple[Any, str]]:
    """Pictures with captions, before and after side by side."""
    shown = []
    for row, before, after in pairs:
        text = one_line(row.text)[:LONGEST_CAPTION] or "(no prompt)"
        shown += [(before, f"before ({row.kind}): {text}"), (after, f"after: {text}")]
    return shown


def as_sheet(pairs: list[Pair], most: int = 3) -> Any:
    """One picture of the first pairs, before at the left and after at the right."""
    from PIL import Image

    width, height = pairs[0][1].size
    rows = pairs[:most]
    sheet = Image.new("RGB", (2 * width, len(rows) * height))
    for number, (_, before, after) in enumerate(rows):
        sheet.paste(before.resize((width, height)), (0, number * height))
        sheet.paste(after.resize((width, height)), (width, number * height))
    return sheet


def _picture(prompt: str, drawing: Drawing) -> Any:
    from modules import processing, shared

    host.check_interrupted()
    sd_model = host.loaded_model()
    shared.state.job_count = 1
    process = processing.StableDiffusionProcessingTxt2Img(
        sd_model=sd_model,
        prompt=prompt,
        negative_prompt=drawing.negative,
        seed=drawing.seed,
        steps=drawing.steps,
        cfg_scale=drawing.cfg,
        width=drawing.width,
        height=drawing.height,
        sampler_name=drawing.sampler_name,
        do_not_save_samples=True,
        do_not_save_grid=True,
    )
    with closing(process):
        pictures = processing.process_images(process).images
    host.check_interrupted()
    return pictures[0]
