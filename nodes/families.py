"""Which family the host's model is of, and whether it can be trained on."""

from __future__ import annotations

import dataclasses

import comfy.model_base
import comfy.supported_models
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from torch import Tensor

from ..erase_core.settings import families
from ..erase_core.settings.families import Family

# What the host's classes are to the engine: the configuration with its kin, and the model itself.
FAMILIES = (
    (families.SD1, comfy.supported_models.SD15, comfy.model_base.BaseModel),
    (families.SD2, comfy.supported_models.SD20, comfy.model_base.BaseModel),
    (families.SDXL, comfy.supported_models.SDXL, comfy.model_base.SDXL),
    (families.SD3, comfy.supported_models.SD3, comfy.model_base.SD3),
    (families.FLUX, comfy.supported_models.Flux, comfy.model_base.Flux),
)
# Kin of one of them by its configuration, but another network.
_OTHER_NETWORKS = (comfy.model_base.Flux2,) if hasattr(comfy.model_base, "Flux2") else ()
# Pixels a latent's pixel is wide, where it isn't 8; hosts of 2026 say it themselves.
_LATENT_PIXELS = {
    "LTXV": 32,
    "Wan22": 16,
    "HunyuanImage21": 32,
    "HunyuanVideo15": 16,
    "Flux2": 16,
    "ChromaRadiance": 1,
}
PICTURE, VIDEO = 2, 3  # dimensions of a latent beside its channels


class UnsupportedModelError(ValueError):
    """A model this version can't train on or apply to."""


def model_family(model) -> Family:
    """The model's family, variants such as inpainting models included; a generic one if none."""
    inner = model.model
    if isinstance(inner, _OTHER_NETWORKS):
        return _generic(inner)
    found = [family for family, config, _ in FAMILIES if isinstance(inner.model_config, config)]
    if not found:
        return _generic(inner)
    if found[0] is families.SD2 and inner.model_type is comfy.model_base.ModelType.V_PREDICTION:
        return families.SD2_V
    return found[0]


def trainable_family(model) -> Family:
    """The family of a model that can be trained on.

    Raises:
        UnsupportedModelError: a variant with other inputs, a model of something else than pictures.
    """
    inner, family = model.model, model_family(model)
    if not family.readers_known:
        _refuse_other_latents(inner, family)
        return family
    if type(inner) not in [base for *_, base in FAMILIES]:
        raise UnsupportedModelError(
            f"This model ({type(inner.model_config).__name__}, {type(inner).__name__}) is a "
            f"variant of {family.name} that takes other inputs than the prompt. Train on the plain "
            "model of the same family; the erasure file can then be applied to this one."
        )
    channels = inner.model_config.unet_config.get("in_channels", 4)
    expected = inner.latent_format.latent_channels
    if inner.concat_keys or channels != expected:
        raise UnsupportedModelError(
            f"This is an inpainting or otherwise conditioned model: it takes {channels} channels, "
            f"a plain one takes {expected}. Train on the plain model of the same family; the "
            "erasure file can then be applied to this one with a LoRA loader."
        )
    return family


def refuse_if_it_takes_more(model, clip, family: Family) -> None:
    """What a model of a generic family is given beside the noise comes from the text encoder.

    Raises:
        UnsupportedModelError: the model wants more.
    """
    with torch.inference_mode():
        given = dict(clip.encode_from_tokens(clip.tokenize(""), return_dict=True))
        tokens, pooled = given.pop("cond"), given.pop("pooled_output", None)
        shape = (1, *latent_shape(model, 8 * latent_pixels(model)))
        noise = with_frames(model, torch.zeros(shape))
        try:
            conditions = model.model.extra_conds(
                noise=noise,
                device=noise.device,
                cross_attn=tokens,
                pooled_output=pooled,
                **given,
            )
        except (KeyError, AttributeError, TypeError) as error:
            reason = f"it asks for more than a prompt ({type(error).__name__}: {error})"
            raise unsupported(family, reason) from error
    if "c_concat" in conditions:
        raise unsupported(family, "it takes a picture or a mask beside the noise")


def latent_pixels(model) -> int:
    """Width of a latent's pixel in the picture's."""
    known = getattr(model.model.latent_format, "spacial_downscale_ratio", None)
    return known or _LATENT_PIXELS.get(type(model.model.latent_format).__name__, 8)


def latent_shape(model, resolution: int) -> tuple[int, int, int]:
    """(channels, height, width) of the latent of a square picture, or of one frame of a video."""
    side = resolution // latent_pixels(model)
    return (model.model.latent_format.latent_channels, side, side)


def with_frames(model, x: Tensor) -> Tensor:
    """Latents (n, c, h, w) as the model takes them: for models of videos, (n, c, 1, h, w)."""
    return x.unsqueeze(2) if model.model.latent_format.latent_dimensions == VIDEO else x


def _generic(inner) -> Family:
    base = comfy.model_base.BaseModel
    blocks = (DoubleStreamBlock, SingleStreamBlock)
    return dataclasses.replace(
        families.generic(type(inner.model_config).__name__),
        pooled=type(inner).encode_adm is not base.encode_adm,
        adds_in_place=any(isinstance(module, blocks) for module in inner.modules()),
    )


def _refuse_other_latents(inner, family: Family) -> None:
    dimensions = inner.latent_format.latent_dimensions
    if dimensions not in (PICTURE, VIDEO):
        raise unsupported(family, f"its latents have {dimensions} dimensions, a picture's has 2")


def unsupported(family: Family, reason: str) -> UnsupportedModelError:
    """The error of a model that isn't of a family."""
    return UnsupportedModelError(
        f"This model ({family.name}) can't be trained on: {reason}. Other architectures than "
        f"{', '.join(families.FAMILIES)} can be only if they draw pictures from the tokens of a "
        "prompt. Load such a model, or the plain one of this kind."
    )
