"""The flow transformer, through its own adapter: one entry layer instead of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.flow.denoiser import entry_layer
from benchmarks.flow.model import FlowModel
from benchmarks.flow.network import noise_levels
from benchmarks.flow.words import THING_NAMES
from benchmarks.icons.classifier import COMMITTED, load_judge
from benchmarks.icons.words import STYLE_NAMES
from benchmarks.unnamed.icons_world import IconsWorld
from benchmarks.unnamed.worlds import STEPS, Sampler, identity


class FlowWorld(IconsWorld):
    """See :class:`worlds.World`. Pictures and judge are the second model's; it draws on a CPU."""

    name = "flow"
    things, styles = THING_NAMES, STYLE_NAMES

    def __init__(self) -> None:
        self._model, self._device = FlowModel(), torch.device("cpu")
        self.identity = identity(self.name)
        self._shape = tuple(self._model.draw_noise(1, 0).shape[1:])
        self._judge = load_judge(COMMITTED, self._device)
        self._on_gpu, self.drawing = False, "cpu"
        self._network = self._model._drawing
        levels = noise_levels(STEPS).tolist()
        weights = {name: layer.weight for name, layer in entry_layer(self._network).items()}

        def predict(x: Tensor, number: int, read: Tensor) -> Tensor:
            return self._network.velocity(x, torch.full((len(x),), levels[number]), read)

        self._sampler = Sampler(weights, levels, predict, self._device)
