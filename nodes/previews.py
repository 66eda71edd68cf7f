"""Small pictures of latents, by the host's own previewer."""

from __future__ import annotations

import latent_preview
import numpy
import torch
from torch import Tensor

LARGEST = 128  # pixels of a side


class Previewer:
    """Makes small pictures of latents.

    With the previewer that the host was started with; where it shows no previews, with the one
    that costs nothing, if the model's latents have one.

    Args:
        model: the host's MODEL.
    """

    def __init__(self, model) -> None:
        self._model = model
        self._previewer = None
        self._asked = False

    def picture(self, latent: Tensor) -> Tensor | None:
        """A picture (height, width, 3) of bytes; None where the host can't make one.

        Args:
            latent: (channels, height, width) in the model's scale.
        """
        if not self._asked:
            self._asked, self._previewer = True, _previewer_of(self._model)
        if self._previewer is None:
            return None
        with torch.inference_mode():
            asked = latent[None].to(self._model.load_device)
            picture = self._previewer.decode_latent_to_preview(asked)
        picture = picture.convert("RGB")
        picture.thumbnail((LARGEST, LARGEST))
        return torch.from_numpy(numpy.array(picture))


def _previewer_of(model):
    latent_format = model.model.latent_format
    previewer = latent_preview.get_previewer(model.load_device, latent_format)
    factors = getattr(latent_format, "latent_rgb_factors", None)
    if previewer is not None or factors is None:
        return previewer
    more = ("latent_rgb_factors_bias", "latent_rgb_factors_reshape")
    given = [getattr(latent_format, name) for name in more if hasattr(latent_format, name)]
    return latent_preview.Latent2RGBPreviewer(factors, *given)
