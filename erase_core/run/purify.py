"""A picture as it would be without what was erased: inverted, looked at, and drawn again.

The second use that *All But One* names. Of a picture the untouched model finds the noise that leads
to it under the null prompt, at guidance 1. An erasure in the hard form changes nothing under that
prompt, so the erased model leads from there to the same picture. What takes the concept's place is
drawn from that noise by the erased model, told the concept and under guidance, where the concept
is seen; everywhere else the way back stays the way that was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..artefact.erasure import Erasure
from ..method.inversion import euler_step, evidence, inverted, places, sampled
from ..model.denoiser import Denoiser
from ..model.low_rank import LowRankEdit
from ..model.prompt import Encoded
from ..settings.purification import EVERYWHERE, Purification, asked_prompts
from .meter import Meter, MeteredDenoiser

# How far up the schedule a picture is noised to be looked at, and how often: where the concept
# decides what is predicted. Lower down the picture itself says it, higher up nothing does.
LOOKED_AT = (0.4, 0.6)
LOOKS = 2
SCHEDULE = 100  # steps of the schedule that these are parts of
FINEST = 0.03  # noise level from which the sampler goes to none; SD's own schedule ends there
GUESSES_PLANNED = 5  # for each step of the inversion, for the progress bar


@dataclass(frozen=True)
class Purified:
    """What became of a picture.

    Attributes:
        picture: as it was given, (1, c, h, w).
        latent: the picture without the concept, likewise.
        reconstruction: what the untouched model makes of the inverted picture, likewise.
        mask: what was drawn again, 1 or 0, (1, 1, h, w).
        shares: which part of the picture shows what each prompt names, by prompt.
    """

    picture: Tensor
    latent: Tensor
    reconstruction: Tensor
    mask: Tensor
    shares: Mapping[str, float]


@dataclass(frozen=True)
class _Model:
    """The model, untouched and edited, with the prompts as its text encoder gives them."""

    denoiser: MeteredDenoiser
    edit: LowRankEdit
    null: Encoded
    prompts: Sequence[Encoded]

    def untouched(self, x: Tensor, sigma: float) -> Tensor:
        """x0 under the null prompt."""
        return self.x0(x, sigma, [self.null], None)

    def x0(
        self, x: Tensor, sigma: float, prompts: Sequence[Encoded], edit: LowRankEdit | None
    ) -> Tensor:
        """x0 (prompts, c, h, w) of one latent (1, c, h, w) under each prompt."""
        levels = torch.full((len(prompts),), sigma, device=x.device)
        return self.denoiser.predict_x0(x.expand(len(prompts), -1, -1, -1), levels, prompts, edit)


@torch.no_grad()
def purify(
    picture: Tensor,
    asked: Purification,
    erasure: Erasure,
    denoiser: Denoiser,
    meter: Meter | None = None,
) -> Purified:
    """The picture without what was erased.

    Args:
        picture: latent (1, c, h, w) in the model's own scale.
        asked: how it is done.
        erasure: made on this model, and not on it.
        denoiser: the untouched model.
        meter: counts predictions and tells how far it is; what its report raises passes through.
    """
    meter = meter or Meter()
    texts = asked_prompts(asked, erasure.record)
    if not asked.start_level:
        nothing = torch.zeros_like(picture[:, :1])
        return Purified(picture, picture, picture, nothing, dict.fromkeys(texts, 0.0))
    meter.plan(planned(asked, len(texts)))
    meter.say("reading the prompts")
    metered = MeteredDenoiser(denoiser, meter)
    null, *prompts = metered.encode(["", *texts])
    edit = _scaled(erasure.edit(denoiser.device), asked.strength)
    model = _Model(metered, edit, null, prompts)
    picture = picture.to(denoiser.device, torch.float32)
    sigmas = schedule(denoiser, asked)
    with meter.part("inverting"):
        meter.say("inverting the picture")
        way = inverted(picture, sigmas, model.untouched)
    with meter.part("reconstructing"):
        meter.say("reconstructing it")
        reconstruction = sampled(way[0], sigmas, model.untouched)
    with meter.part("looking"):
        meter.say("looking for the concept")
        masks = _masks(picture, model, asked, erasure.record)
    with meter.part("redrawing"):
        meter.say("drawing it again")
        latent = _redrawn(way, sigmas, model, masks, asked)
    shares = {text: float(mask.mean()) for text, mask in zip(texts, masks, strict=True)}
    return Purified(picture, latent, reconstruction, _union(masks), shares)


def reconstructed(
    picture: Tensor, asked: Purification, erasure: Erasure, denoiser: Denoiser
) -> tuple[Tensor, Tensor]:
    """What comes back of a picture under the null prompt by the untouched and the erased model.

    The bar of the hard form: both are the same to rounding.
    """
    (null,) = denoiser.encode([""])
    edit = _scaled(erasure.edit(denoiser.device), asked.strength)
    model = _Model(MeteredDenoiser(denoiser, Meter()), edit, null, [])
    sigmas = schedule(denoiser, asked)
    with torch.no_grad():
        start = inverted(picture, sigmas, model.untouched)[0]
        return (
            sampled(start, sigmas, model.untouched),
            sampled(start, sigmas, lambda x, sigma: model.x0(x, sigma, [null], edit)),
        )


def schedule(denoiser: Denoiser, asked: Purification) -> list[float]:
    """Falling noise levels: the last ``steps`` of as many as lead all the way up.

    That is what hosts do for "denoise" in image to image. The last step of Euler's method gives
    what the model takes for the picture: from a high level only pictures that it finds perfect can
    come out. So the levels go on down to one that hides nothing.
    """
    whole = max(asked.steps, int(asked.steps / asked.start_level))
    sigmas = denoiser.sigmas(whole)[-(asked.steps + 1) :].tolist()
    while sigmas[-2] > FINEST:
        sigmas.insert(-1, sigmas[-2] / 2)
    return sigmas


def planned(asked: Purification, prompts: int) -> dict[str, int]:
    """Forward-equivalents of each part for one picture, about."""
    looks = 0 if asked.area == EVERYWHERE else len(LOOKED_AT) * LOOKS * (2 * prompts + 1)
    return {
        "inverting": GUESSES_PLANNED * asked.steps,
        "reconstructing": asked.steps,
        "looking": looks,
        "redrawing": (1 + prompts) * asked.steps,
    }


def _masks(
    picture: Tensor, model: _Model, asked: Purification, record: Mapping[str, Any]
) -> list[Tensor]:
    """Where each prompt's concept is, 1 or 0, (1, 1, h, w)."""
    if asked.everywhere(record):
        return [torch.ones_like(picture[:, :1])] * len(model.prompts)
    levels = model.denoiser.sigmas(SCHEDULE)
    seen = []
    for number in range(LOOKS * len(LOOKED_AT)):
        sigma = levels[-1 - round(SCHEDULE * LOOKED_AT[number % len(LOOKED_AT)])]
        generator = torch.Generator().manual_seed(number)  # the same for every picture
        noise = torch.randn(picture.shape, generator=generator).to(picture.device)
        x = model.denoiser.noisy_picture(picture, noise, sigma.to(picture.device))
        null, *told = model.x0(x, float(sigma), [model.null, *model.prompts], None).split(1)
        erased = model.x0(x, float(sigma), model.prompts, model.edit).split(1)
        pairs = zip(told, erased, strict=True)
        both = [torch.stack(evidence(picture, one, [other, null])) for one, other in pairs]
        seen.append(torch.stack(both))
    return [places(found, left) for found, left in torch.stack(seen).mean(0)]


def _redrawn(
    way: Sequence[Tensor],
    sigmas: Sequence[float],
    model: _Model,
    masks: Sequence[Tensor],
    asked: Purification,
) -> Tensor:
    """The way down by the erased model, where a mask says so; elsewhere the way that was found."""
    chosen = [number for number, mask in enumerate(masks) if mask.any()]
    if not chosen:
        return way[-1]
    prompts, drawn = [model.prompts[number] for number in chosen], _union(masks)
    weights = torch.cat([masks[number] for number in chosen])
    weights = weights / weights.sum(0, keepdim=True).clamp(min=1)  # where two are, half of each
    x = way[0]
    for number, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        null, *told = model.x0(x, sigma, [model.null, *prompts], model.edit).split(1)
        guidance = ((torch.cat(told) - null) * weights).sum(0, keepdim=True)
        x = euler_step(x, sigma, after, null + asked.guidance * guidance)
        x = torch.where(drawn > 0, x, way[number + 1])
    return x


def _union(masks: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(masks)).amax(0, keepdim=True)


def _scaled(edit: LowRankEdit, strength: float) -> LowRankEdit:
    return LowRankEdit(edit.bases, {name: strength * b for name, b in edit.factors.items()})
