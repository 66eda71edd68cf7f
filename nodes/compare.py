"""The node that draws the same prompts without and with an erasure, on one sheet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..erase_core import Erasure, SettingsError
from ..erase_core.artefact.sheet import (
    MOST_PROMPTS,
    SIDES,
    STEPS,
    STRONGEST_GUIDANCE,
    Drawing,
    Layout,
    Row,
    columns_of,
    drawing_of,
    fitted,
    one_line,
    rows_of,
    strengths_of,
    typed_prompts,
)
from ..erase_core.artefact.stack import MERGE, STRONGEST
from ..erase_core.settings.texts import given_lines, plain_text
from ..erase_core.settings.widgets import check_choice
from ..faces.labels import labelled
from .apply import MODES, apply_erasure, mismatches
from .families import PICTURE, VIDEO, UnsupportedModelError, latent_pixels
from .messages import show_progress_text, upstream_file, warn_all
from .refusals import refusal
from .runs import refuse_without_clip
from .schema import CATEGORY, ErasureType, compatible

STRENGTHS = "0, 0.5, 1"
STEPS_BY_DEFAULT, SAMPLER, SCHEDULER = 20, "euler", "normal"
SHOWN_OF_PROMPT = 60  # characters, under the node
_ADVANCED = {"advanced": True, "optional": True}

# One for each cell: called with the number of the column, of the row, and of steps done there.
Report = Callable[[int, int, int], None]


class CompareErasure(io.ComfyNode):
    """MODEL, ERASURE, CLIP and VAE in, pictures at several strengths out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs as the host shows them."""
        return compatible(
            io.Schema,
            node_id="ConceptSurgeryCompare",
            display_name="Compare Erasure",
            category=CATEGORY,
            description=(
                "Draws the same prompts without and with an erasure, at several strengths, on one "
                "labelled sheet. Left alone it tries what was erased, what was kept, and words "
                "that nobody named."
            ),
            inputs=[*_main_inputs(), *_drawing_inputs()],
            outputs=[
                io.Image.Output("sheet", display_name="sheet"),
                io.Image.Output("before", display_name="before"),
                io.Image.Output("after", display_name="after"),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(
        cls,
        prompts: str | None = None,
        negative: str | None = None,
        strengths: str | None = None,
        mode: str = MERGE,
        sampler_name: str = SAMPLER,
        scheduler: str = SCHEDULER,
    ) -> bool | str:
        """Refuse what can't work before anything is trained. Linked values are checked later.

        The host checks the range of each number, which isn't named here.
        """
        try:
            check_choices(mode, sampler_name, scheduler)
            typed_prompts(prompts)
            negative_prompt(negative)
            if strengths is not None:
                strengths_of(strengths)
        except SettingsError as error:
            return refusal(error, cls)
        return True

    @classmethod
    def execute(
        cls,
        model,
        erasure: Erasure,
        clip,
        vae,
        prompts: str = "",
        negative: str = "",
        strengths: str = STRENGTHS,
        mode: str = MERGE,
        seed: int = 0,
        steps: int = STEPS_BY_DEFAULT,
        cfg: float = 0.0,
        sampler_name: str = SAMPLER,
        scheduler: str = SCHEDULER,
        width: int = 0,
        height: int = 0,
    ) -> io.NodeOutput:
        """Draw every prompt at every strength, and show the sheet."""
        check_choices(mode, sampler_name, scheduler)
        rows, asked = rows_of(prompts, erasure.record), strengths_of(strengths)
        drawing = drawing_of(
            erasure.record,
            negative=negative_prompt(negative),
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler_name,
            scheduler=scheduler,
            width=width,
            height=height,
        )
        refuse_without_clip(clip)
        refuse_without_vae(vae)
        node_id, columns = cls.hidden.unique_id, columns_of(asked)
        # All of them before the first picture: what doesn't fit is said at once.
        models = [with_erasure(model, erasure, strength, mode) for strength in columns]
        name = upstream_file(cls.hidden.prompt, node_id, "model")
        warnings = mismatches(model, erasure, clip, name)
        report = progress_of(rows, columns, drawing, node_id)
        latents = drawn(models, encoded(clip, rows, drawing), rows, drawing, report)
        ends = columns.index(0.0), columns.index(asked[-1])
        cells, (before, after) = developed(vae, latents, ends)
        layout = Layout.of(cells)
        sheet = layout.filled(labelled(layout, rows, columns, str(drawing)), cells)[None]
        warn_all(warnings, node_id, f"Drawn with {drawing}.")
        return io.NodeOutput(sheet, before, after, ui=ui.PreviewImage(sheet, cls=cls))


def negative_prompt(given: Any) -> str:
    """The negative prompt; "" for what an empty link gives.

    Raises:
        SettingsError: no text, or one that is too long.
    """
    given_lines("negative", given)
    return "" if given is None else plain_text("negative", given)


def check_choices(mode: Any, sampler_name: Any, scheduler: Any) -> None:
    """Refuse choices that aren't there; the host would sample with others in their place.

    Raises:
        SettingsError: one that isn't there.
    """
    known = comfy.samplers.KSampler
    check_choice("mode", mode, MODES)
    check_choice("sampler_name", sampler_name, tuple(known.SAMPLERS))
    check_choice("scheduler", scheduler, tuple(known.SCHEDULERS))


def refuse_without_vae(vae) -> None:
    """A checkpoint may have no autoencoder; its loader then gives nothing as VAE.

    Raises:
        ValueError: no VAE.
    """
    if vae is None:
        raise ValueError(
            "No VAE is connected (the checkpoint has none), so no picture can be drawn. Connect "
            "the VAE of a checkpoint loader or of a VAE loader."
        )


def with_erasure(model, erasure: Erasure, strength: float, mode: str):
    """The model to draw a column with: at strength 0 the one that came in, with no patch at all.

    Raises:
        ApplyError: the erasure doesn't fit the model, which is looked at for strength 0 as well.
    """
    patched = apply_erasure(model, erasure, strength, mode)
    return patched if strength else model


def progress_of(
    rows: Sequence[Row], columns: Sequence[float], drawing: Drawing, node_id: str | None
) -> Report:
    """The host's progress bar over the steps of all pictures, and which one it is at."""
    cells, steps = len(rows) * len(columns), drawing.steps
    bar = comfy.utils.ProgressBar(cells * steps)

    def report(column: int, row: int, done: int) -> None:
        cell = column * len(rows) + row
        if not done:
            prompt = one_line(rows[row].text)[:SHOWN_OF_PROMPT] or "no prompt"
            text = f"Picture {cell + 1} of {cells}, strength {columns[column]:g}: {prompt}"
            show_progress_text(text, None, node_id)
        bar.update_absolute(cell * steps + min(done, steps), cells * steps)

    return report


def encoded(clip, rows: Sequence[Row], drawing: Drawing) -> Mapping[str, Any]:
    """The CONDITIONING of every prompt by its text, each encoded once, as CLIPTextEncode does."""
    texts = dict.fromkeys([drawing.negative, *(row.text for row in rows)])
    return {text: clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts}


def drawn(
    models: Sequence[Any],
    conditioning: Mapping[str, Any],
    rows: Sequence[Row],
    drawing: Drawing,
    report: Report,
) -> list[list[Tensor]]:
    """The latents of every column, row by row.

    Column by column, so that the host puts each erasure into the weights once.
    """
    latents: list[list[Tensor]] = []
    for column, model in enumerate(models):
        latents.append([])
        for row, prompt in enumerate(rows):
            comfy.model_management.throw_exception_if_processing_interrupted()
            pair = conditioning[prompt.text], conditioning[drawing.negative]
            at_step = functools.partial(report, column, row)
            latents[-1].append(sampled(model, *pair, drawing, at_step))
    return latents


def sampled(model, positive, negative, drawing: Drawing, at_step: Callable[[int], None]) -> Tensor:
    """One latent, as the host's KSampler samples an empty one.

    Args:
        at_step: called with the number of steps that are done.
    """
    at_step(0)
    latent = comfy.sample.fix_empty_latent_channels(model, empty_latent(model, drawing))
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, drawing.seed),
        drawing.steps,
        drawing.cfg,
        drawing.sampler_name,
        drawing.scheduler,
        positive,
        negative,
        latent,
        callback=lambda step, *_: at_step(step + 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=drawing.seed,
    )


def empty_latent(model, drawing: Drawing) -> Tensor:
    """Of one picture, (1, channels, height, width); models of videos draw one frame.

    Raises:
        UnsupportedModelError: a model of something else.
    """
    latent_format = model.model.latent_format
    if latent_format.latent_dimensions not in (PICTURE, VIDEO):
        raise UnsupportedModelError(
            f"This model ({type(model.model.model_config).__name__}) draws no pictures: its "
            f"latents have {latent_format.latent_dimensions} dimension(s), a picture's has "
            f"{PICTURE}. Load a model of pictures."
        )
    pixels = latent_pixels(model)
    sides = [max(1, side // pixels) for side in (drawing.height, drawing.width)]
    device = comfy.model_management.intermediate_device()
    return torch.zeros([1, latent_format.latent_channels, *sides], device=device)


def developed(
    vae, latents: Sequence[Sequence[Tensor]], whole: tuple[int, int]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Pictures for the sheet, those of each row, and batches (n, height, width, 3) as decoded.

    Decoded last: where memory is short, model and VAE take each other's place once.

    Args:
        latents: those of each column.
        whole: the columns that are wanted as batches.
    """
    cells: list[list[Tensor]] = [[] for _ in latents[0]]
    batches: dict[int, list[Tensor]] = {column: [] for column in whole}
    for column, of_column in enumerate(latents):
        for row, latent in enumerate(of_column):
            comfy.model_management.throw_exception_if_processing_interrupted()
            picture = decoded(vae, latent)
            cells[row].append(fitted(picture))
            if column in batches:
                batches[column].append(picture)
    return cells, [torch.stack(batches[column]) for column in whole]


def decoded(vae, latent: Tensor) -> Tensor:
    """The picture of a latent, (height, width, 3); of a video its first frame."""
    images = vae.decode(latent)
    return images.flatten(0, -4)[0, ..., :3].cpu()


def _main_inputs() -> list[Any]:
    return [
        io.Model.Input(
            "model",
            tooltip="The model of the loader, without the erasure (LoRAs are fine). It is not "
            "changed.",
        ),
        ErasureType.Input("erasure", tooltip="From Train Concept Erasure or Load Erasure."),
        io.Clip.Input("clip", tooltip="The text encoder that you also use for your prompts."),
        io.Vae.Input("vae", tooltip="The VAE that you also use for your pictures."),
        io.String.Input(
            "prompts",
            multiline=True,
            placeholder="prompts to try, one a line; empty: chosen from the erasure",
            default="",
            optional=True,
            tooltip="Prompts to try, one a line. Empty: what was erased, what was kept, the words "
            f"that are likeliest to suffer, and no prompt at all. At most {MOST_PROMPTS}. Two "
            'quotation marks on a line, "", are the empty prompt.',
        ),
        io.String.Input(
            "negative",
            default="",
            optional=True,
            tooltip="The negative prompt of all pictures.",
        ),
        io.String.Input(
            "strengths",
            default=STRENGTHS,
            optional=True,
            tooltip="The strengths to compare, with commas between them, at most 6, from "
            f"{-STRONGEST:g} to {STRONGEST:g}. 0 is the untouched model; it is always drawn. The "
            "last one is the output 'after'.",
        ),
        io.Combo.Input(
            "mode",
            options=list(MODES),
            default=MERGE,
            optional=True,
            tooltip="As in Apply Erased UNet: merge puts the change into the weights, exact keeps "
            "it beside them.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            optional=True,
            tooltip="Seed of every picture, so that only the strength differs along a row.",
        ),
    ]


def _drawing_inputs() -> list[Any]:
    samplers = comfy.samplers.KSampler
    return [
        io.Int.Input(
            "steps",
            default=STEPS_BY_DEFAULT,
            min=STEPS[0],
            max=STEPS[1],
            optional=True,
            tooltip="Steps of every picture.",
        ),
        io.Float.Input(
            "cfg",
            default=0.0,
            min=0.0,
            max=STRONGEST_GUIDANCE,
            step=0.1,
            optional=True,
            tooltip="Guidance scale. 0: the one that the erasure was made for.",
        ),
        _combo("sampler_name", samplers.SAMPLERS, SAMPLER, "Sampler, as in KSampler."),
        _combo("scheduler", samplers.SCHEDULERS, SCHEDULER, "Scheduler, as in KSampler."),
        _side("width"),
        _side("height"),
    ]


def _combo(name: str, options: Sequence[str], default: str, tooltip: str) -> Any:
    return compatible(
        io.Combo.Input, name, options=list(options), default=default, tooltip=tooltip, **_ADVANCED
    )


def _side(name: str) -> Any:
    return compatible(
        io.Int.Input,
        name,
        default=0,
        min=0,
        max=SIDES[1],
        step=8,
        tooltip=f"{name.capitalize()} of every picture in pixels. 0: the size that the erasure was "
        "made for.",
        **_ADVANCED,
    )
