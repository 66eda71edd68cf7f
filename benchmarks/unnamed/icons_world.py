"""The icons model, through its own adapter. Nothing is ever chosen on it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from torch import Tensor

from benchmarks.counted import CountedDenoiser
from benchmarks.icons.classifier import COMMITTED, classify, load_judge
from benchmarks.icons.denoiser import linear_layers
from benchmarks.icons.model import IconsModel
from benchmarks.icons.network import noise_levels
from benchmarks.icons.words import STYLE_NAMES, THING_NAMES
from benchmarks.unnamed.worlds import STEPS, Drawn, Sampler, drawing_device, identity, noises


class IconsWorld:
    """See :class:`worlds.World`."""

    name = "icons"
    things, styles = THING_NAMES, STYLE_NAMES

    def __init__(self) -> None:
        self._model, self._device = IconsModel(), drawing_device()
        self.identity = identity(self.name)
        self._shape = tuple(self._model.draw_noise(1, 0).shape[1:])
        self._judge = load_judge(COMMITTED, self._device)
        self._on_gpu = self._device.type != "cpu"
        self.drawing = "gpu" if self._on_gpu else "cpu"
        self._network = self._model._drawing
        if self._on_gpu:
            self._network = copy.deepcopy(self._network).to(self._device, torch.float32)
        self._sampler = _sampler(self._network, self._device)

    def denoiser(self) -> AbstractContextManager[Any]:
        return self._counted()

    @contextmanager
    def _counted(self) -> Any:
        with self._model.denoiser() as denoiser:
            yield CountedDenoiser(denoiser)

    def encode(self, texts: Sequence[str]) -> Tensor:
        return torch.stack(self._model.encode(texts))

    def matrices(self) -> dict[str, Tensor]:
        with self._model.denoiser() as denoiser:
            return dict(denoiser.matrices())

    def draw(
        self, texts: Sequence[str], seeds: Sequence[int], edit: LowRankEdit | None = None
    ) -> Drawn:
        noise = noises(self._shape, seeds)
        if self._on_gpu:
            pages = self._network.patches.pages(self._way(texts, noise, edit)[-1])
        else:
            pages = self._model.pictures(texts, [""] * len(texts), noise, edit, STEPS)
        return Drawn(pages, *classify(self._judge, pages))

    def states(self, texts: Sequence[str], seeds: Sequence[int], stops: Sequence[int]) -> Tensor:
        way = self._way(texts, noises(self._shape, seeds), None)
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
        with self._model.denoiser() as denoiser:
            return denoiser.vocabulary()

    def _way(self, texts: Sequence[str], noise: Tensor, edit: LowRankEdit | None) -> list[Tensor]:
        return self._sampler.way(noise, self.encode(texts), self.encode([""])[0], edit)


def _sampler(network: Any, device: torch.device) -> Sampler:
    levels = noise_levels(STEPS).tolist()
    weights = {name: layer.weight for name, layer in linear_layers(network).items()}

    def predict(x: Tensor, number: int, prompts: Tensor) -> Tensor:
        at = torch.full((len(x),), levels[number], device=device)
        return network.velocity(x.contiguous(memory_format=torch.channels_last), at, prompts)

    return Sampler(weights, levels, predict, device)
