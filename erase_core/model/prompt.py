"""A prompt as the text encoder gives it, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Any, Protocol

import torch
from torch import Tensor

# What of a prompt enters a network, each on a way of its own.
TOKENS, POOLED = "tokens", "pooled vector"


@dataclass(frozen=True)
class Read:
    """What a network reads of a prompt on a way of its own, float32 on the CPU.

    Attributes:
        rows: (rows, size).
        places: for each of them the row of the token embeddings that it stands for, (rows,).
        ids: token ids of the rows, where they are of another tokenizer than the embeddings.
    """

    rows: Tensor
    places: Tensor
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Encoded:
    """A prompt as the text encoder gives it, float32 on the CPU.

    Attributes:
        tokens: token embeddings, (tokens, width).
        pooled: the pooled vector of models that take one beside the tokens, (size,); else None.
        extras: what else the text encoder gives the network, by the host's names, such as masks,
            ids, the output of another encoder.
        read: by way, what the network reads of it where that is something else than the above.
            :meth:`denoiser.Denoiser.read` fills it in.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    extras: Mapping[str, Any] = field(default_factory=dict, compare=False)
    read: dict[str, Read] = field(default_factory=dict, compare=False, repr=False)

    def rows(self, way: str) -> Tensor:
        """What enters on a way, (rows, size): a pooled vector is a single row.

        Args:
            way: :data:`TOKENS`, :data:`POOLED`, or one of :attr:`read`.

        Raises:
            ValueError: another way, or one on which nothing of this prompt enters.
        """
        if way in self.read:
            return self.read[way].rows
        if way == TOKENS:
            return self.tokens
        if way == POOLED and self.pooled is not None:
            return self.pooled[None]
        raise ValueError(f"This prompt has no {way!r}.")

    def places(self, way: str) -> list[int]:
        """For each row that enters on a way, the row of the token embeddings it stands for."""
        if way in self.read:
            return [int(place) for place in self.read[way].places.tolist()]
        return list(range(len(self.rows(way))))

    def zeroed(self) -> Encoded:
        """The same shapes filled with zeros: what some workflows use as the null prompt."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Encoded(torch.zeros_like(self.tokens), pooled, self.extras)

    def with_pooled(self, pooled: Tensor | None) -> Encoded:
        """The same tokens with another pooled vector."""
        return Encoded(self.tokens, pooled, self.extras)

    def tensors(self) -> list[Tensor]:
        """All that the text encoder gave, in a fixed order."""
        extras = [self.extras[name] for name in sorted(self.extras)]
        parts = [self.tokens, self.pooled, *extras]
        return [part for part in parts if isinstance(part, Tensor)]


class ReadsText(Protocol):
    """A text encoder: what of :class:`denoiser.Denoiser` needs no network."""

    def encode(self, prompts: Sequence[str], together: bool = False) -> list[Encoded]:
        """See there."""

    def token_ids(self, prompts: Sequence[str]) -> Sequence[Sequence[int]]:
        """See there."""

    def vocabulary(self) -> Sequence[str]:
        """See there."""


def stack_tokens(prompts: Sequence[Encoded]) -> Tensor:
    """One batch (n, length, width) of prompts that may differ in length, for cross-attention.

    Shorter ones are repeated up to the least common multiple, as the hosts do: attention over a
    key set in which every key occurs equally often is attention over the set itself.
    """
    every = [prompt.tokens for prompt in prompts]
    length = lcm(*(tokens.shape[0] for tokens in every))
    return torch.stack([tokens.repeat(length // tokens.shape[0], 1) for tokens in every])


def stack_pooled(prompts: Sequence[Encoded]) -> Tensor | None:
    """The pooled vectors of a batch, (n, size); None where the model takes none."""
    vectors = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    return torch.stack(vectors) if len(vectors) == len(prompts) else None
