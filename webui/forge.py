"""Forge's model and that of its kin: a patcher around the network, and an object for sampling.

Forge and Forge Neo have ``backend`` and a ``predictor``; Forge Classic and reForge have
``ldm_patched`` and ComfyUI's ``model_sampling``. Both answer to the same names.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..erase_core.settings import families
from .denoiser import WebuiDenoiser

# A training step keeps activations that inference frees; the host moves other models out of the
# way for this many times what it would reserve for sampling.
TRAINING_MEMORY_FACTOR = 3


class ForgeDenoiser(WebuiDenoiser):
    """What Forge has in ``forge_objects``, before any LoRA."""

    kind = "Forge"
    adds_in_place = True

    def __init__(self, sd_model: Any, *args: Any, **named: Any) -> None:
        self._patcher = sd_model.forge_objects_original.unet
        self.device = self._patcher.load_device
        inner = self._patcher.model
        self.dtype = getattr(inner, "computation_dtype", None) or _dtype_of(inner)
        super().__init__(sd_model, *args, **named)

    @property
    def network(self) -> nn.Module:
        return self._patcher.model.diffusion_model

    @property
    def sampling(self) -> Any:
        inner = self._patcher.model
        return getattr(inner, "predictor", None) or inner.model_sampling

    @property
    def predicts_v(self) -> bool:
        """By the host's formula: where x0 = a x + b F, networks of v have another b than sigma."""
        return bool((self._weight(torch.ones(1)) > 1 + 1e-3).all())

    def _weight(self, sigma: Tensor) -> Tensor:
        nothing, one = (torch.full((len(sigma), 1, 1, 1), value) for value in (0.0, 1.0))
        at = [self._denoised(sigma, output, nothing) for output in (one, nothing)]
        # A change of x0 is -sigma one of eps.
        return (sigma / (at[0] - at[1]).flatten()).square().float()

    def _denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return self.sampling.calculate_denoised(sigma, output, x).detach().cpu()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """See :class:`erase_core.model.denoiser.Denoiser`. From the host's own formula."""
        return self._weight(sigma.cpu().float())

    def noisy_latent(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        sigma = sigma.to(noise.device)
        if not hasattr(self.sampling, "noise_scaling"):  # Forge Classic's samplers do it themselves
            return super().noisy_latent(noise, sigma)
        nothing = torch.zeros_like(noise)
        return self.sampling.noise_scaling(sigma, noise.clone(), nothing, max_denoise=True)

    def _channels(self) -> int:
        if hasattr(self.network, "input_blocks"):
            return 4
        found = getattr(
            getattr(self._model.model_config, "latent_format", None), "latent_channels", 0
        )
        return int(found) or 16

    def _load(self) -> None:
        shape = [self._images, *self.latent_shape(self._resolution)]
        memory = self._patcher.memory_required(shape) * TRAINING_MEMORY_FACTOR
        memory_management().load_models_gpu([self._patcher], memory_required=memory)

    def _learn(self, prompts: Sequence[str]) -> Any:
        from modules import prompt_parser

        size = {"width": self._resolution, "height": self._resolution}
        conditioning = prompt_parser.SdConditioning(prompts, **size)
        # The encoder's weights are inference tensors: run it as the host does.
        with torch.inference_mode():
            return self._model.get_learned_conditioning(conditioning)

    @functools.cached_property
    def _predictor(self) -> Any:
        """The host's model around the twin."""
        outer = copy.copy(self._patcher.model)
        outer._modules = {**outer._modules, "diffusion_model": self._twin}
        return outer

    def _apply(
        self, x: Tensor, sigma: Tensor, tokens: Tensor, given: Mapping[str, Tensor | None]
    ) -> Tensor:
        named: dict[str, Any] = {"c_crossattn": tokens, "transformer_options": {}}
        if given["vector"] is not None:
            named["y"] = given["vector"]
        elif self._family is families.SDXL:
            named["y"] = None
        if given["guidance"] is not None:
            named["guidance"] = given["guidance"]
        concat = self._concat(x)
        if concat is not None:
            named["c_concat"] = concat
        return self._predictor.apply_model(x, sigma, **named)

    def _concat(self, x: Tensor) -> Tensor | None:
        """What inpainting models read beside the latent when nothing is masked."""
        first = getattr(self.network, "input_blocks", None)
        weight = None if first is None else first[0][0].weight
        if weight is None or weight.shape[1] <= x.shape[1]:
            return None
        from modules import processing

        height, width = (8 * side for side in x.shape[-2:])
        with torch.inference_mode():
            empty = processing.txt2img_image_conditioning(self._model, x[:1], width, height)
        return empty.clone().expand(len(x), -1, -1, -1).to(x)

    def free_memory(self, wanted: int) -> int:
        """See :class:`erase_core.model.denoiser.Denoiser`. The host moves other models away."""
        management = memory_management()
        own = [one for one in management.current_loaded_models if one.model is self._patcher]
        with torch.inference_mode():
            management.free_memory(wanted, self.device, keep_loaded=own)
        return management.get_free_memory(self.device)


def memory_management() -> Any:
    """The module in which this kind of host moves models."""
    try:
        from backend import memory_management as found
    except ImportError:
        from ldm_patched.modules import model_management as found
    return found


def _dtype_of(model: Any) -> torch.dtype:
    cast = getattr(model, "manual_cast_dtype", None)
    return cast or model.get_dtype()


@contextlib.contextmanager
def without_networks(sd_model: Any) -> Iterator[None]:
    """Inside, the model is as it was loaded; afterwards it has its LoRAs again.

    What the host merged into the weights goes when the original patcher is loaded.
    """
    before = sd_model.forge_objects
    sd_model.forge_objects = sd_model.forge_objects_original.shallow_copy()
    management = memory_management()
    try:
        with torch.inference_mode():
            management.load_models_gpu([sd_model.forge_objects_original.unet])
        yield
    finally:
        sd_model.forge_objects = before
        with torch.inference_mode():
            for one in (before.unet, getattr(before.clip, "patcher", None)):
                if one is not None and _has_networks(one):
                    management.load_models_gpu([one])


def _has_networks(patcher: Any) -> bool:
    return bool(getattr(patcher, "lora_patches", None) or getattr(patcher, "patches", None))


def left_out(sd_model: Any) -> list[str]:
    """What others put around the loaded model that training does not run, in words."""
    options = getattr(sd_model.forge_objects_original.unet, "model_options", {})
    around = options.get("transformer_options", {})
    names = [name for name in ("patches", "patches_replace") if around.get(name)]
    names += ["model_function_wrapper"] if "model_function_wrapper" in options else []
    return [f"what an extension put around the model ({', '.join(names)})"] if names else []
