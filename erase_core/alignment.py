"""Which token of a prompt plays which role in another."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import groupby

# Where the rows of several text encoders follow one another, the ids of the n-th are raised by n
# times this, more than any tokenizer has: so they share none.
STREAM_IDS = 1_000_000_000


def align_tokens(erased: Sequence[int], alternative: Sequence[int]) -> list[int]:
    """For each token of a prompt, the token that plays its role in the alternative prompt.

    Equal words stand for each other; the last token of a replaced part for the last of its
    replacement, and so on backwards; a part that is left out becomes the end of the prompt; end
    and padding tokens stand for their own kind at the same distance from the last word. Each text
    encoder's tokens have their counterparts among its own.

    Args:
        erased, alternative: token ids with start, end and padding tokens; of several encoders with
            :data:`STREAM_IDS`.

    Returns:
        Positions in ``alternative``, one for each token of ``erased``.
    """
    roles, begin = [], 0
    for own, other in zip(_streams(erased), _streams(alternative), strict=True):
        roles += [begin + role for role in _align(own, other)]
        begin += len(other)
    return roles


def _streams(ids: Sequence[int]) -> list[list[int]]:
    return [list(part) for _, part in groupby(ids, lambda token: token // STREAM_IDS)]


def _align(erased: Sequence[int], alternative: Sequence[int]) -> list[int]:
    end, other_end = content_length(erased), content_length(alternative)
    roles = [0] * len(erased)
    matcher = SequenceMatcher(None, erased[:end], alternative[:other_end], autojunk=False)
    for kind, start, stop, other_start, other_stop in matcher.get_opcodes():
        for position in range(start, stop):
            if kind == "equal":
                roles[position] = other_start + position - start
            elif kind == "replace":
                roles[position] = max(other_start, other_stop - (stop - position))
            else:
                roles[position] = other_end
    for position in range(end, len(erased)):
        roles[position] = min(other_end + position - end, len(alternative) - 1)
    return roles


def content_length(ids: Sequence[int]) -> int:
    """Tokens before the run of equal ids (end and padding) that closes a prompt."""
    length = len(ids)
    while length > 1 and ids[length - 2] == ids[-1]:
        length -= 1
    return length - 1


def word_span(ids: Sequence[int], null_ids: Sequence[int]) -> tuple[int, int]:
    """Where the words of a prompt begin and end among its tokens; of several encoders, the first's.

    Args:
        ids: of the prompt.
        null_ids: of the null prompt, which shows what stands around the words: some tokenizers put
            a token in front, some one behind, some pad with the end token and some don't.
    """
    own, null = _streams(ids)[0], _streams(null_ids)[0]
    count = max(0, content_length(own) - content_length(null))
    begin = next((i for i, (a, b) in enumerate(zip(own, null, strict=False)) if a != b), len(null))
    return min(begin, len(own)), min(begin + count, len(own))
