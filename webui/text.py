"""Prompts through the host's text encoder, as the engine takes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..erase_core.method.alignment import vector_id
from ..erase_core.method.words import numbered_words
from ..erase_core.model.prompt import Encoded
from .errors import UnsupportedModelError

BATCH = 32  # prompts at a time; their embeddings take 7 MB on SD1, 20 on SDXL
# Emphasis is rescaled over all that is encoded at a time, so such a prompt is encoded alone.
_EMPHASIS = re.compile(r"(?<!\\)[(\[]")
_KNOWN = frozenset(("crossattn", "vector", "guidance"))


@dataclass(frozen=True)
class Learned:
    """What the host makes of a batch of prompts, float32 on the CPU.

    Attributes:
        tokens: for each prompt (length, width), padded to the longest of the batch.
        vectors: for each prompt what it gives beside the tokens, (n, size); None where nothing.
        guidance: a number that distilled models are given beside a prompt, (n,); None elsewhere.
    """

    tokens: Sequence[Tensor] | Tensor
    vectors: Tensor | None = None
    guidance: Tensor | None = None


class TextReader:
    """The host's text encoder.

    Args:
        sd_model: the host's model.
        learn: gives what the host makes of some prompts, see :func:`learned`.
        beside: how many numbers in the vector beside the tokens aren't the prompt's.
        check: called before each batch; raises the interrupt.
    """

    def __init__(
        self,
        sd_model: Any,
        learn: Callable[[Sequence[str]], Any],
        pooled: bool,
        beside: int,
        check: Callable[[], None],
    ) -> None:
        self._model, self._learn, self._check = sd_model, learn, check
        self._pooled, self._beside = pooled, beside
        self.engine = text_engine(sd_model)

    def encode(self, prompts: Sequence[str], together: bool) -> list[Encoded]:
        """The embeddings of each prompt, each in its own length."""
        found: list[Encoded] = []
        for batch in self._batches(prompts, together):
            self._check()
            got = learned(self._learn(batch))
            chunks = [self._chunks(prompt) for prompt in batch]
            for number, tokens in enumerate(got.tokens):
                own = len(tokens) * chunks[number] // max(chunks)
                pooled = None if together else self._vector(got, number)
                found.append(Encoded(tokens[:own].clone(), pooled))
        return found

    def constants(self) -> Learned:
        """What the host gives beside the null prompt that isn't the prompt's."""
        got = learned(self._learn([""]))
        rest = None
        if got.vectors is not None and self._beside:
            rest = got.vectors[0, got.vectors.shape[1] - self._beside :]
        return Learned((), rest, None if got.guidance is None else got.guidance[:1])

    def token_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, one for each row of its embedding."""
        if not hasattr(self.engine, "process_texts"):
            return self._padded_ids(prompt)
        (chunks,), _ = self.engine.process_texts([prompt])
        return [number for chunk in chunks for number in self._chunk_ids(chunk)]

    def vocabulary(self) -> list[str]:
        """The words that the text encoder has tokens for; none where it doesn't list them."""
        return list(self.numbered_vocabulary())

    def numbered_vocabulary(self) -> dict[str, int]:
        """The same words, with the number of each."""
        return numbered_words({number: token for token, number in self._list_of_tokens().items()})

    def _vector(self, got: Learned, number: int) -> Tensor | None:
        if not self._pooled:
            return None
        if got.vectors is None:
            raise UnsupportedModelError(
                "This model's text encoder gives no pooled vector, which the model needs. Load a "
                "whole checkpoint, or the text encoders that belong to it."
            )
        return got.vectors[number, : got.vectors.shape[1] - self._beside].clone()

    def _batches(self, prompts: Sequence[str], together: bool) -> list[list[str]]:
        """Prompts that are encoded at a time, in their order."""
        batches: list[list[str]] = []
        joined = together and hasattr(self.engine, "process_texts")
        for prompt in prompts:
            alone = not joined or _EMPHASIS.search(prompt) is not None
            if alone or not batches or len(batches[-1]) == BATCH or batches[-1] == []:
                batches.append([prompt])
            else:
                batches[-1].append(prompt)
            if alone:
                batches.append([])  # what follows begins another
        return [batch for batch in batches if batch]

    def _chunks(self, prompt: str) -> int:
        """Windows that a prompt fills; the host pads a batch to the longest."""
        if not hasattr(self.engine, "process_texts"):
            return 1
        (chunks,), _ = self.engine.process_texts([prompt])
        return len(chunks)

    def _chunk_ids(self, chunk: Any) -> list[int]:
        ids = [int(token) for token in chunk.tokens]
        end, pad = (getattr(self.engine, name, -1) for name in ("id_end", "id_pad"))
        if end != pad and end in ids:
            first = ids.index(end) + 1
            ids[first:] = [pad] * (len(ids) - first)
        for offset, embedding in chunk.fixes:  # textual inversions: a vector is a token of its own
            vectors = embedding.vec
            if isinstance(vectors, Mapping):
                vectors = next(iter(vectors.values()))
            for place, vector in enumerate(vectors, start=offset + 1):
                if place < len(ids):
                    ids[place] = vector_id(vector)
        return ids

    def _padded_ids(self, prompt: str) -> list[int]:
        """For encoders without windows: the tokenizer's ids, filled up to the rows there are."""
        rows = len(learned(self._learn([prompt])).tokens[0])
        ids = [int(number) for number in self.engine.tokenize([prompt])[0]]
        return (ids + [0] * rows)[:rows]

    def _list_of_tokens(self) -> Mapping[str, int]:
        tokenizer = getattr(self.engine, "tokenizer", None)
        wrapped = getattr(self.engine, "wrapped", None)
        holders: tuple[Any, ...] = (tokenizer, getattr(wrapped, "tokenizer", None))
        for one in (*holders, _open_clip(self.engine)):
            if hasattr(one, "get_vocab"):
                return one.get_vocab()
            if isinstance(getattr(one, "encoder", None), Mapping):
                return one.encoder
        return {}


def learned(given: Any) -> Learned:
    """What the host's ``get_learned_conditioning`` gave, in one form for all families.

    Raises:
        UnsupportedModelError: something that no adapter knows.
    """
    if isinstance(given, Tensor):
        return Learned(_plain(given))
    if isinstance(given, list | tuple):
        return Learned([_plain(one if one.ndim == 2 else one[0]) for one in given])
    unknown = set(given) - _KNOWN
    if unknown or "crossattn" not in given:
        raise UnsupportedModelError(
            f"This architecture takes {', '.join(sorted(map(str, unknown))) or 'no tokens'} beside "
            "a prompt, which isn't known here. Load an SD1, SD2, SDXL or Flux model."
        )
    vectors, guidance = given.get("vector"), given.get("guidance")
    return Learned(
        _plain(given["crossattn"]),
        None if vectors is None else _plain(vectors),
        None if guidance is None else _plain(guidance),
    )


def text_engine(sd_model: Any) -> Any:
    """What cuts prompts into tokens: the encoder whose tokens stand for all of a family's."""
    for name in ("text_processing_engine_t5", "text_processing_engine", "text_processing_engine_l"):
        if getattr(sd_model, name, None) is not None:
            return getattr(sd_model, name)
    conditioner = getattr(sd_model, "conditioner", None)
    for embedder in getattr(conditioner, "embedders", ()):
        if hasattr(embedder, "process_texts"):
            return embedder
    own = getattr(sd_model, "cond_stage_model", None)
    if own is not None:
        return own
    others = [value for name, value in vars(sd_model).items() if name.startswith("text_process")]
    if not others:
        raise UnsupportedModelError(
            f"The text encoder of this model ({type(sd_model).__name__}) isn't known here. Load an "
            "SD1, SD2, SDXL or Flux model."
        )
    return others[0]


def _open_clip(engine: Any) -> Any:
    """The tokenizer behind SD2's encoder in Automatic1111, which keeps it in a module."""
    if type(engine).__name__.startswith("FrozenOpenCLIPEmbedder"):
        from modules.sd_hijack_open_clip import tokenizer

        return tokenizer
    return None


def _plain(tensor: Tensor) -> Tensor:
    """Float32 on the CPU, and no inference tensor."""
    return tensor.detach().float().cpu().clone()
