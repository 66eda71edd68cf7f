"""Which prompts a text encoder's ordinary language is read from: captions, and its own words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from ..model.denoiser import Denoiser
from ..model.prompt import ReadsText
from ..settings.prompts import said, with_article
from .alignment import word_span

# Words of the vocabulary that are protected, for each caption: reading both costs less than twice
# what reading the captions alone does.
WORDS_PER_CAPTION = 0.9
# Words held out, at most, and at most one in so many of those there are.
WITNESSES, WITNESS_SHARE = 40, 4
# Phrases that the words stand in, in turn. Several, so that no place and no neighbour is special.
PHRASES = (
    "a photo of {a}",
    "{}",
    "a picture of {a} on a table",
    "a drawing of the {}",
    "there is {a} here",
    "{a}, simple, detailed",
    "two people and {a}",
)
TAG_PHRASES = ("{}", "1girl, {}, solo", "no humans, {}, simple background", "{}, masterpiece")
_CORE = __package__.rpartition(".")[0]  # beside whose rooms the lists lie
_GIBBERISH = ("qzxvk", "wvjxq", "xkqzj")


@dataclass(frozen=True)
class Reading:
    """The prompts that a text encoder's ordinary language is read from.

    Attributes:
        protected: prompts that the ridge holds: captions, then words in phrases.
        words: those words, with their prompts.
        witnesses: words that are held out, and the prompts they stand in.
    """

    protected: tuple[str, ...]
    words: tuple[tuple[str, str], ...]
    witnesses: tuple[tuple[str, str], ...]


def choose_reading(denoiser: Denoiser, captions: Sequence[str], kind: str) -> Reading:
    """Which prompts are read.

    Words of the encoder's own vocabulary, things first, since what users look at are things: of a
    large vocabulary most words draw nothing. Where the host can't list it, words that are shipped.

    Args:
        captions: plain captions.
        kind: of the concepts; for "tags" the words are tags.
    """
    most = int(WORDS_PER_CAPTION * len(captions))
    phrases: Sequence[str]
    if kind == "tags":
        words, phrases = evenly_spaced(common_tags(), most), TAG_PHRASES
        held_out = _held_out(words, [*captions, *phrases])
    else:
        vocabulary, phrases = known_words(denoiser, _vocabulary(denoiser)), PHRASES
        known = set(vocabulary)
        nameable = [word for word in things() if word in known]
        held_out = _held_out(nameable, captions) or _held_out(vocabulary, captions)
        out = set(held_out)
        first = [word for word in nameable if word not in out]
        out.update(first)
        rest = [word for word in vocabulary if word not in out]
        words = [*evenly_spaced(first, most), *frequent_first(rest, max(0, most - len(first)))]
    out = set(held_out)
    phrased = in_phrases([word for word in words if word not in out], phrases)
    return Reading(
        (*captions, *(text for _, text in phrased)), phrased, in_phrases(held_out, phrases[:1])
    )


def _vocabulary(denoiser: Denoiser) -> list[str]:
    """The words of the encoder, the frequent ones first; shipped ones where it can't list them."""
    listed = list(denoiser.vocabulary())
    if listed:
        return listed
    texts = [*things(), *common_tags(), *plain_captions()]
    return list(dict.fromkeys(re.findall(r"\b[a-z]{3,}\b", " ".join(texts))))


def known_words(denoiser: ReadsText, words: Sequence[str]) -> list[str]:
    """Those of the words that aren't an unknown word to the encoder."""
    unknown = unknown_token(denoiser)
    if unknown is None:
        return list(words)
    rows = words_of(denoiser, words)
    return [word for word, ids in zip(words, rows, strict=True) if unknown not in ids]


def unknown_token(denoiser: ReadsText) -> int | None:
    """The token that any unknown word becomes, for encoders that have one."""
    rows = words_of(denoiser, _GIBBERISH)
    return rows[0][0] if all(len(row) == 1 and row == rows[0] for row in rows) else None


def words_of(denoiser: ReadsText, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of the texts' words, without what stands around them."""
    null, *rows = denoiser.token_ids(["", *texts])
    return [list(ids[slice(*word_span(ids, null))]) for ids in rows]


def in_phrases(words: Sequence[str], phrases: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Each word with a prompt that it stands in, the phrases in turn."""
    return tuple(
        (word, phrases[i % len(phrases)].replace("{a}", with_article(word)).replace("{}", word))
        for i, word in enumerate(words)
    )


def _held_out(words: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Words to judge by: those that no caption names first, then others; [] where there are few."""
    named = set(re.findall(r"\w+", " ".join(captions).casefold()))
    free = [w for w in words if not {w, w.removesuffix("s"), f"{w}s"} & named]
    wanted, known = min(WITNESSES, len(words) // WITNESS_SHARE), set(free)
    chosen = evenly_spaced(free, wanted)
    return [*chosen, *evenly_spaced([w for w in words if w not in known], wanted - len(chosen))]


def frequent_first(words: Sequence[str], count: int) -> list[str]:
    """``count`` of the words, the denser the nearer to the beginning of the list."""
    if count >= len(words):
        return list(words)
    chosen, last = [], -1
    for number in range(count):
        last = max(last + 1, int(len(words) * (number / count) ** 1.5))
        chosen.append(words[min(last, len(words) - 1)])
    return list(dict.fromkeys(chosen))


def plain_captions(count: int | None = None) -> list[str]:
    """Captions and tags shipped with the pack, spread evenly over the list when not all.

    Args:
        count: how many; None or more than there are gives all.
    """
    captions = _shipped("captions.txt")
    return evenly_spaced(captions, len(captions) if count is None else count)


def common_tags() -> list[str]:
    """Danbooru tags shipped with the pack, of all kinds."""
    return _shipped("tags.txt")


def things() -> list[str]:
    """Names of things that can be drawn, shipped with the pack."""
    return _shipped("things.txt")


@cache
def _lines(name: str) -> tuple[str, ...]:
    return tuple(resources.files(_CORE).joinpath(f"data/{name}").read_text("utf-8").split("\n"))


def _shipped(name: str) -> list[str]:
    return [line for line in _lines(name) if line]


def evenly_spaced(items: Sequence[str], count: int) -> list[str]:
    """``count`` of the items at even distances (all when there are not more)."""
    if count >= len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def those_naming(captions: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Those captions in which one of the texts stands as words of its own, also with a plural s.

    Both are taken as they are read: what is emphasis in them doesn't count.
    """
    words = "|".join(re.escape(said(text)) for text in texts)
    pattern = re.compile(rf"(?<!\w)(?:{words})s?(?!\w)", re.IGNORECASE)
    return [caption for caption in captions if pattern.search(said(caption))]
