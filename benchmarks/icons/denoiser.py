"""The model as the erasure engine sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import psutil
import torch
from concept_surgery.erase_core.files.fingerprint import fingerprint
from concept_surgery.erase_core.model.activations import BlockRun
from concept_surgery.erase_core.model.denoiser import Denoiser
from concept_surgery.erase_core.model.low_rank import LowRankEdit, LowRankSidePath
from concept_surgery.erase_core.model.prompt import Encoded, stack_tokens
from concept_surgery.erase_core.settings.layers import matching
from torch import Tensor, nn

from benchmarks.icons.latents import CHANNELS, PATCH
from benchmarks.icons.network import Network, noise_levels, tokenize
from benchmarks.icons.words import vocabulary

BLOCKS = ".transformer_blocks."
TOGETHER = 64  # prompts that are encoded at once where that is allowed


def linear_layers(network: Network) -> dict[str, nn.Linear]:
    """All linear layers of the transformer blocks, by their kohya LoRA name."""
    return {
        f"lora_unet_{name.replace('.', '_')}": module
        for name, module in network.unet.named_modules()
        if BLOCKS in name and isinstance(module, nn.Linear)
    }


class Encoder:
    """Texts to states (24, 128), each encoded by itself once and then remembered."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str], together: bool = False) -> list[Tensor]:
        """One tensor for each text; ``together`` allows batches, whose rounding may differ."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        size = TOGETHER if together else 1
        found = {}
        for begin in range(0, len(new), size):
            part = new[begin : begin + size]
            with torch.no_grad():
                states = self._network.encode(tokenize(part)).float()
            found.update(zip(part, states, strict=True))
        if not together:
            self._known.update(found)
        return [self._known[text] if text in self._known else found[text] for text in texts]


class IconsDenoiser(Denoiser):
    """The icons model as the engine sees it. Use as a context manager.

    The family's name is that of the models with one text encoder and keys and values that read
    nothing but its tokens, which is what this one is.

    Args:
        network: the model, frozen; while this lives its layers carry hooks.
        encode: gives states of texts.
        identity: a name for the weights.
        layers: which matrices train, see ``erase_core.settings.layers``.
    """

    family, device, dtype = "SD1.x", torch.device("cpu"), torch.float32

    def __init__(
        self, network: Network, encode: Encoder, identity: str, layers: str = "key-value"
    ) -> None:
        linear = linear_layers(network)
        self._modules = {name: linear[name] for name in matching(linear, layers)}
        self._network, self._encode, self.identity = network, encode, identity
        self.names = self._modules.keys()
        self._side_path = LowRankSidePath(self._modules)
        self.base = {"name": "icons", "fingerprint": fingerprint(self.matrices())}

    def __enter__(self) -> IconsDenoiser:
        return self

    def __exit__(self, *exc: object) -> None:
        self._side_path.remove()

    def encode(self, prompts: Sequence[str], together: bool = False) -> list[Encoded]:
        """See the protocol."""
        return [Encoded(rows.clone()) for rows in self._encode(prompts, together)]

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """See the protocol."""
        return tokenize(prompts).tolist()

    def vocabulary(self) -> list[str]:
        """All whole words of the tokenizer in the order of their ids, without punctuation."""
        return [word for word in vocabulary() if word[0].isalnum()]

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
        states = stack_tokens(prompts)
        learning = torch.is_grad_enabled() and edit is not None
        with torch.set_grad_enabled(learning), self._side_path.active(edit, [states]):
            velocity = self._network.velocity(x.float(), sigma.float(), states)
        return x - sigma.view(-1, 1, 1, 1) * velocity

    def matrices(self) -> Mapping[str, Tensor]:
        """See the protocol."""
        return {name: module.weight for name, module in self._modules.items()}

    @contextmanager
    def around_blocks(self, run: BlockRun) -> Iterator[None]:
        """See the protocol: the transformer blocks are run so, which is where prompts are read."""
        with ExitStack() as stack:
            for name, block in self._network.unet.named_modules():
                if BLOCKS in name and name.rpartition(".")[2].isdigit() and hasattr(block, "attn2"):
                    stack.enter_context(self._run_by(run, block))
            yield

    @contextmanager
    def _run_by(self, run: BlockRun, block: nn.Module) -> Iterator[None]:
        forward = block.forward

        def instead(*inputs, **named):  # type: ignore[no-untyped-def]
            if not torch.is_grad_enabled():
                return forward(*inputs, **named)
            again = self._side_path.again()

            def whole(*inputs, **named):  # type: ignore[no-untyped-def]
                with again():
                    return forward(*inputs, **named)

            return run(whole, *inputs, **named)

        before = vars(block).get("forward")
        block.forward = instead
        try:
            yield
        finally:
            if before is None:
                del block.forward
            else:
                block.forward = before

    def weights(self) -> Iterator[Tensor]:
        """See the protocol."""
        yield from self._network.parameters()
        yield from self._network.buffers()

    def free_memory(self, wanted: int) -> int:
        """See the protocol."""
        return psutil.virtual_memory().available
