"""What a text encoder reads of a prompt: an id for each row that it gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..erase_core.method.alignment import STREAM_IDS, vector_id


def row_ids(clip, prompt: str, streams: Sequence[Sequence[str]] = ()) -> list[int]:
    """Token ids in the order of the rows; streams that follow one another share none.

    A vector of a textual inversion is a token of its own.

    Args:
        clip: the host's CLIP.
        streams: for each stretch of rows the host's names of the tokenizers whose tokens lie side
            by side in it, the first that has an encoder stands for all; without any, all rows are
            the first tokenizer's.
    """
    tokens = clip.tokenize(prompt)
    names = [_first_there(clip, side_by_side, tokens) for side_by_side in streams]
    names = [name for name in names if name] or [next(iter(tokens))]
    return [
        token + number * STREAM_IDS
        for number, name in enumerate(names)
        for section in tokens[name]
        for token in _section_ids(section, _part(getattr(clip, "tokenizer", None), name))
    ]


def _first_there(clip, names: Sequence[str], tokens: Mapping[str, Any]) -> str:
    """The first name that has tokens and whose encoder wasn't left away; "" if there is none."""
    model = getattr(clip, "cond_stage_model", None)
    there = (name for name in names if name in tokens and _part(model, name, True) is not None)
    return next(there, "")


def _part(holder: Any, name: str, default: Any = None) -> Any:
    """What belongs to a stream. The host calls one "l" and the attribute that holds it "clip_l"."""
    return getattr(holder, name, getattr(holder, f"clip_{name}", default))


def _section_ids(section: Sequence[Sequence[Any]], tokenizer: Any) -> Iterator[int]:
    """Ids of one window of tokens, each of them first in its entry.

    What isn't a number is vectors. The host leaves out those of another width than the encoder's
    and pads the window by as many.
    """
    width, left_out = getattr(tokenizer, "embedding_size", None), 0
    for token, *_ in section:
        if isinstance(token, Integral):
            yield int(token)
            continue
        vectors = _vectors(token)
        if width in (None, vectors.shape[-1]):
            yield from map(vector_id, vectors)
        else:
            left_out += len(vectors)
    yield from [getattr(tokenizer, "pad_token", 0)] * left_out


def _vectors(token: Any) -> Tensor:
    """The vectors that stand in a token's place, (n, width)."""
    data = token.get("data") if isinstance(token, Mapping) else token
    rows = torch.as_tensor(data).detach().float().cpu()
    return rows.reshape(-1, rows.shape[-1])
