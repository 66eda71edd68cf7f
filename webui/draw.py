"""Pictures without and with an erasure, drawn by the host as it draws all others."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from ..erase_core.artefact.sheet import (
    Drawing,
    Layout,
    Row,
    drawing_of,
    fitted,
    one_line,
    rows_of,
)
from ..faces.labels import labelled
from . import host, loras

JOB = "Concept Surgery: before and after"
STEPS, SAMPLER = 20, "Euler"
LONGEST_CAPTION = 80
COLUMNS = (0.0, 1.0)  # strengths
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
    rows, drawing = rows_of(prompts, record), drawing_for(record, seed, steps)
    tag = loras.tag_of(name)
    return host.in_turn(
        JOB,
        lambda: [
            (row, _picture(row.text, drawing), _picture(f"{row.text} {tag}", drawing))
            for row in rows
        ],
    )


def drawing_for(record: Mapping[str, Any], seed: int = 0, steps: int = STEPS) -> Drawing:
    """How pictures of an erasure are drawn here.

    Raises:
        SettingsError: the file says something that no host can draw.
    """
    return drawing_of(
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


def as_sheet(pairs: list[Pair], drawing: Drawing) -> Any:
    """All pairs on one sheet with its labels, as ComfyUI's, untouched at the left; a PIL image."""
    from PIL import Image

    cells = [[fitted(_values(one)) for one in (before, after)] for _, before, after in pairs]
    layout = Layout.of(cells)
    caption = str(drawing).replace(" ,", ",")  # the scheduler is the host's own choice
    labels = labelled(layout, [row for row, _, _ in pairs], COLUMNS, caption)
    sheet = (layout.filled(labels, cells) * 255).round().byte().contiguous()
    return Image.frombytes("RGB", layout.size, sheet.numpy().tobytes())


def _values(picture: Any) -> Tensor:
    """A PIL image as (height, width, 3) from 0 to 1."""
    plain = picture.convert("RGB")
    values = torch.frombuffer(bytearray(plain.tobytes()), dtype=torch.uint8)
    return values.view(plain.height, plain.width, 3).float() / 255


def as_gallery(pairs: list[Pair]) -> list[tuple[Any, str]]:
    """Pictures with captions, before and after side by side."""
    shown = []
    for row, before, after in pairs:
        text = one_line(row.text)[:LONGEST_CAPTION] or "(no prompt)"
        shown += [(before, f"before ({row.kind}): {text}"), (after, f"after: {text}")]
    return shown


def as_preview(pairs: list[Pair], most: int = 3) -> Any:
    """A picture for the host's card: the first pairs, before at the left and after at the right."""
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
