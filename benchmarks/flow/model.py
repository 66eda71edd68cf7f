"""The whole model for a benchmark: trained on through its adapter, drawn from in batches."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from torch import Tensor

from benchmarks.flow.build import WEIGHTS, packed_network
from benchmarks.flow.denoiser import Encoder, FlowDenoiser, entry_layer
from benchmarks.flow.network import STEPS, Network, draw_noise, sample
from benchmarks.icons.classifier import COMMITTED, classify, load_judge
from benchmarks.merged import merged

BATCH = 64


class FlowModel:
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
        self._encoder = Encoder(self._network)
        self._drawing = copy.deepcopy(self._network)
        self._weights = {name: layer.weight for name, layer in entry_layer(self._drawing).items()}
        self._judge = load_judge(judge)

    def denoiser(self) -> FlowDenoiser:
        """The model as the engine sees it: ``with model.denoiser() as denoiser``."""
        return FlowDenoiser(self._network, self._encoder, self.identity)

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """What the entry layer reads of each text, (32 or more, 128)."""
        return self._encoder(texts)

    def draw_noise(self, count: int, seed: int) -> Tensor:
        """Noise to draw from, (count, 16, 16, 16)."""
        return draw_noise(count, seed)

    def pictures(
        self,
        texts: Sequence[str],
        negatives: Sequence[str],
        noise: Tensor,
        edit: LowRankEdit | None = None,
        steps: int = STEPS,
    ) -> np.ndarray:
        """Pictures uint8 (n, 64, 64, 3): Euler's method with guidance, the edit merged.

        Args:
            texts: one for each picture, at most 24 tokens each.
            negatives: one for each picture.
            noise: (n, 16, 16, 16).
            edit: merged into the weights that are drawn with.
            steps: of the sampler.
        """
        parts = []
        with merged(self._weights, edit):
            for begin in range(0, len(texts), BATCH):
                part = slice(begin, begin + BATCH)
                read = torch.stack(self.encode(texts[part]))
                against = torch.stack(self.encode(negatives[part]))
                drawn = sample(self._drawing, read, against, noise[part], steps)
                parts.append(self._drawing.patches.pages(drawn))
        return np.concatenate(parts)

    def classify(self, pages: np.ndarray) -> tuple[list[str], list[str]]:
        """Names of the things (or "nothing") and styles in pictures uint8 (n, 64, 64, 3)."""
        return classify(self._judge, pages)
