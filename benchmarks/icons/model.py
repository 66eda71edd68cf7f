"""The whole model for a benchmark: trained on through its adapter, drawn from in batches."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.icons.build import WEIGHTS, packed_network
from benchmarks.icons.classifier import COMMITTED
from benchmarks.icons.denoiser import Encoder, IconsDenoiser, linear_layers
from benchmarks.icons.network import sample
from benchmarks.velocity import VelocityModel


class IconsModel(VelocityModel):
    """The committed weights on the CPU, with their judge.

    Args:
        path: the packed weights.
        judge: the classifier's.
    """

    def __init__(self, path: Path = WEIGHTS, judge: Path = COMMITTED) -> None:
        self.identity = hashlib.sha256(path.read_bytes()).hexdigest()
        self._network = packed_network(path)
        drawing = copy.deepcopy(self._network)
        drawing.unet.to(memory_format=torch.channels_last)
        weights = {name: layer.weight for name, layer in linear_layers(drawing).items()}
        super().__init__(Encoder(self._network), drawing, weights, judge)

    def denoiser(self, layers: str = "key-value") -> IconsDenoiser:
        """The model as the engine sees it: ``with model.denoiser() as denoiser``."""
        return IconsDenoiser(self._network, self._encoder, self.identity, layers)

    def sampled(self, states: Tensor, against: Tensor, noise: Tensor, steps: int) -> Tensor:
        """See :class:`VelocityModel`."""
        return sample(self._drawing, states, against, noise, steps)
