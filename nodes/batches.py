"""Many prompts through the host's CLIP at once: how what comes out is to be taken apart.

The host encodes a long prompt as sections side by side in one batch; prompts put in as sections of
one are encoded together. What comes out then depends on the encoder: streams that follow one
another in a prompt do so in the batch, and the pooled vector is that of the first section alone.
Both are found by measurement, once for each text encoder: what a prompt is in a batch is compared
with what it is alone, and where nothing agrees, prompts are encoded one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from comfy.sd1_clip import SDClipModel
from torch import Tensor, nn

from ..erase_core.model.prompt import Encoded

Tokens = Mapping[str, Sequence[Sequence[Any]]]  # by stream, section by section
# How far rounding may set a prompt apart from itself, in shares of its way to another prompt.
_ROUNDING = 0.1
_MOST_STREAMS = 3  # that follow one another


@dataclass(frozen=True)
class Layout:
    """How a batch is to be taken apart.

    Attributes:
        streams: those whose rows follow one another, by the names that their tokens have.
        pooled: which of the vectors that were noted make up the pooled one, one behind the other;
            None where there is none, or nothing that was noted makes it up.
    """

    streams: tuple[str, ...]
    pooled: tuple[int, ...] | None

    def parts(self, rows: Tensor, noted: Sequence[Tensor], tokens: Sequence[Tokens]) -> list:
        """Each prompt of a batch, equally long ones.

        Args:
            rows: of the batch, (all tokens, width).
            noted: pooled vectors, each (sections or one more, size).
        """
        lengths = [_length(tokens[0], name) for name in self.streams]
        # By streams that follow one another first, then by prompts.
        blocks = rows.split([length * len(tokens) for length in lengths])
        each = zip(*(b.split(n) for b, n in zip(blocks, lengths, strict=True)), strict=True)
        vectors: Sequence[Tensor | None] = [None] * len(tokens)
        if self.pooled is not None:
            firsts = [noted[i][:: len(noted[i]) // len(tokens)] for i in self.pooled]
            vectors = list(torch.cat([one[: len(tokens)] for one in firsts], -1))
        return [Encoded(torch.cat(p), v) for p, v in zip(each, vectors, strict=True)]


class BatchEncoder:
    """Encodes prompts together where the text encoder's batches are understood.

    Args:
        clip: the host's.
        encode: tokens to (rows, pooled vector) of one prompt or batch, float32 on the CPU.
    """

    def __init__(self, clip: Any, encode: Callable[[Tokens], tuple[Tensor, Tensor | None]]) -> None:
        self._clip, self._encode = clip, encode
        self._layout: Layout | None = None
        self._tried = False

    def __call__(self, prompts: Sequence[str]) -> list[Encoded]:
        """Each prompt, with its pooled vector where the batch tells it."""
        tokens = [self._clip.tokenize(prompt) for prompt in prompts]
        found: dict[int, Encoded] = {}
        for group in _alike(tokens):
            found.update(zip(group, self._group([tokens[i] for i in group]), strict=True))
        return [found[number] for number in range(len(prompts))]

    def _group(self, tokens: Sequence[Tokens]) -> list[Encoded]:
        """Prompts that are equally long."""
        if len(tokens) > 1 and not (self._tried and self._layout is None):
            rows, first, noted = self._batch(tokens)
            if not self._tried:
                self._layout = self._found_layout(tokens, rows, first, noted)
                self._tried = True
            if self._layout is not None:
                return self._layout.parts(rows, noted, tokens)
        return [Encoded(*self._encode(one)) for one in tokens]

    def _batch(self, tokens: Sequence[Tokens]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        merged = {name: [section for one in tokens for section in one[name]] for name in tokens[0]}
        with noted_pooled(self._clip) as noted:
            rows, first = self._encode(merged)
        return rows, first, noted

    def _found_layout(
        self, tokens: Sequence[Tokens], rows: Tensor, first: Tensor | None, noted: list[Tensor]
    ) -> Layout | None:
        """The layout under which two prompts are what they are alone."""
        alone = [Encoded(*self._encode(one)) for one in (tokens[0], tokens[-1])]
        pooled = _made_up(first, noted, len(tokens))
        for streams in _orders(tokens, len(rows)):
            parts = Layout(streams, pooled).parts(rows, noted, tokens)
            if not _same([parts[0].tokens, parts[-1].tokens], [one.tokens for one in alone]):
                continue
            if pooled is not None and not _same(
                [parts[0].pooled, parts[-1].pooled], [one.pooled for one in alone]
            ):
                pooled = None
            return Layout(streams, pooled)
        return None


@contextmanager
def noted_pooled(clip: Any) -> Iterator[list[Tensor]]:
    """Pooled vectors of every section, encoder by encoder, (sections, size) float32 on the CPU."""
    noted: list[Tensor] = []

    def note(_module: Any, _given: Any, answer: Any) -> None:
        if isinstance(answer, tuple) and len(answer) > 1 and isinstance(answer[1], Tensor):
            noted.append(answer[1].float().cpu())

    model = getattr(clip, "cond_stage_model", None)
    modules = model.modules() if isinstance(model, nn.Module) else ()
    encoders = [module for module in modules if isinstance(module, SDClipModel)]
    with ExitStack() as hooks:
        for encoder in encoders:
            hooks.callback(encoder.register_forward_hook(note).remove)
        yield noted


def _alike(tokens: Sequence[Tokens]) -> list[list[int]]:
    """Places of the prompts in groups whose sections are equally long in every stream.

    In a batch shorter ones would be padded, and some encoders let that be seen.
    """
    groups: dict[tuple, list[int]] = {}
    for place, one in enumerate(tokens):
        lengths = tuple((name, tuple(map(len, sections))) for name, sections in one.items())
        groups.setdefault(lengths, []).append(place)
    return list(groups.values())


def _length(tokens: Tokens, stream: str) -> int:
    return sum(map(len, tokens[stream]))


def _orders(tokens: Sequence[Tokens], rows: int) -> Iterator[tuple[str, ...]]:
    """Streams whose tokens, one after the other, are as many as the rows."""
    for count in range(1, _MOST_STREAMS + 1):
        for streams in itertools.combinations(tokens[0], count):
            if sum(_length(tokens[0], name) for name in streams) * len(tokens) == rows:
                yield streams


def _made_up(first: Tensor | None, noted: Sequence[Tensor], prompts: int) -> tuple[int, ...] | None:
    """Which of the noted vectors are the host's pooled vector of the first section."""
    if first is None or any(len(one) < prompts for one in noted):
        return None
    for count in range(1, len(noted) + 1):
        for places in itertools.permutations(range(len(noted)), count):
            if torch.equal(torch.cat([noted[i][0] for i in places]), first):
                return places
    return None


def _same(found: Sequence[Tensor | None], alone: Sequence[Tensor | None]) -> bool:
    """Whether two prompts of a batch are those two alone, which must differ."""
    (a, b), (x, y) = found, alone
    if a is None or b is None or x is None or y is None:
        return False
    if not a.shape == b.shape == x.shape == y.shape:
        return False
    most = _ROUNDING * float((x - y).norm())
    return float((a - x).norm()) < most and float((b - y).norm()) < most
