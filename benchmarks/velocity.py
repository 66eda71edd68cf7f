"""What small models that put out a velocity have in common: the adapter, and drawing in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from concept_surgery.erase_core.files.fingerprint import fingerprint
from concept_surgery.erase_core.model.denoiser import Denoiser
from concept_surgery.erase_core.model.low_rank import LowRankEdit, LowRankSidePath
from concept_surgery.erase_core.model.prompt import Encoded, stack_tokens
from torch import Tensor, nn

from benchmarks.icons.classifier import classify, load_judge
from benchmarks.icons.latents import CHANNELS, PATCH, SIDE
from benchmarks.merged import merged

TOGETHER = 64  # prompts that are encoded at once where that is allowed
BATCH = 64  # pictures
STEPS = 10  # of the sampler


class Encoder(ABC):
    """Texts to what the network reads of them, each encoded by itself once and then remembered.

    Args:
        network: the model, with its text encoder.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._known: dict[str, Tensor] = {}

    @abstractmethod
    def read(self, texts: Sequence[str]) -> Iterable[Tensor]:
        """What the network reads of each text, in one batch."""

    def __call__(self, texts: Sequence[str], together: bool = False) -> list[Tensor]:
        """One tensor for each text; ``together`` allows batches, whose rounding may differ."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        size = TOGETHER if together else 1
        found: dict[str, Tensor] = {}
        for begin in range(0, len(new), size):
            part = new[begin : begin + size]
            with torch.no_grad():
                found.update(zip(part, self.read(part), strict=True))
        if not together:
            self._known.update(found)
        return [self._known[text] if text in self._known else found[text] for text in texts]


class VelocityDenoiser(Denoiser):
    """A small model as the engine sees it. Use as a context manager.

    The family's name is that of the models with one text encoder and matrices that read nothing
    but its tokens.

    Args:
        network: the model, frozen; while this lives its layers carry hooks.
        encode: gives what the network reads of texts.
        identity: a name for the weights.
        modules: the layers that train, by their kohya LoRA name.
        name: of the model, for the record.
    """

    family, device, dtype = "SD1.x", torch.device("cpu"), torch.float32

    def __init__(
        self,
        network: Any,
        encode: Encoder,
        identity: str,
        modules: Mapping[str, nn.Linear],
        name: str,
    ) -> None:
        self._modules, self._network, self._encode = modules, network, encode
        self.identity, self.names = identity, modules.keys()
        self._side_path = LowRankSidePath(modules)
        self.base = {"name": name, "fingerprint": fingerprint(self.matrices())}

    def __enter__(self) -> VelocityDenoiser:
        return self

    def __exit__(self, *exc: object) -> None:
        self._side_path.remove()

    def encode(self, prompts: Sequence[str], together: bool = False) -> list[Encoded]:
        """See the protocol."""
        return [Encoded(rows.clone()) for rows in self._encode(prompts, together)]

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """See the protocol."""
        return (CHANNELS, resolution // PATCH, resolution // PATCH)

    def noisy_latent(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """See the protocol."""
        return noise * sigma

    def noisy_picture(self, picture: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """See the protocol: a flow goes straight from the picture to the noise."""
        return (1 - sigma) * picture + sigma * noise

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """See the protocol: the network puts out a velocity."""
        return torch.ones_like(sigma)

    def predict_x0(
        self,
        x: Tensor,
        sigma: Tensor,
        prompts: Sequence[Encoded],
        edit: LowRankEdit | None = None,
    ) -> Tensor:
        """See the protocol."""
        states = stack_tokens(prompts)
        learning = torch.is_grad_enabled() and edit is not None
        with torch.set_grad_enabled(learning), self._side_path.active(edit, [states]):
            velocity = self._network.velocity(x.float(), sigma.float(), states)
        return x - sigma.view(-1, 1, 1, 1) * velocity

    def matrices(self) -> Mapping[str, Tensor]:
        """See the protocol."""
        return {name: module.weight for name, module in self._modules.items()}

    def weights(self) -> Iterator[Tensor]:
        """See the protocol."""
        yield from self._network.parameters()
        yield from self._network.buffers()

    def free_memory(self, wanted: int) -> int:
        """See the protocol."""
        return psutil.virtual_memory().available


class VelocityModel(ABC):
    """A whole model for a benchmark, on the CPU.

    Args:
        encoder: gives what the network reads of texts.
        drawing: the network that is drawn with.
        weights: the matrices of it that edits are merged into, by their kohya LoRA name.
        judge: the weights of the classifier.
    """

    def __init__(
        self, encoder: Encoder, drawing: Any, weights: Mapping[str, Tensor], judge: Path
    ) -> None:
        self._encoder, self._drawing, self._weights = encoder, drawing, dict(weights)
        self._judge = load_judge(judge)

    @abstractmethod
    def sampled(self, states: Tensor, against: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Latents (n, 16, 16, 16), drawn with guidance from what the network reads of prompts."""

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """What the network reads of each text, (rows, 128)."""
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
                drawn = self.sampled(states, against, noise[part], steps)
                parts.append(self._drawing.patches.pages(drawn))
        return np.concatenate(parts)

    def classify(self, pages: np.ndarray) -> tuple[list[str], list[str]]:
        """Names of the things (or "nothing") and styles in pictures uint8 (n, 64, 64, 3)."""
        return classify(self._judge, pages)


def draw_noise(count: int, seed: int) -> Tensor:
    """(count, 16, 16, 16)."""
    return torch.randn(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
