"""The whole model for a benchmark: trained on through its adapter, drawn from in batches."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

from torch import Tensor

from benchmarks.flow.build import WEIGHTS, packed_network
from benchmarks.flow.denoiser import Encoder, FlowDenoiser, entry_layer
from benchmarks.flow.network import Network, sample
from benchmarks.icons.classifier import COMMITTED
from benchmarks.velocity import VelocityModel


class FlowModel(VelocityModel):
    """The committed weights on the CPU, with the second model's judge.

    Args:
        path: the packed weights.
        judge: the classifier's.
        network: another network than that of ``path``, for a training that isn't over.
    """

    def __init__(
        self, path: Path = WEIGHTS, judge: Path = COMMITTED, network: Network | None = None
    ) -> None:
        self.identity = hashlib.sha256(path.read_bytes()).hexdigest() if network is None else ""
        self._network = packed_network(path) if network is None else network
        drawing = copy.deepcopy(self._network)
        weights = {name: layer.weight for name, layer in entry_layer(drawing).items()}
        super().__init__(Encoder(self._network), drawing, weights, judge)

    def denoiser(self) -> FlowDenoiser:
        """The model as the engine sees it: ``with model.denoiser() as denoiser``."""
        return FlowDenoiser(self._network, self._encoder, self.identity)

    def sampled(self, states: Tensor, against: Tensor, noise: Tensor, steps: int) -> Tensor:
        """See :class:`VelocityModel`."""
        return sample(self._drawing, states, against, noise, steps)
