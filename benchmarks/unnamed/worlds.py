"""The models behind one face: things, phrases, a denoiser, pictures, a judge."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from torch import Tensor

from benchmarks.merged import merged

STEPS, GUIDANCE = 10, 4.0
AT_ONCE = 128  # pictures that are drawn together on a GPU

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "unnamed"
WEIGHTS = {
    name: ROOT / "benchmarks" / name / "weights" / f"{name}.safetensors"
    for name in ("emoji", "icons", "flow")
}

# Phrases in which neither model's erasure is trained, nor its words are read.
PLAIN = ("my favourite {o}", "look at the {o} over there", "{a} on a white background")
STYLED = (
    "an image of {a} in the {s} style",
    "{o}, simple, {s} style",
    "a {s} style picture of {a}",
)


@dataclass(frozen=True)
class Drawn:
    """Pictures uint8 (n, 64, 64, 3) with what a judge calls them."""

    pages: np.ndarray
    things: list[str]
    styles: list[str]


class World(Protocol):
    """A model that draws.

    Attributes:
        name: of the model.
        identity: of its weights.
        drawing: what it draws on; pictures from different ones differ by rounding.
        things, styles: what it can be asked for.
    """

    name: str
    identity: str
    drawing: str
    things: tuple[str, ...]
    styles: tuple[str, ...]

    def denoiser(self) -> AbstractContextManager[Any]:
        """The model as the engine sees it, its predictions counted."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Token embeddings (n, tokens, width)."""

    def matrices(self) -> dict[str, Tensor]:
        """Keys' and values' matrices by name."""

    def draw(
        self, texts: Sequence[str], seeds: Sequence[int], edit: LowRankEdit | None = None
    ) -> Drawn:
        """A picture for each text, from noise of its own seed."""

    def states(self, texts: Sequence[str], seeds: Sequence[int], stops: Sequence[int]) -> Tensor:
        """Latents (stops, n, c, h, w) on the untouched model's way under the texts."""

    def guidance(
        self,
        texts: Sequence[str],
        states: Tensor,
        stops: Sequence[int],
        edit: LowRankEdit | None = None,
    ) -> Tensor:
        """Guidance terms (stops, n, c, h, w) at such latents."""

    def vocabulary(self) -> list[str]:
        """Words that the text encoder knows."""


@cache
def identity(name: str) -> str:
    """Of a model's committed weights."""
    return hashlib.sha256(WEIGHTS[name].read_bytes()).hexdigest()[:16]


def open_world(name: str) -> World:
    """The model of that name: "emoji", "icons" or "flow".

    Raises:
        KeyError: another name.
    """
    from benchmarks.unnamed import emoji_world, flow_world, icons_world

    worlds = {
        "emoji": emoji_world.EmojiWorld,
        "icons": icons_world.IconsWorld,
        "flow": flow_world.FlowWorld,
    }
    return worlds[name]()


def drawing_device() -> torch.device:
    """A GPU where there is one. Only drawing runs there; what is measured is trained on the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


class Sampler:
    """Euler's method with guidance, and the guidance term, on a network that edits go into.

    Args:
        weights: the network's matrices by name.
        levels: noise levels, falling to 0.
        predict: the network at a latent (n, c, h, w) at the level of that number, under prompts.
        device: where the network is.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        levels: Sequence[float],
        predict: Callable[[Tensor, int, Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self._weights, self._levels = weights, list(levels)
        self._predict, self._device = predict, device

    @torch.no_grad()
    def way(
        self, noise: Tensor, prompts: Tensor, null: Tensor, edit: LowRankEdit | None = None
    ) -> list[Tensor]:
        """Latents (n, c, h, w) at every noise level, from noise at the highest.

        Args:
            prompts: (n, tokens, width).
            null: of the empty prompt, (tokens, width).
        """
        parts = []
        with merged(self._weights, edit):
            for x, given in zip(noise.split(AT_ONCE), prompts.split(AT_ONCE), strict=True):
                stops = [x.to(self._device)]
                for number, (now, after) in enumerate(
                    zip(self._levels[:-1], self._levels[1:], strict=True)
                ):
                    towards, plain = self._both(stops[-1], number, given, null)
                    step = plain + GUIDANCE * (towards - plain)
                    stops.append(stops[-1] + step * (after - now))
                parts.append(stops)
        return [torch.cat(latents) for latents in zip(*parts, strict=True)]

    @torch.no_grad()
    def guidance(
        self,
        states: Tensor,
        stops: Sequence[int],
        prompts: Tensor,
        null: Tensor,
        edit: LowRankEdit | None,
    ) -> Tensor:
        """``g`` (s, n, c, h, w) at states of that shape, each at the noise level of its stop."""
        with merged(self._weights, edit):
            found = [
                torch.cat(
                    [
                        self._term(now.to(self._device), stop, given, null)
                        for now, given in zip(x.split(AT_ONCE), prompts.split(AT_ONCE), strict=True)
                    ]
                )
                for x, stop in zip(states, stops, strict=True)
            ]
        return torch.stack(found).cpu()

    def _term(self, x: Tensor, number: int, prompts: Tensor, null: Tensor) -> Tensor:
        towards, plain = self._both(x, number, prompts, null)
        return towards - plain

    def _both(self, x: Tensor, number: int, prompts: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
        asked = torch.cat([prompts, null.expand(len(x), -1, -1)]).to(self._device)
        return self._predict(x.repeat(2, 1, 1, 1), number, asked).float().chunk(2)


def asked(word: str, article: str, styles: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Prompts for a thing with the style that each names, "" for none: plain and styled in turn."""
    found = []
    for number in range(count):
        turn, styled = divmod(number, 2)
        style = styles[turn % len(styles)] if styled else ""
        phrase = (STYLED if styled else PLAIN)[turn % 3]
        found.append((phrase.format(a=article, o=word, s=style), style))
    return found


def noises(shape: tuple[int, ...], seeds: Sequence[int]) -> Tensor:
    """(n, *shape), each from its own seed."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
