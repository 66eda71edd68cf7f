"""The model as the erasure engine sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from concept_surgery.erase_core.model.activations import BlockRun
from concept_surgery.erase_core.settings.layers import matching
from torch import Tensor, nn

from benchmarks import velocity
from benchmarks.icons.network import Network, noise_levels, tokenize
from benchmarks.icons.words import vocabulary
from benchmarks.velocity import VelocityDenoiser

BLOCKS = ".transformer_blocks."


def linear_layers(network: Network) -> dict[str, nn.Linear]:
    """All linear layers of the transformer blocks, by their kohya LoRA name."""
    return {
        f"lora_unet_{name.replace('.', '_')}": module
        for name, module in network.unet.named_modules()
        if BLOCKS in name and isinstance(module, nn.Linear)
    }


class Encoder(velocity.Encoder):
    """Texts to states (24, 128)."""

    def read(self, texts: Sequence[str]) -> Tensor:
        """States of each text."""
        return self._network.encode(tokenize(texts)).float()


class IconsDenoiser(VelocityDenoiser):
    """The icons model as the engine sees it. Use as a context manager.

    Args:
        network: the model, frozen; while this lives its layers carry hooks.
        encode: gives states of texts.
        identity: a name for the weights.
        layers: which matrices train, see ``erase_core.settings.layers``.
    """

    def __init__(
        self, network: Network, encode: Encoder, identity: str, layers: str = "key-value"
    ) -> None:
        linear = linear_layers(network)
        modules = {name: linear[name] for name in matching(linear, layers)}
        super().__init__(network, encode, identity, modules, "icons")

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """See the protocol."""
        return tokenize(prompts).tolist()

    def vocabulary(self) -> list[str]:
        """All whole words of the tokenizer in the order of their ids, without punctuation."""
        return [word for word in vocabulary() if word[0].isalnum()]

    def sigmas(self, steps: int) -> Tensor:
        """See the protocol: sigma is the share of noise, 1 at the beginning."""
        return noise_levels(steps)

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
