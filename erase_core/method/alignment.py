"""Which token of a prompt plays which role in another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import groupby

from torch import Tensor

# Ids from here on stand for vectors that have no number of their own in a tokenizer, as those of a
# textual inversion: one id for each vector, the same wherever it occurs.
VECTOR_IDS = 1 << 40
# Where the rows of several text encoders follow one another, the ids of the n-th are raised by n
# times this, more than any token or vector has: so they share none.
STREAM_IDS = 1 << 60
# Bytes of a hash that tell one vector from another, few enough to stay below STREAM_IDS.
_HASH_BYTES = 7


def vector_id(vector: Tensor) -> int:
    """The id of a vector (width,) that stands in a token's place."""
    digest = hashlib.sha256(vector.detach().float().cpu().contiguous().numpy().tobytes()).digest()
    return VECTOR_IDS + int.from_bytes(digest[:_HASH_BYTES], "little")


def align_tokens(
    erased: Sequence[int], alternative: Sequence[int], null: Sequence[int]
) -> list[int]:
    """For each token of a prompt, the token that plays its role in the alternative prompt.

    Equal words stand for each other; the last token of a replaced part for the last of its
    replacement, and so on backwards; a part that is left out becomes the end of the prompt; end
    and padding tokens stand for their own kind at the same distance from the last word. Each text
    encoder's tokens have their counterparts among its own.

    Args:
        erased, alternative: token ids with start, end and padding tokens; of several encoders with
            :data:`STREAM_IDS`.
        null: token ids of the null prompt, see :func:`word_span`.

    Returns:
        Positions in ``alternative``, one for each token of ``erased``.
    """
    roles, begin = [], 0
    for own, other, rest in zip(*map(_streams, (erased, alternative, null)), strict=True):
        roles += [begin + role for role in _align(own, other, rest)]
        begin += len(other)
    return roles


def _streams(ids: Sequence[int]) -> list[list[int]]:
    return [list(part) for _, part in groupby(ids, lambda token: token // STREAM_IDS)] or [[]]


def _align(erased: Sequence[int], alternative: Sequence[int], null: Sequence[int]) -> list[int]:
    # One of them may be the null prompt itself, which doesn't show where its words would begin.
    begin = min(_begin(ids, null) for ids in (erased, alternative))
    end, other_end = (_end(ids, null, begin) for ids in (erased, alternative))
    roles, last = [0] * len(erased), len(alternative) - 1
    matcher = SequenceMatcher(None, erased[:end], alternative[:other_end], autojunk=False)
    for kind, start, stop, other_start, other_stop in matcher.get_opcodes():
        for position in range(start, stop):
            if kind == "equal":
                roles[position] = other_start + position - start
            elif kind == "replace":
                roles[position] = max(other_start, other_stop - (stop - position))
            else:
                roles[position] = min(other_end, last)
    for position in range(end, len(erased)):
        roles[position] = min(other_end + position - end, last)
    return roles


def content_length(ids: Sequence[int], null: Sequence[int]) -> int:
    """Tokens before the end of a prompt; of several encoders, before the end of the last's.

    Args:
        ids: of the prompt.
        null: of the null prompt, see :func:`word_span`.
    """
    *before, last = _streams(ids)
    return sum(map(len, before)) + word_span(last, _streams(null)[-1])[1]


def word_span(ids: Sequence[int], null: Sequence[int]) -> tuple[int, int]:
    """Where the words of a prompt begin and end among its tokens; of several encoders, the first's.

    Args:
        ids: of the prompt.
        null: of the null prompt, which shows what stands around the words: some tokenizers put a
            token in front, some one behind, some pad with the end token and some don't, and a
            prompt that fills its window isn't padded at all.
    """
    own, null = _streams(ids)[0], _streams(null)[0]
    begin = _begin(own, null)
    return begin, _end(own, null, begin)


def _begin(ids: Sequence[int], null: Sequence[int]) -> int:
    """How many tokens stand before the words; all of a null prompt's."""
    shared = min(len(ids), len(null))
    return next((place for place in range(shared) if ids[place] != null[place]), shared)


def _end(ids: Sequence[int], null: Sequence[int], begin: int) -> int:
    """Where what the null prompt has behind its words begins: its end token, then padding.

    Of the padding there is as much as there is room for.
    """
    closing = list(null[begin:])
    for place in range(begin, len(ids)):
        if closing and ids[place] == closing[0]:
            rest = list(ids[place:])
            if rest == closing[: len(rest)]:
                return place
    return len(ids)


# Rows of two prompts that are apart by more than this share of their size are of other tokens.
_OTHER_ROW = 0.05


def kept_in_front(null: tuple[Sequence[int], Tensor], prompt: tuple[Sequence[int], Tensor]) -> int:
    """How many tokens in front have no row, found from two prompts, each its ids and its rows.

    Encoders that are language models wrap a prompt in a chat's template and keep its head to
    themselves. They read forward, so rows are the same up to the first token that differs. Where
    there is a row for each token, none is kept.
    """
    (ids, rows), (other_ids, other_rows) = null, prompt
    spare = min(len(ids) - len(rows), len(other_ids) - len(other_rows))
    if spare <= 0:
        return 0
    shared = min(len(rows), len(other_rows))
    apart = (rows[:shared] - other_rows[:shared]).norm(dim=1)
    differs = (apart > _OTHER_ROW * rows[:shared].norm(dim=1)).nonzero().flatten().tolist()
    first = differs[0] if differs else shared
    return max(0, min(spare, _begin(other_ids, ids) - first))


def first_at(places: Sequence[int], place: int) -> int:
    """The first row that stands for the token at a place, or for the nearest one to it."""
    return min(range(len(places)), key=lambda row: (abs(places[row] - place), row))


def rows_at(own: Sequence[int], other: Sequence[int], roles: Sequence[int]) -> list[int]:
    """For each row of a prompt, the row of another one that plays its part.

    Args:
        own, other: for each row of the prompts the token that it stands for.
        roles: for each token of the one the token of the other.
    """
    rows: dict[int, list[int]] = {}
    for row, place in enumerate(other):
        rows.setdefault(place, []).append(row)
    found, seen = [], dict.fromkeys(own, 0)
    for place in own:
        role = roles[min(place, len(roles) - 1)]
        there = rows.get(role) or [first_at(other, role)]
        found.append(there[min(seen[place], len(there) - 1)])
        seen[place] += 1
    return found
