"""Text encoders' stand-ins: what each of the host's gives a network, without their weights.

The host's own can't be made small: their vocabularies alone are hundreds of megabytes. A stand-in
has their shapes: chat templates and the rows of them that are dropped, padding and what stands in
it, masks, several layers side by side, pooled vectors, further streams. Its tokens are whole words,
and its embeddings are made from the tokens' ids and mixed, in one direction as language models do,
or in both as T5 does. All of it is the same in every process.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from concept_surgery import erase_core
from torch import Tensor

_WORD = re.compile(r"<\|?[\w]+\|?>|\w+|[^\w\s]")
_DATA = Path(erase_core.__file__).parent / "data"
_FIRST_ID, PAD = 1000, 0
T5_IDS = 31_000  # of T5's table of 32,128, which some networks look its tokens up in themselves
_MIXINGS = 3  # times that what is beside a token comes into its row
Sections = Sequence[Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Stream:
    """One tokenizer and its encoder, as the host wires them up.

    Attributes:
        name: the host's.
        width: numbers of a row, of one layer.
        layers: how many of the encoder's layers stand side by side in a row.
        before, after: tokens around the words, such as a chat template's.
        drop_before, drop_after: whether the rows of those are left away.
        least: tokens that a prompt is padded to.
        padded_inside: the padding comes before what is after the words.
        pad: token that it is padded with; "" is the encoder's own for that.
        mask: whether a mask of the padding is handed on.
        only_masks: hand it on only where it masks anything.
        zeroed: whether rows of padding are zero.
        causal: rows know of those before them alone.
        window: tokens that a longer prompt is cut into sections of.
        loud_first: how much longer the first row is than others. Inside language models the first
            token's rows are, by far.
        pooled: size of the vector that is made of the whole prompt; 0 is none.
        empty: what stands for an empty prompt.
        nothing_for_empty: an empty prompt has no rows at all.
        ids: how many ids the tokenizer has.
    """

    name: str
    width: int = 336
    layers: int = 1
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    drop_before: bool = False
    drop_after: bool = False
    least: int = 1
    padded_inside: bool = False
    pad: str = ""
    mask: bool = False
    only_masks: bool = False
    zeroed: bool = False
    causal: bool = True
    window: int = 0
    loud_first: float = 1.0
    pooled: int = 0
    empty: str = ""
    nothing_for_empty: bool = False
    ids: int = 120_000

    def tokenize(self, text: str) -> list[list[tuple[int, float]]]:
        """Sections of token ids with their weights, as the host's tokenizers give them."""
        words = _WORD.findall(text or self.empty)
        if not words and self.nothing_for_empty:
            return [[]]
        inner = self.window - len(self.before) - len(self.after)
        cut = [words[i : i + inner] for i in range(0, len(words), inner)] if self.window else []
        return [[(token, 1.0) for token in self._section(part)] for part in cut or [words]]

    def _section(self, words: Sequence[str]) -> list[int]:
        before, middle, after = (
            [self.id_of(word) for word in part] for part in (self.before, words, self.after)
        )
        padding = self.id_of(self.pad) if self.pad else PAD
        if self.padded_inside:
            middle += [padding] * (self.least - len(middle))
        ids = before + middle + after
        return ids + [padding] * (max(self.least, self.window) - len(ids))

    def id_of(self, word: str) -> int:
        """A token's id: the same in every process."""
        return _FIRST_ID + zlib.crc32(word.encode()) % self.ids

    @functools.cached_property
    def inv_vocab(self) -> dict[int, str]:
        """Words by id, spelled as the tokenizer's kind spells them."""
        mark = "{}</w>" if self.window else "Ġ{}" if self.causal else "▁{}"
        return {self.id_of(word): mark.format(word) for word in _words()}

    def encode(self, sections: Sections) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Rows (1, all tokens, width), pooled (1, size), and what else there is.

        Sections are one batch, padded to the longest, and their rows follow one another.
        """
        longest = max(map(len, sections))
        ids = [[token for token, _ in section] for section in sections]
        ids = [own + [PAD] * (longest - len(own)) for own in ids]
        found = [self._encode(own) for own in ids]
        rows = torch.cat([rows for rows, _ in found])[None]
        mask = torch.cat([mask for _, mask in found])[None]
        vector = self._pooled(found[0][0], ids[0]) if self.pooled else None
        begin = len(self.before) if self.drop_before and longest else 0
        end = rows.shape[1] - (len(self.after) if self.drop_after else 0)
        rows, mask = rows[:, begin:end], mask[:, begin:end]
        masks = self.mask and not (self.only_masks and bool(mask.all()))
        return rows, vector, {"attention_mask": mask} if masks else {}

    def _encode(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Rows (tokens, width of all layers) and mask (tokens) of one section."""
        mask = torch.tensor([token != PAD for token in ids], dtype=torch.long)
        if not ids:
            return torch.zeros(0, self.width * self.layers), mask
        state = torch.stack([_vector(token, self.width) for token in ids])
        place = torch.arange(len(ids))[:, None] / 8 + torch.arange(self.width)[None]
        state = state + 0.1 * place.sin()
        kept = []
        for number in range(max(self.layers, _MIXINGS)):
            state = state + (self._beside(state, mask) @ _matrix(number, self.width)).tanh()
            kept.append(state.clone())
        rows = torch.cat(kept[-self.layers :], dim=-1)
        rows[0] *= self.loud_first
        return (rows * mask[:, None] if self.zeroed else rows), mask

    def _beside(self, state: Tensor, mask: Tensor) -> Tensor:
        """The mean of what a row sees of the others, (tokens, width)."""
        if self.causal:
            return state.cumsum(0) / torch.arange(1, len(state) + 1)[:, None]
        seen = mask if self.mask or self.zeroed else torch.ones_like(mask)
        return ((state * seen[:, None]).sum(0) / seen.sum().clamp(min=1)).expand_as(state)

    def _pooled(self, rows: Tensor, ids: list[int]) -> Tensor:
        end = self.id_of(self.after[0])
        row = rows[ids.index(end), -self.width :]
        return (row @ _matrix(99, max(self.width, self.pooled))[: self.width, : self.pooled])[None]


@functools.cache
def _words() -> list[str]:
    text = " ".join((_DATA / name).read_text("utf-8") for name in ("things.txt", "tags.txt"))
    return sorted(set(re.findall(r"[a-z]{3,}", text)))


@functools.lru_cache(maxsize=100_000)
def _vector(token: int, width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(token))


@functools.cache
def _matrix(number: int, width: int) -> Tensor:
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(10**7 + number))
    return noise / width**0.5


Parts = Mapping[str, tuple[Tensor, Tensor | None, dict[str, Any]]]
Given = tuple[Tensor, Tensor | None, dict[str, Any]]


@dataclass(frozen=True)
class Text:
    """What a family's text encoder gives: its streams, and how the host puts them together.

    Attributes:
        streams: in the order of the host's dictionary of tokens.
        together: of the encoded streams and the tokens, what the host gives; None is the only
            stream's own.
    """

    streams: tuple[Stream, ...]
    together: Callable[[Parts, Mapping[str, Sections]], Given] | None = None
    optional: Mapping[str, re.Pattern[str]] = field(default_factory=dict)


class StandInClip:
    """In the place of the host's CLIP, for whoever tokenizes and encodes with it."""

    def __init__(self, text: Text) -> None:
        self._text = text
        parts = {_attribute(stream.name): stream for stream in text.streams}
        self.tokenizer = SimpleNamespace(
            **{
                name: SimpleNamespace(
                    inv_vocab=stream.inv_vocab, pad_token=PAD, embedding_size=stream.width
                )
                for name, stream in parts.items()
            }
        )
        self.cond_stage_model = SimpleNamespace(**dict.fromkeys(parts, self))

    def tokenize(self, text: str, **_options: Any) -> dict[str, list[list[tuple[int, float]]]]:
        """Sections by stream; a stream that is for some prompts alone is left out for others."""
        found = {}
        for stream in self._text.streams:
            pattern = self._text.optional.get(stream.name)
            own = text if pattern is None else " ".join(pattern.findall(text))
            if pattern is None or own:
                found[stream.name] = stream.tokenize(own)
        return found

    def encode_from_tokens(
        self, tokens: Mapping[str, Sections], return_pooled: Any = False, return_dict: bool = False
    ) -> Any:
        """As the host's CLIP does."""
        parts = {s.name: s.encode(tokens[s.name]) for s in self._text.streams if s.name in tokens}
        together = self._text.together
        rows, pooled, more = together(parts, tokens) if together else next(iter(parts.values()))
        if return_dict:
            return {"cond": rows, "pooled_output": pooled, **more}
        return (rows, pooled) if return_pooled else rows

    def encode_from_tokens_scheduled(self, tokens: Mapping[str, Sections]) -> Any:
        """As the host's CLIP does: a CONDITIONING."""
        given = self.encode_from_tokens(tokens, return_dict=True)
        return [[given.pop("cond"), given]]

    def conditioning(self, text: str) -> Any:
        """A prompt as a CONDITIONING."""
        return self.encode_from_tokens_scheduled(self.tokenize(text))


def _attribute(stream: str) -> str:
    return f"clip_{stream}" if stream in ("l", "g") else stream


def tokens_and_pooled(tokens: str, pooled: str) -> Callable[..., Given]:
    """Rows of one stream and the pooled vector of another."""

    def together(parts: Parts, _tokens: Mapping[str, Sections]) -> Given:
        return parts[tokens][0], parts[pooled][1], parts[tokens][2]

    return together


def side_by_side(parts: Parts, _tokens: Mapping[str, Sections]) -> Given:
    """SDXL: a row of each encoder in every row, and the second one's pooled vector."""
    length = min(parts["l"][0].shape[1], parts["g"][0].shape[1])
    rows = torch.cat([parts[name][0][:, :length] for name in ("l", "g")], dim=-1)
    return rows, parts["g"][1], {}


def one_after_the_other(parts: Parts, tokens: Mapping[str, Sections]) -> Given:
    """SD3: those of SDXL, filled up with zeros, and T5's after them."""
    both, _, _ = side_by_side(parts, tokens)
    t5 = parts["t5xxl"][0]
    rows = torch.nn.functional.pad(both, (0, t5.shape[-1] - both.shape[-1]))
    return torch.cat([rows, t5], dim=-2), _both_pooled(parts), {}


def with_llama(parts: Parts, _tokens: Mapping[str, Sections]) -> Given:
    """HiDream: T5's rows, and beside them all layers of a language model, one by one."""
    rows, _, _ = parts["llama"]
    layers = rows.view(1, rows.shape[1], -1, parts["t5xxl"][0].shape[-1]).movedim(2, 1)
    return parts["t5xxl"][0], _both_pooled(parts), {"conditioning_llama3": layers}


def with_t5_ids(parts: Parts, tokens: Mapping[str, Sections]) -> Given:
    """Anima: a language model's rows, and T5's ids and weights beside them."""
    rows, pooled, more = parts["qwen3_06b"]
    ids, weights = zip(*tokens["t5xxl"][0], strict=True)
    given = {
        "t5xxl_ids": torch.tensor(ids, dtype=torch.int),
        "t5xxl_weights": torch.tensor(weights),
    }
    return rows, pooled, {**more, **given}


def with_byt5(parts: Parts, _tokens: Mapping[str, Sections]) -> Given:
    """Hunyuan Image: what stands between quotes goes through an encoder of letters besides."""
    rows, pooled, more = parts["qwen25_7b"]
    return (
        rows,
        pooled,
        more | ({"conditioning_byt5small": parts["byt5"][0]} if "byt5" in parts else {}),
    )


def _both_pooled(parts: Parts) -> Tensor:
    vectors = [parts[name][1] for name in ("l", "g")]
    return torch.cat([vector for vector in vectors if vector is not None], dim=-1)
