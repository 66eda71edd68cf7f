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

from benchmarks.icons.build import WEIGHTS, packed_network
from benchmarks.icons.classifier import COMMITTED, classify, load_judge
from benchmarks.icons.denoiser import Encoder, IconsDenoiser, linear_layers
from benchmarks.icons.network import STEPS, draw_noise, sample
from benchmarks.merged import merged

BATCH = 64


class IconsModel:
    """The committed weights on the CPU, with their judge.

    Args:
        path: the packed weights.
        judge: the classifier's.
    """

    def __init__(self, path: Path = WEIGHTS, judge: Path = COMMITTED) -> None:
        self.identity = hashlib.sha256(path.read_bytes()).hexdigest()
        self._network = packed_network(path)
        self._encoder = Encoder(self._network)
        self._drawing = copy.deepcopy(self._network)
        self._drawing.unet.to(memory_format=torch.channels_last)
        self._weights = {n: layer.weight for n, layer in linear_layers(self._drawing).items()}
        self._judge = load_judge(judge)

    def denoiser(self, layers: str = "key-value") -> IconsDenoiser:
        """The model as the engine sees it: ``with model.denoiser() as denoiser``."""
        return IconsDenoiser(self._network, self._encoder, self.identity, layers)

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """States (24, 128) of each text."""
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
            texts: one for each picture.
            negatives: one for each picture.
            noise: (n, 16, 16, 16).
            edit: merged into the weights that are drawn with.
            steps: of the sampler.
        """
        parts = []
        with merged(self._weights, edit):
            for begin in range(0, len(texts), BATCH):
                part = slice(begin, begin + BATCH)
                states = torch.stack(self.encode(texts[part]))
                against = torch.stack(self.encode(negatives[part]))
                drawn = sample(self._drawing, states, against, noise[part], steps)
                parts.append(self._drawing.patches.pages(drawn))
        return np.concatenate(parts)

    def classify(self, pages: np.ndarray) -> tuple[list[str], list[str]]:
        """Names of the things (or "nothing") and styles in pictures uint8 (n, 64, 64, 3)."""
        return classify(self._judge, pages)
