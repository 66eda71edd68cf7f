"""The model as the erasure engine sees it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from concept_surgery.erase_core.model.prompt import TOKENS
from torch import Tensor, nn

from benchmarks import velocity
from benchmarks.flow.network import Network, noise_levels
from benchmarks.flow.text import tokenize
from benchmarks.flow.words import extra_words
from benchmarks.icons.words import vocabulary
from benchmarks.velocity import VelocityDenoiser

ENTRY = "lora_unet_cap_embedder_1"


def entry_layer(network: Network) -> dict[str, nn.Linear]:
    """The one layer that the text encoder's states enter by, under its kohya LoRA name."""
    return {ENTRY: network.transformer.cap_embedder[1]}


class Encoder(velocity.Encoder):
    """Texts to what the entry layer reads (32 or more rows, 128). Padding is zeros."""

    def read(self, texts: Sequence[str]) -> Iterable[Tensor]:
        """What it reads of each text."""
        return self._network.entering(*tokenize(texts))


class FlowDenoiser(VelocityDenoiser):
    """The flow model as the engine sees it. Use as a context manager.

    What the engine calls a prompt's tokens is here what enters at the entry layer: the text
    encoder's states after the norm. With that the layer is a matrix that reads nothing but them,
    as keys and values of a U-Net do. The family's name is that of models of which this holds.

    Args:
        network: the model, frozen; while this lives its entry layer carries a hook.
        encode: gives what enters.
        identity: a name for the weights.
    """

    def __init__(self, network: Network, encode: Encoder, identity: str) -> None:
        super().__init__(network, encode, identity, entry_layer(network), "flow")
        self.ways = {TOKENS: [ENTRY]}

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """See the protocol; with the chat template, and padded."""
        return [tokenize([prompt])[0][0].tolist() for prompt in prompts]

    def vocabulary(self) -> list[str]:
        """Whole words that it met in training; all others are random numbers."""
        return [word for word in vocabulary() if word[0].isalnum()] + list(extra_words())

    def sigmas(self, steps: int) -> Tensor:
        """See the protocol: sigma is the share of noise, 1 at the beginning."""
        return noise_levels(steps)
