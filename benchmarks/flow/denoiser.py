"""The model as the erasure engine sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import psutil
import torch
from concept_surgery.erase_core.files.fingerprint import fingerprint
from concept_surgery.erase_core.model.denoiser import Denoiser
from concept_surgery.erase_core.model.low_rank import LowRankEdit, LowRankSidePath
from concept_surgery.erase_core.model.prompt import TOKENS, Encoded, stack_tokens
from torch import Tensor, nn

from benchmarks.flow.network import Network, noise_levels
from benchmarks.flow.text import tokenize
from benchmarks.flow.words import extra_words
from benchmarks.icons.latents import CHANNELS, PATCH
from benchmarks.icons.words import vocabulary

TOGETHER = 64  # prompts that are encoded at once where that is allowed
ENTRY = "lora_unet_cap_embedder_1"


def entry_layer(network: Network) -> dict[str, nn.Linear]:
    """The one layer that the text encoder's states enter by, under its kohya LoRA name."""
    return {ENTRY: network.transformer.cap_embedder[1]}


class Encoder:
    """Texts to what the entry layer reads (32 or more rows, 128), each once and then remembered."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str], together: bool = False) -> list[Tensor]:
        """One tensor for each text; ``together`` allows batches, whose rounding may differ."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        size = TOGETHER if together else 1
        found: dict[str, Tensor] = {}
        for begin in range(0, len(new), size):
            part = new[begin : begin + size]
            with torch.no_grad():
                found.update(zip(part, self._network.entering(*tokenize(part)), strict=True))
        if not together:
            self._known.update(found)
        return [self._known[text] if text in self._known else found[text] for text in texts]


class FlowDenoiser(Denoiser):
    """The flow model as the engine sees it. Use as a context manager.

    What the engine calls a prompt's tokens is here what enters at the entry layer: the text
    encoder's states after the norm. With that the layer is a matrix that reads nothing but them,
    as keys and values of a U-Net do. The family's name is that of models of which this holds.

    Args:
        network: the model, frozen; while this lives its entry layer carries a hook.
        encode: gives what enters.
        identity: a name for the weights.
    """

    family, device, dtype = "SD1.x", torch.device("cpu"), torch.float32

    def __init__(self, network: Network, encode: Encoder, identity: str) -> None:
        self._modules = entry_layer(network)
        self._network, self._encode, self.identity = network, encode, identity
        self.names = self._modules.keys()
        self.ways = {TOKENS: [ENTRY]}
        self._side_path = LowRankSidePath(self._modules)
        self.base = {"name": "flow", "fingerprint": fingerprint(self.matrices())}

    def __enter__(self) -> FlowDenoiser:
        return self

    def __exit__(self, *exc: object) -> None:
        self._side_path.remove()

    def encode(self, prompts: Sequence[str], together: bool = False) -> list[Encoded]:
        """See the protocol. Padding is zeros, which no edit moves."""
        return [Encoded(rows.clone()) for rows in self._encode(prompts, together)]

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """See the protocol; with the chat template, and padded."""
        return [tokenize([prompt])[0][0].tolist() for prompt in prompts]

    def vocabulary(self) -> list[str]:
        """Whole words that it met in training; all others are random numbers."""
        return [word for word in vocabulary() if word[0].isalnum()] + list(extra_words())

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """See the protocol."""
        return (CHANNELS, resolution // PATCH, resolution // PATCH)

    def sigmas(self, steps: int) -> Tensor:
        """See the protocol: sigma is the share of noise, 1 at the beginning."""
        return noise_levels(steps)

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
        read = stack_tokens(prompts)
        learning = torch.is_grad_enabled() and edit is not None
        with torch.set_grad_enabled(learning), self._side_path.active(edit, [read]):
            velocity = self._network.velocity(x.float(), sigma.float(), read)
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
