"""Other names of a concept, and its neighbours, as its text encoder knows them.

Words are compared as the network gets to see them: in a phrase, by the embeddings of the word's
last token and of the prompt's end, from which what all words share is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.digest import Digest
from ..model.prompt import Encoded, ReadsText
from ..settings.prompts import said, with_article
from ..settings.texts import Concept, folded
from ..version import VERSION
from .alignment import word_span
from .collateral import likeness
from .language import ENCODE_BATCH, Reported, in_silence
from .reading import common_tags, frequent_first, known_words, things

MOST_NAMES, MOST_NEIGHBOURS = 6, 6
# Words that are read where nobody says which are likely, and where somebody does: of all words,
# and of the names of things. A prompt costs CLIP-L a quarter of a second on one core.
MOST_READ, LIKELY, LIKELY_THINGS = 1500, 60, 30
# Words of one text encoder whose rows are kept (6 KB each with CLIP-L), and numbers of a row that
# say which word it is.
MOST_KEPT, NAMED_BY = 2000, 4
_PROBE = "a photo of a cat and two people, simple, detailed"
# Below either a word has no more to do with the concept than others have: the likeness itself,
# and its share in that of the nearest word.
LEAST_LIKENESS, LEAST_SHARE = 0.3, 0.85
# How much nearer than the nearest other thing a name is: on the emoji model, those that are names
# are by .25 and more, and what merely happens to come first by .05.
LEAD = 0.1
_PHRASES = {"style": "a picture in the style of {}", "tags": "{}"}
_PHRASE = "a photo of {a}"


Rank = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class Suggestion:
    """Words for a person to look through, the nearest first.

    Attributes:
        concept: what they are for.
        names: words that are clearly nearer to it than any other thing is, maybe names of it.
        neighbours: other things near to it, which may be worth keeping.
    """

    concept: Concept
    names: tuple[str, ...]
    neighbours: tuple[str, ...]

    @property
    def line(self) -> str:
        """The concept with all its names on one line, as it is typed under "erase"."""
        concept = self.concept
        also = (*concept.also, *self.names)
        return str(Concept(concept.text, concept.alternative, concept.kind, also))


def suggest(
    reader: ReadsText,
    concept: Concept,
    kind: str,
    rank: Rank | None = None,
    progress: Reported = in_silence,
    cache: MutableMapping[str, Tensor] | None = None,
) -> Suggestion:
    """Find names of a concept, and its neighbours, among words of the text encoder's own.

    Args:
        reader: the text encoder.
        kind: of the concept.
        rank: puts words that are likely to be near first, quickly. Without it the frequent words
            of the vocabulary are read.
        progress: told how many words are read, and how many there are.
        cache: what was read by text encoder and phrase, for example on disk.
    """
    others, listed = _things(reader, kind), list(reader.vocabulary())
    if rank is None:
        listed = frequent_first(listed, MOST_READ)
    else:
        others = list(rank(others)[:LIKELY_THINGS])
        listed = list(rank(listed)[:LIKELY])
    words = _candidates(reader, concept, [*others, *listed])
    if not words:
        return Suggestion(concept, (), ())
    phrase = _PHRASES.get(kind, _PHRASE)
    rows = _rows(reader, [*concept.names, *words], phrase, progress, cache)
    count = len(concept.names)
    near = likeness(rows[count:], list(rows[:count])).tolist()
    found = sorted(zip(near, words, strict=True), reverse=True)
    distinct = [word for _, word in found if word in set(others) and not _akin(word, concept)]
    nearest = next((like for like, word in found if word in distinct[:1]), 0.0)
    least = max(LEAST_LIKENESS, LEAST_SHARE * found[0][0])
    names = [
        word
        for like, word in found
        if like >= least
        and (like > nearest + LEAD or _akin(word, concept))
        and word not in distinct
    ]
    out = {folded(concept.alternative)}
    neighbours = [word for word in distinct if folded(word) not in out]
    return Suggestion(concept, tuple(names[:MOST_NAMES]), tuple(neighbours[:MOST_NEIGHBOURS]))


def by_table(table: Tensor, ids: Mapping[str, int], concept: Concept) -> Rank | None:
    """How near words are likely to be to a concept, by an encoder's table of token embeddings.

    Words that have no token of their own come last.

    Args:
        table: (tokens, width).
        ids: the token of each word.

    Returns:
        None where the table isn't that of these tokens, or has no word of the concept.
    """
    known = [ids[word] for text in concept.names for word in text.lower().split() if word in ids]
    if not known or max(ids.values()) >= len(table):
        return None
    rows = table[list(ids.values())].detach().float().cpu()
    middle = rows.mean(0)
    wanted = table[known].detach().float().cpu() - middle
    near = torch.cosine_similarity(rows[:, None] - middle, wanted[None], dim=-1).amax(1).tolist()
    place = dict(zip(ids, near, strict=True))
    return lambda words: sorted(words, key=lambda word: -place.get(word, -2.0))


def neighbours_of(found: Sequence[Suggestion]) -> list[str]:
    """The neighbours of all concepts, without what is to be erased."""
    erased = {name for one in found for name in (*one.concept.names, *one.names)}
    near = dict.fromkeys(word for one in found for word in one.neighbours)
    return [word for word in near if word not in erased]


def _things(reader: ReadsText, kind: str) -> list[str]:
    """Things that are known to be different ones, as far as the encoder has a word for them."""
    if kind == "tags":
        return common_tags()
    known = set(reader.vocabulary())
    return [word for word in things() if word in known] if known else things()


def _candidates(reader: ReadsText, concept: Concept, words: Sequence[str]) -> list[str]:
    """Words that the encoder knows and that aren't the concept or what takes its place."""
    own = {folded(said(text)) for text in (*concept.names, concept.alternative)}
    distinct = dict.fromkeys(word for word in words if folded(word) not in own)
    return known_words(reader, list(distinct))


def _akin(word: str, concept: Concept) -> bool:
    """Whether it is the concept's own word with another ending: cats, catlike."""
    return any(
        len(name) >= 3 and re.match(re.escape(folded(said(name))), folded(word)) is not None
        for name in concept.names
    )


def _rows(
    reader: ReadsText,
    words: Sequence[str],
    phrase: str,
    progress: Reported,
    cache: MutableMapping[str, Tensor] | None,
) -> Tensor:
    """Of each word its last token's row and that of the prompt's end, (n, 2, width)."""
    (probe,) = reader.encode([phrase.replace("{a}", _PROBE).replace("{}", _PROBE)])
    key = _key(phrase, probe)
    kept = _kept(cache, key, probe.tokens.shape[1])
    known = {tuple(row[:NAMED_BY].tolist()): row[NAMED_BY:] for row in kept}
    names = {word: _name(word) for word in words}
    missing = [word for word, name in names.items() if name not in known]
    progress(len(names) - len(missing), len(names))
    try:
        for start in range(0, len(missing), ENCODE_BATCH):
            batch = missing[start : start + ENCODE_BATCH]
            read = _read(reader, batch, phrase)
            known |= {names[word]: row for word, row in zip(batch, read, strict=True)}
            progress(len(names) - len(missing) + start + len(batch), len(names))
    finally:  # what was read until somebody cancelled, too
        if cache is not None and missing and known:
            latest = list(known.items())[-MOST_KEPT:]
            cache[key] = torch.stack([torch.cat([torch.tensor(n), row]) for n, row in latest])
    return torch.stack([known[names[word]] for word in words]).unflatten(1, (2, -1))


def _read(reader: ReadsText, words: Sequence[str], phrase: str) -> Tensor:
    """The same two rows of each word one after the other, (n, 2 * width), from the encoder."""
    upto = phrase[: re.search(r"\{a?\}", phrase).end()]  # type: ignore[union-attr]
    null = reader.token_ids([""])[0]
    texts = [[_said_in(form, word) for word in words] for form in (upto, phrase)]
    ends = [[word_span(ids, null)[1] for ids in reader.token_ids(of_form)] for of_form in texts]
    rows = []
    for prompt, last, end in zip(reader.encode(texts[1], together=True), *ends, strict=True):
        bottom = len(prompt.tokens) - 1
        rows.append(prompt.tokens[[min(max(0, last - 1), bottom), min(end, bottom)]])
    return torch.stack(rows).flatten(1).float().cpu()


def _key(phrase: str, probe: Encoded) -> str:
    """32 hex digits of the text encoder, with everything in front of it, and of the phrase."""
    digest = Digest()
    for text in (VERSION, phrase):
        digest.add("suggest", text.encode())
    digest.add_tensor("tokens", probe.tokens)
    return digest.hexdigest()[:32]


def _kept(cache: MutableMapping[str, Tensor] | None, key: str, width: int) -> Tensor:
    """What was read before, (n, NAMED_BY + 2 * width); nothing where it doesn't fit."""
    nothing = torch.zeros(0, NAMED_BY + 2 * width)
    kept = nothing if cache is None or key not in cache else cache[key]
    fits = kept.ndim == 2 and kept.shape[1] == nothing.shape[1] and kept.dtype == nothing.dtype
    return kept if fits else nothing


def _name(word: str) -> tuple[float, ...]:
    """Which word it is, in whole numbers that a float32 holds."""
    digest = Digest()
    digest.add("word", word.encode("utf-8", "surrogatepass"))
    digits = digest.hexdigest()
    return tuple(float(int(digits[4 * n : 4 * n + 4], 16)) for n in range(NAMED_BY))


def _said_in(phrase: str, word: str) -> str:
    return phrase.replace("{a}", with_article(word)).replace("{}", word)
