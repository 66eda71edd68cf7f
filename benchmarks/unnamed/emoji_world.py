"""The emoji model, in the host."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.samplers import calculate_sigmas
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.nodes.host import trained_keys
from torch import Tensor

from benchmarks.emoji.build import build_emoji_checkpoint
from benchmarks.emoji.classifier import COMMITTED, classify, load_classifier
from benchmarks.emoji.words import OBJECT_NAMES, STYLE_NAMES
from benchmarks.erasure.painter import Painter
from benchmarks.erasure.run import leave_out_empty_layers
from benchmarks.unnamed.worlds import STEPS, WORK, Drawn, Sampler, drawing_device, identity, noises

SHAPE = (4, 8, 8)


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16; one that doesn't takes many times as long."""
    return torch.cpu._is_avx512_bf16_supported()


class EmojiWorld:
    """See :class:`worlds.World`."""

    name = "emoji"
    things, styles = OBJECT_NAMES, STYLE_NAMES

    def __init__(self) -> None:
        checkpoint = build_emoji_checkpoint(WORK / "emoji.safetensors")
        fast, self._device = has_bfloat16(), drawing_device()
        self._painter = Painter(checkpoint, STEPS, fast=fast, folder=WORK)
        leave_out_empty_layers(self._painter.clip)
        self._judge = load_classifier(COMMITTED, self._device)
        self.identity = identity(self.name)
        self._on_gpu = self._device.type != "cpu"
        self.drawing = "gpu" if self._on_gpu else f"cpu{'-bfloat16' * fast}"
        self._sampler = _sampler(self._painter, self._device)
        self._decoder = _decoder(self._painter, self._device) if self._on_gpu else None

    def denoiser(self) -> AbstractContextManager[Any]:
        return self._painter.denoiser("key-value")

    def encode(self, texts: Sequence[str]) -> Tensor:
        return torch.stack(self._painter.encode(texts))

    def matrices(self) -> dict[str, Tensor]:
        with self.denoiser() as denoiser:
            return dict(denoiser.matrices())

    def draw(
        self, texts: Sequence[str], seeds: Sequence[int], edit: LowRankEdit | None = None
    ) -> Drawn:
        noise = noises(SHAPE, seeds)
        if self._on_gpu:
            pages = self._decoded(self._way(texts, noise, edit)[-1])
        else:
            latents = self._painter.latents(texts, [""] * len(texts), noise, edit)
            pages = self._painter.pages(latents)
        return Drawn(pages, *classify(self._judge, pages))

    def states(self, texts: Sequence[str], seeds: Sequence[int], stops: Sequence[int]) -> Tensor:
        way = self._way(texts, noises(SHAPE, seeds), None)
        return torch.stack([way[stop] for stop in stops]).cpu()

    def guidance(
        self,
        texts: Sequence[str],
        states: Tensor,
        stops: Sequence[int],
        edit: LowRankEdit | None = None,
    ) -> Tensor:
        prompts, null = self.encode(texts), self.encode([""])[0]
        return self._sampler.guidance(states, stops, prompts, null, edit)

    def vocabulary(self) -> list[str]:
        with self.denoiser() as denoiser:
            return denoiser.vocabulary()

    def _way(self, texts: Sequence[str], noise: Tensor, edit: LowRankEdit | None) -> list[Tensor]:
        sampling = self._painter.model.get_model_object("model_sampling")
        sigma = calculate_sigmas(sampling, "normal", STEPS)[0]
        start = sampling.noise_scaling(sigma, noise, torch.zeros_like(noise), max_denoise=True)
        return self._sampler.way(start, self.encode(texts), self.encode([""])[0], edit)

    def _decoded(self, latents: Tensor) -> np.ndarray:
        """As ``Painter.pages``, with the decoder where the latents are."""
        vae, scale = self._painter.vae, self._painter.model.model.latent_format.process_out
        with torch.inference_mode():
            pictures = vae.process_output(self._decoder.decode(scale(latents).float()))
            pages = pictures.movedim(1, -1).clamp(0, 1).mul(255).round().byte()
            return pages.contiguous().cpu().numpy()


def _sampler(painter: Painter, device: torch.device) -> Sampler:
    """On the painter's own network, or on a copy of it on a GPU."""
    network = painter._network
    if device.type != "cpu":
        network = copy.deepcopy(network).to(device, torch.float32)
    parameters = dict(network.named_parameters())
    keys = trained_keys(painter.model, "key-value")
    weights = {n: parameters[k.removeprefix("diffusion_model.")] for n, k in keys.items()}
    sampling = painter.model.get_model_object("model_sampling")
    sigmas = calculate_sigmas(sampling, "normal", STEPS)
    times = [sampling.timestep(sigma) for sigma in sigmas[:-1]]

    def predict(x: Tensor, number: int, prompts: Tensor) -> Tensor:
        scaled = x / (1 + float(sigmas[number]) ** 2) ** 0.5
        scaled = scaled.contiguous(memory_format=torch.channels_last)
        at = times[number].expand(len(x)).to(device)
        options = {"optimized_attention_override": _attention}
        return network(scaled, at, prompts, transformer_options=options)

    return Sampler(weights, sigmas.tolist(), predict, device)


def _decoder(painter: Painter, device: torch.device) -> Any:
    """A copy of the host's decoder on a GPU."""
    with torch.inference_mode():
        return copy.deepcopy(painter.vae.first_stage_model).to(device, torch.float32)


def _attention(_chosen: Any, *args: Any, **keywords: Any) -> Tensor:
    """PyTorch's, on a CPU and on a GPU."""
    return attention_pytorch(*args, **keywords)
