"""Automatic1111's own model: LatentDiffusion for SD1 and SD2, DiffusionEngine for SDXL."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import WebuiDenoiser
from .errors import UnsupportedModelError
from .loras import lora_extension

_HYBRID = ("hybrid", "concat")


class A1111Denoiser(WebuiDenoiser):
    """A1111 keeps one model with normal tensors, and samples it through k-diffusion's wrappers."""

    kind = "A1111"

    def __init__(self, sd_model: Any, *args: Any, **named: Any) -> None:
        from modules import devices

        self._devices = devices
        self.device, self.dtype = devices.device, _computed_in(devices)
        super().__init__(sd_model, *args, **named)
        if getattr(sd_model.model, "conditioning_key", "") == "crossattn-adm":
            raise UnsupportedModelError(
                "This is an unCLIP model, which reads a picture beside the prompt. Load the plain "
                "model of its kind."
            )
        from modules import sd_unet

        if getattr(sd_unet, "current_unet", None) is not None:
            raise UnsupportedModelError(
                "Another U-Net takes the place of the checkpoint's (Settings, SD Unet). Set it to "
                "None and train then."
            )

    @property
    def network(self) -> nn.Module:
        return self._model.model.diffusion_model

    @property
    def predicts_v(self) -> bool:
        return getattr(self._model, "parameterization", "eps") == "v"

    @functools.cached_property
    def sampling(self) -> Any:
        """The host's wrapper, with the names that the other hosts have."""
        return _Schedule(self._wrapper(self._model))

    def _wrapper(self, sd_model: Any) -> Any:
        """k-diffusion's wrapper, made as the host's samplers make it."""
        import k_diffusion.external
        from modules import shared

        wrapper = k_diffusion.external
        kind = wrapper.CompVisVDenoiser if self.predicts_v else wrapper.CompVisDenoiser
        return kind(sd_model, quantize=shared.opts.enable_quantization)

    def _sampling_settings(self) -> list[str]:
        return [*super()._sampling_settings(), str(self.sampling.wrapper.quantize)]

    def _load(self) -> None:
        """Under --medvram the network waits in main memory until a hook is called."""
        from modules import lowvram, shared

        if lowvram.is_enabled(self._model) and not shared.cmd_opts.lowvram:
            for hook in self._model.model._forward_pre_hooks.values():
                hook(self._model.model, ())
        if lowvram.is_enabled(self._model):
            self._stack.callback(lowvram.send_everything_to_cpu)

    def _learn(self, prompts: Sequence[str]) -> Any:
        from modules import prompt_parser

        size = {"width": self._resolution, "height": self._resolution}
        conditioning = prompt_parser.SdConditioning(prompts, **size)
        with torch.no_grad(), self._devices.autocast():
            return self._model.get_learned_conditioning(conditioning)

    @functools.cached_property
    def _predictor(self) -> Any:
        """The host's wrapper around the twin."""
        outer, inner = copy.copy(self._model), copy.copy(self._model.model)
        inner._modules = {**inner._modules, "diffusion_model": self._twin}
        inner._forward_pre_hooks = OrderedDict()  # of --medvram; the network is where it runs
        outer._modules = {**outer._modules, "model": inner}
        return self._wrapper(outer)

    def _apply(
        self, x: Tensor, sigma: Tensor, tokens: Tensor, given: Mapping[str, Tensor | None]
    ) -> Tensor:
        concat = [self._concat(x)]
        if getattr(self._model, "is_sdxl", False):
            cond = {"crossattn": tokens, "vector": given["vector"], "c_concat": concat}
        else:
            cond = {"c_crossattn": [tokens], "c_concat": concat}
        with self._devices.autocast():
            return self._predictor(x, sigma, cond=cond)

    def _concat(self, x: Tensor) -> Tensor:
        """What inpainting models read beside the latent when nothing is masked."""
        inpaints = getattr(self._model, "is_sdxl_inpaint", False)
        if not inpaints and getattr(self._model.model, "conditioning_key", "") not in _HYBRID:
            return x.new_zeros(len(x), 5, 1, 1)  # as the host gives where nothing reads it
        shape = tuple(x.shape[-2:])
        if shape not in self._empty_pictures:
            from modules import processing

            height, width = (8 * side for side in shape)
            with torch.no_grad(), self._devices.autocast():
                empty = processing.txt2img_image_conditioning(self._model, x[:1], width, height)
            self._empty_pictures[shape] = empty.detach()
        return self._empty_pictures[shape].expand(len(x), -1, -1, -1).to(x)

    @functools.cached_property
    def _empty_pictures(self) -> dict[tuple[int, ...], Tensor]:
        return {}

    def free_memory(self, wanted: int) -> int:
        """See :class:`erase_core.model.denoiser.Denoiser`."""
        self._devices.torch_gc()
        if self.device.type != "cuda":
            return super().free_memory(wanted)
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + cached


class _Schedule:
    """k-diffusion's schedule under the names that Forge's has."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.sigmas = wrapper.sigmas

    def timestep(self, sigma: Tensor) -> Tensor:
        return self.wrapper.sigma_to_t(sigma.reshape(1))

    def sigma(self, time: Tensor) -> Tensor:
        return self.wrapper.t_to_sigma(time.to(self.sigmas.device))


def _computed_in(devices: Any) -> torch.dtype:
    """The precision of predictions: that of autocast where the host samples in it."""
    with devices.autocast():
        product = torch.ones(1, 1, device=devices.device) @ torch.ones(1, 1, device=devices.device)
    return devices.dtype_unet if product.dtype == torch.float32 else product.dtype


@contextlib.contextmanager
def without_networks(sd_model: Any) -> Iterator[None]:
    """Inside, the LoRAs, hypernetworks and merged tokens of the last prompt are out of the model.

    They are put back afterwards as they were.
    """
    from modules import sd_models, shared

    networks = lora_extension("network_apply_weights")
    hypernetworks = shared.loaded_hypernetworks
    loaded = [] if networks is None else list(networks.loaded_networks)
    sd_models.apply_token_merging(sd_model, 0)  # the next picture merges them again
    try:
        shared.loaded_hypernetworks = []
        _set_networks(sd_model, networks, [])
        yield
    finally:
        shared.loaded_hypernetworks = hypernetworks
        _set_networks(sd_model, networks, loaded)


def _set_networks(sd_model: Any, networks: Any, wanted: list[Any]) -> None:
    if networks is None:
        return
    networks.loaded_networks[:] = wanted
    with torch.no_grad():
        for module in sd_model.modules():
            if hasattr(module, "network_layer_name"):
                networks.network_apply_weights(module)


def left_out(sd_model: Any) -> list[str]:
    """What the host adds to every picture that training does not run, in words."""
    from modules import shared

    found = []
    name = getattr(shared.opts, "sd_hypernetwork", "None")
    if name and name != "None":
        found.append(f"the hypernetwork {name!r}, which the settings add to every prompt")
    ratio = getattr(shared.opts, "token_merging_ratio", 0) or 0
    if ratio > 0:
        found.append(f"token merging ({ratio:g})")
    return found
