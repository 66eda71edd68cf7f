"""The words that a text encoder has tokens of their own for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..erase_core.method.words import numbered_words

# What tokenizers raise that can't list their tokens.
_NO_LIST = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def vocabulary(clip, streams: Sequence[str] = ()) -> list[str]:
    """The words that are one token each, in lower case and in order of token id.

    In most tokenizers that is roughly from frequent to rare. Frequent beginnings and endings of
    words ("inter", "tion") can't be told from words and are among them.

    Args:
        clip: the host's CLIP.
        streams: the host's names of tokenizers, the one to prefer last. The others follow in the
            CLIP's own order, until one has words.

    Returns:
        No words at all where no tokenizer lists its tokens.
    """
    return list(numbered_vocabulary(clip, streams)[1])


def numbered_vocabulary(clip, streams: Sequence[str] = ()) -> tuple[str, dict[str, int]]:
    """The same with the id of each, and the host's name of the tokenizer; "" if it has none."""
    for name, tokenizer in _tokenizers(clip, streams):
        words = numbered_words(_tokens(tokenizer))
        if words:
            return name, words
    return "", {}


def _tokenizers(clip, streams: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What may be a tokenizer, by name, from the preferred one on."""
    wrapper = getattr(clip, "tokenizer", None)
    parts = dict(getattr(wrapper, "__dict__", {}))
    for stream in reversed(streams):
        # The host calls its stream "l" and the attribute that holds the tokenizer "clip_l".
        named = [name for name in (stream, f"clip_{stream}") if name in parts]
        yield from ((name, parts.pop(name)) for name in named)
    yield "", wrapper  # some are no wrapper, but the tokenizer itself
    yield from parts.items()


def _tokens(tokenizer: Any) -> Mapping[int, Any]:
    """Tokens by id; nothing if it isn't a tokenizer, or is one that has no list."""
    by_id = getattr(tokenizer, "inv_vocab", None)
    if isinstance(by_id, Mapping) and by_id:
        return by_id
    holders: tuple[Any, ...] = (tokenizer, getattr(tokenizer, "tokenizer", None))
    for holder in holders:
        try:
            by_id = {number: token for token, number in holder.get_vocab().items()}
        except _NO_LIST:
            continue
        if by_id:
            return by_id
    return {}
