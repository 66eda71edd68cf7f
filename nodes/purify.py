"""The node that takes an erased concept out of a picture that is there already."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..erase_core import Erasure, Meter, Progress, SettingsError
from ..erase_core.artefact.stack import MERGE
from ..erase_core.method.inversion import psnr
from ..erase_core.run.purify import Purified, purify
from ..erase_core.settings.layers import LayerRuleError
from ..erase_core.settings.purification import (
    AREAS,
    AUTO,
    STEPS,
    STRONGEST,
    STRONGEST_GUIDANCE,
    Purification,
    asked_prompts,
)
from ..erase_core.settings.texts import given_lines
from .apply import ApplyError, apply_erasure, mismatches
from .compare import refuse_without_vae
from .families import PICTURE, VIDEO, UnsupportedModelError, trainable_family, with_frames
from .host import ComfyDenoiser, left_out_of_training
from .messages import show_progress_text, shown, upstream_file, warn_all
from .refusals import refusal
from .runs import refuse_without_clip
from .schema import CATEGORY, ErasureType, compatible

GOOD_PSNR = 30.0  # dB, of what the inversion alone does to a picture
COLOURS = 3
IMAGE_DIMENSIONS = 4
_BAR = 1000  # parts of the progress bar for each picture


class PurifyImage(io.ComfyNode):
    """IMAGE, MODEL, ERASURE, CLIP and VAE in, the picture without the concept out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs as the host shows them."""
        return compatible(
            io.Schema,
            node_id="ConceptSurgeryPurify",
            display_name="Purify Image",
            category=CATEGORY,
            description=(
                "Takes what an erasure erases out of a picture that you have. It finds where the "
                "picture shows it, draws that place again with the erased model, and leaves the "
                "rest as it is."
            ),
            search_aliases=[
                "purify",
                "remove from image",
                "erase from image",
                "clean image",
                "inversion",
                "DDIM inversion",
                "image edit",
                "censor",
            ],
            inputs=[*_wires(), *_widgets()],
            outputs=[
                io.Image.Output("purified", display_name="purified"),
                io.Image.Output("reconstruction", display_name="reconstruction"),
                io.Mask.Output("mask", display_name="mask"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(cls, prompt: str | None = None, area: str = AUTO) -> bool | str:
        """Refuse what can't work before anything runs. The host checks each number's range."""
        try:
            purification(prompt, area=area)
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
        image: Tensor,
        prompt: str = "",
        area: str = AUTO,
        steps: int = Purification.steps,
        start_level: float = Purification.start_level,
        cfg: float = Purification.guidance,
        strength: float = Purification.strength,
    ) -> io.NodeOutput:
        """Purify each picture of the batch."""
        asked = purification(
            prompt,
            area=area,
            steps=steps,
            start_level=start_level,
            guidance=cfg,
            strength=strength,
        )
        asked_prompts(asked, erasure.record)  # a style can't do without
        refuse_without_clip(clip)
        refuse_without_vae(vae)
        refuse_other_models(model)
        # What doesn't fit, or is on the model already, is said before anything is encoded.
        apply_erasure(model, erasure, asked.strength, MERGE)
        node_id = cls.hidden.unique_id
        name = upstream_file(cls.hidden.prompt, node_id, "model")
        pixels, notes = usable_pixels(image, vae)
        warnings = [*mismatches(model, erasure, clip, name), *notes]
        latents = [_encoded(vae, model, one) for one in pixels.split(1)]
        found = _purified(model, clip, erasure, latents, asked, pixels.shape[1:3], node_id)
        parts = [
            _developed(vae, model, *pair, asked.everywhere(erasure.record))
            for pair in zip(pixels.split(1), found, strict=True)
        ]
        report, more = _report(parts)
        warn_all([*warnings, *more, *left_out_of_training(model, "Purify Image")], node_id, report)
        pictures, again, masks = (
            torch.cat(list(images))
            for images in zip(*((p.picture, p.reconstruction, p.mask) for p in parts), strict=True)
        )
        return io.NodeOutput(pictures, again, masks, shown("\n".join([report, *more])))


@dataclass(frozen=True)
class Part:
    """One picture, done.

    Attributes:
        picture: without the concept, (1, h, w, 3); so is ``reconstruction``.
        mask: what was drawn again, (1, h, w), 0 to 1.
        shares: part of the picture that shows what each prompt names.
        inversion: dB of the reconstruction against the picture as the VAE gives it back.
        whole: dB of the reconstruction against the picture itself.
    """

    picture: Tensor
    reconstruction: Tensor
    mask: Tensor
    shares: Mapping[str, float]
    inversion: float
    whole: float


def purification(prompt: Any, **values: Any) -> Purification:
    """The settings of the widgets; an empty link is no prompt.

    Raises:
        SettingsError: a value that can't work.
    """
    given_lines("prompt", prompt)
    try:
        return Purification(prompt="" if prompt is None else prompt, **values)
    except SettingsError as error:
        if error.setting != "guidance":
            raise
        raise SettingsError(str(error).replace("guidance", "cfg", 1), "cfg") from error


def refuse_other_models(model) -> None:
    """Only what draws a picture from noise and a prompt alone can be inverted so.

    Raises:
        UnsupportedModelError: an inpainting model or another with more inputs, or one of sound.
    """
    inner = model.model
    latent_format, kind = inner.latent_format, type(inner.model_config).__name__
    if latent_format.latent_dimensions not in (PICTURE, VIDEO):
        raise UnsupportedModelError(
            f"This model ({kind}) draws no pictures, so none can be purified with it. Load a model "
            "of pictures."
        )
    try:
        trainable_family(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"A picture can't be purified with this model ({kind}): it is an inpainting model, or "
            "takes something else beside a prompt and noise. Load the plain model of its family, "
            "on which the erasure was made."
        ) from error


def usable_pixels(image: Any, vae) -> tuple[Tensor, list[str]]:
    """The pictures (n, h, w, 3) as the VAE takes them, and what was left out, in words.

    Sides are cut like the host's VAE Encode cuts them: as much on either side.

    Raises:
        SettingsError: no pictures, or ones that are smaller than a pixel of a latent.
    """
    if not isinstance(image, Tensor) or image.ndim != IMAGE_DIMENSIONS or not image.numel():
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise SettingsError(
            f"image is no picture ({shape}). Connect an IMAGE, such as that of Load Image.", "image"
        )
    notes = []
    if image.shape[-1] > COLOURS:
        notes.append(
            "The alpha channel of the image was left out; transparent parts count as drawn."
        )
    pixels = image[..., :COLOURS].float().clamp(0, 1)
    if pixels.shape[-1] < COLOURS:
        pixels = pixels[..., :1].expand(*pixels.shape[:-1], COLOURS)
    step = vae.spacial_compression_encode()
    height, width = (side // step * step for side in pixels.shape[1:3])
    if not (height and width):
        raise SettingsError(
            f"image is {pixels.shape[2]} x {pixels.shape[1]} pixels, and the VAE takes {step} x "
            f"{step} at least. Connect a larger picture.",
            "image",
        )
    top, left = ((side % step) // 2 for side in pixels.shape[1:3])
    if (height, width) != pixels.shape[1:3]:
        notes.append(
            f"The image was cut from {pixels.shape[2]} x {pixels.shape[1]} to {width} x {height} "
            f"pixels, because the VAE takes multiples of {step}."
        )
    return pixels[:, top : top + height, left : left + width].contiguous(), notes


def _encoded(vae, model, pixels: Tensor) -> Tensor:
    """The latent (1, c, h, w) of a picture (1, h, w, 3), in the model's scale.

    Raises:
        UnsupportedModelError: the VAE is another model's.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
    latent, latent_format = vae.encode(pixels), model.model.latent_format
    channels = latent_format.latent_channels
    frames = latent_format.latent_dimensions == VIDEO
    fits = latent.ndim == IMAGE_DIMENSIONS + frames and latent.shape[1] == channels
    if not fits or (frames and latent.shape[2] != 1):
        raise UnsupportedModelError(
            f"The VAE gives latents of the shape {tuple(latent.shape[1:])}, and the model "
            f"({type(model.model.model_config).__name__}) takes {channels} channels"
            f"{' of one frame' if frames else ''}. Connect the VAE that belongs to the model."
        )
    latent = latent_format.process_in(latent)
    return latent[:, :, 0] if frames else latent


def _purified(
    model,
    clip,
    erasure: Erasure,
    latents: Sequence[Tensor],
    asked: Purification,
    sides: Sequence[int],
    node_id: str | None,
) -> list[Purified]:
    height, width = sides
    found = []
    # The host runs nodes in inference mode, whose tensors the engine can't use.
    with torch.inference_mode(False), torch.no_grad():
        try:
            denoiser = ComfyDenoiser(
                model,
                clip,
                "",
                2,
                max(height, width),
                erasure.record["settings"].get("layers"),
                (width, height),
            )
        except LayerRuleError as error:
            raise ApplyError(f"The erasure doesn't fit this model: {error}") from error
        with denoiser:
            _refuse_unknown_matrices(erasure, denoiser)
            for number, latent in enumerate(latents):
                meter = Meter(_progress(number, len(latents), node_id))
                found.append(purify(latent.clone(), asked, erasure, denoiser, meter))
    return found


def _refuse_unknown_matrices(erasure: Erasure, denoiser: ComfyDenoiser) -> None:
    unknown = sorted(set(erasure.factors) - set(denoiser.names))
    if unknown:
        raise ApplyError(
            f"The erasure of {erasure.concept!r} changes {len(unknown)} matrices that can't be "
            f"changed beside this model, for example {unknown[0]}. Train the erasure on this model."
        )


def _progress(number: int, count: int, node_id: str | None) -> Callable[[Progress], None]:
    """The host's progress bar over all pictures, and what is being done."""
    bar = comfy.utils.ProgressBar(_BAR * count)
    of = f"Picture {number + 1} of {count}: " if count > 1 else ""
    said = ""

    def show(progress: Progress) -> None:
        nonlocal said
        comfy.model_management.throw_exception_if_processing_interrupted()
        done = _BAR * number + _BAR * progress.done // max(1, progress.total)
        bar.update_absolute(done, _BAR * count)
        if progress.stage != said:
            said = progress.stage
            show_progress_text(f"{of}{said}".strip().capitalize(), None, node_id)

    return show


def _developed(vae, model, pixels: Tensor, found: Purified, everywhere: bool) -> Part:
    """The pictures of latents; what wasn't drawn again is the picture's own pixels."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    height, width = pixels.shape[1:3]
    mask = F.interpolate(found.mask.cpu().float(), (height, width), mode="bilinear")[
        0, 0, ..., None
    ]
    again = _decoded(vae, model, found.reconstruction)
    own = _decoded(vae, model, found.picture)
    if mask.any():
        drawn = _decoded(vae, model, found.latent)
        picture = drawn if everywhere else mask * drawn + (1 - mask) * pixels.cpu()
    else:
        picture = pixels.cpu()
    return Part(
        picture,
        again,
        mask[None, ..., 0],
        found.shares,
        psnr(own, again),
        psnr(pixels.cpu(), again),
    )


def _decoded(vae, model, latent: Tensor) -> Tensor:
    """The picture (1, h, w, 3) of a latent (1, c, h, w) in the model's scale."""
    latent = model.model.latent_format.process_out(with_frames(model, latent))
    images = vae.decode(latent.to(comfy.model_management.intermediate_device()))
    return images.flatten(0, -4)[:1, ..., :COLOURS].float().cpu().clamp(0, 1)


def _report(parts: Sequence[Part]) -> tuple[str, list[str]]:
    """What was found and done, a line a picture, and what to beware of."""
    lines, warnings = [], []
    for number, part in enumerate(parts, 1):
        name = f"Picture {number}" if len(parts) > 1 else "The picture"
        seen = {text: share for text, share in part.shares.items() if share}
        if not part.mask.any():
            what = "shows nothing of it, so it is as it was"
        elif part.mask.all():
            what = "was drawn again as a whole"
        else:
            what = f"was drawn again in {part.mask.mean():.0%} of its area, where it shows " + (
                ", ".join(repr(text) for text in seen)
            )
        lines.append(
            f"{name} {what}. PSNR of the reconstruction: {_decibel(part.inversion)} against what "
            f"the VAE makes of the picture, {_decibel(part.whole)} against the picture itself."
        )
        if part.inversion < GOOD_PSNR:
            warnings.append(
                f"{name} can't be inverted well ({_decibel(part.inversion)}; {GOOD_PSNR:g} dB is "
                "good). Take more steps, or a lower start level."
            )
    return "\n".join(lines), warnings


def _decibel(value: float) -> str:
    return "no difference" if math.isinf(value) else f"{value:.1f} dB"


def _wires() -> list[Any]:
    return [
        io.Model.Input(
            "model",
            display_name="Model",
            tooltip="The model of the loader, without the erasure (LoRAs are fine). It is not "
            "changed.",
        ),
        ErasureType.Input(
            "erasure",
            display_name="Erasure",
            tooltip="From Train Concept Erasure or Load Erasure. What it erases goes.",
        ),
        io.Clip.Input(
            "clip",
            display_name="CLIP",
            tooltip="The text encoder that the erasure was made with.",
        ),
        io.Vae.Input("vae", display_name="VAE", tooltip="The VAE that belongs to the model."),
        io.Image.Input(
            "image",
            display_name="Image",
            tooltip="The picture, or a batch of pictures, each of which is purified by itself.",
        ),
    ]


def _widgets() -> list[Any]:
    return [
        io.String.Input(
            "prompt",
            display_name="What is on the picture",
            multiline=True,
            default="",
            optional=True,
            placeholder="what is on the picture, with the concept in it; empty: the concept alone",
            tooltip="Describes the picture with the concept in it, for example: a cat on a bench. "
            "Empty: the concepts of the erasure, each in a plain phrase; a style needs a prompt.",
        ),
        io.Combo.Input(
            "area",
            display_name="Draw again",
            options=list(AREAS),
            default=AUTO,
            optional=True,
            tooltip="Which part is drawn again. where it is seen: only where the picture shows the "
            "concept. everywhere: all of it. auto: everywhere for styles, else where it is seen.",
        ),
        io.Int.Input(
            "steps",
            display_name="Steps",
            default=Purification.steps,
            min=STEPS[0],
            max=STEPS[1],
            optional=True,
            tooltip="Steps up to the noise and down again. Each costs about nine predictions.",
        ),
        io.Float.Input(
            "start_level",
            display_name="Start level",
            default=Purification.start_level,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="How far up the noise schedule the picture is taken, as denoise in KSampler. 0 "
            "gives it back as it is; higher changes more.",
        ),
        io.Float.Input(
            "cfg",
            display_name="Guidance (CFG)",
            default=Purification.guidance,
            min=0.0,
            max=STRONGEST_GUIDANCE,
            step=0.5,
            optional=True,
            tooltip="Guidance scale of what is drawn in the concept's place. The inversion itself "
            "always runs at 1.",
        ),
        io.Float.Input(
            "strength",
            display_name="Strength",
            default=Purification.strength,
            min=0.0,
            max=STRONGEST,
            step=0.05,
            optional=True,
            tooltip="Of the erasure, as in Apply Erased UNet.",
        ),
    ]
