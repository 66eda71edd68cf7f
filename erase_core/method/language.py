"""Ordinary language: what the ridge protects, and words that are held out to judge it by.

What is protected is the second moment of token embeddings, over plain captions and over words of
the text encoder's own vocabulary in plain phrases. Where neither reaches, the moment is all but
singular, and a regression would put the edit into just those directions; so it is drawn towards
one that protects all directions alike (:func:`shrunk`). How well that does is judged on witnesses,
words that are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..files.digest import Digest
from ..model.denoiser import Denoiser
from ..model.prompt import POOLED, TOKENS, Encoded
from ..version import VERSION
from .alignment import first_at, kept_in_front, word_span
from .reading import (
    Reading,
    evenly_spaced,
    plain_captions,
    those_naming,
    unknown_token,
    words_of,
)

ENCODE_BATCH = 16
PROBE_CAPTIONS = 4
# Rows of a held-out prompt that are kept; the last one stands for the padding after it.
WITNESS_ROWS = 24
# From so many tokens in front of the words on, those of a chat's template are left out of these.
TEMPLATE_FROM = 4
# How far a moment is drawn towards protecting all directions alike (Ledoit and Wolf 2004), in
# shares of its mean diagonal. The less, the less else changes as long as words are among what is
# protected (on the first small model, keys and values moved alike: .12 at .1, .105 at .03, .096 at
# .01); it is there for the words that neither captions nor the vocabulary sample reach.
SHRINKAGE = 0.01
# Tokens of this width make a moment of 134 MB; those of several language models side by side 2 GB.
WIDEST_ON_A_CARD = 4096
# From this share on, a person is told that the captions are mostly unknown words.
MOSTLY_UNKNOWN = 0.5


Reported = Callable[[int, int], None]


def in_silence(done: int, total: int) -> None:
    """Tell nobody how far the reading is."""


def shrunk(moment: Tensor, share: float = SHRINKAGE) -> Tensor:
    """A second moment (width, width) made fit for embeddings that weren't in it."""
    alike = torch.eye(len(moment), dtype=moment.dtype) * moment.diagonal().mean()
    return (1 - share) * moment + share * alike


@dataclass(frozen=True)
class Words:
    """Words with token embeddings of a prompt that each stands in.

    Attributes:
        texts: the words.
        rows: (n, r, width), zeros where a prompt has fewer.
        counts: how many tokens each of the r rows stands for, (r,).
    """

    texts: tuple[str, ...]
    rows: Tensor
    counts: Tensor

    def without(self, names: Sequence[str]) -> Words:
        """Those that aren't named by one of the names."""
        named = set(those_naming(self.texts, names)) if names else set()
        return self._only([i for i, text in enumerate(self.texts) if text not in named])

    def telling(self) -> Words:
        """The half that says most to the encoder: whose rows are farthest from what all share.

        A word that a model never learned says nothing and changes little, whatever becomes of
        those that draw something. To judge by it would call a ruin half as bad as it is.
        """
        apart = ((self.rows - self.rows.mean(0)).square().sum(-1) * self.counts).sum(1)
        size = (self.rows.square().sum(-1) * self.counts).sum(1).clamp(min=1e-12)
        order = (apart / size).argsort(descending=True, stable=True).tolist()
        return self._only(sorted(order[: -(-len(order) // 2)]))

    def _only(self, kept: Sequence[int]) -> Words:
        return Words(tuple(self.texts[i] for i in kept), self.rows[list(kept)], self.counts)


@dataclass(frozen=True)
class Language:
    """What was read of ordinary language.

    Attributes:
        moment: second moment of what is protected, (width, width) float64.
        vocabulary: the protected words of the vocabulary, each with its last token's row and that
            of the prompt's end.
        witnesses: words that are not protected, with the rows of whole prompts.
        unknown: share of the captions' tokens that are unknown words to the encoder.
    """

    moment: Tensor
    vocabulary: Words
    witnesses: Words
    unknown: float


def read_language(
    denoiser: Denoiser,
    reading: Reading,
    cache: MutableMapping[str, Tensor] | None = None,
    named: Sequence[str] = (),
    progress: Reported = in_silence,
) -> Language:
    """Encode what is to be read, or take it from the cache. Every prompt counts alike.

    Args:
        cache: results by key, for example on disk. The key covers the engine's version, the
            prompts and the embeddings of a few of them, hence the text encoder with everything in
            front of it (clip skip, LoRAs, textual inversions). What has another shape than it
            must have, or isn't finite, is read anew.
        named: names of the concepts. Prompts that name them are not protected; they are taken out
            of what is cached, so that the cache serves every concept.
        progress: told how many prompts are read, and how many there are.
    """
    probes = _probes(denoiser, reading.protected)
    keys, kept = _cached_reading(cache, probes, reading)
    if kept is None:
        kept = _read(denoiser, reading, _kept_in_front(denoiser, reading, probes), progress)
        if cache is not None:
            cache.update(zip(keys, kept, strict=True))
    moment, word_rows, witness_rows = kept
    named_ones = those_naming(reading.protected, named) if named else []
    moment = _without(denoiser, moment.double(), reading.protected, named_ones, TOKENS, progress)
    longest = max(len(probe.rows(TOKENS)) for probe in probes)
    counts = torch.ones(witness_rows.shape[1])
    if len(counts) == WITNESS_ROWS:  # else nothing was cut off: these encoders don't pad
        counts[-1] += max(0, longest - WITNESS_ROWS)
    words = tuple(word for word, _ in reading.words)
    witnesses = tuple(word for word, _ in reading.witnesses)
    return Language(
        moment,
        Words(words, word_rows.float(), torch.ones(2)),
        Words(witnesses, witness_rows.float(), counts),
        unknown_share(denoiser, evenly_spaced(plain_captions(), 64)),
    )


def is_read(denoiser: Denoiser, reading: Reading, cache: MutableMapping[str, Tensor]) -> bool:
    """Whether the cache has what :func:`read_language` would read."""
    return _cached_reading(cache, _probes(denoiser, reading.protected), reading)[1] is not None


def read_moment(
    denoiser: Denoiser,
    prompts: Sequence[str],
    way: str,
    cache: MutableMapping[str, Tensor] | None = None,
    named: Sequence[str] = (),
    progress: Reported = in_silence,
) -> Tensor:
    """Second moment (size, size) of what enters on another way than that of the tokens.

    Args:
        way: for example :data:`prompt.POOLED`; the rest as in :func:`read_language`.
    """
    probes = _probes(denoiser, prompts)
    key = _cache_key(probes, Reading(tuple(prompts), (), ())) + f"-{way.split()[0]}"
    kept = _from_cache(cache, [key])
    moment = kept[0] if kept else None
    if moment is None or not _is_moment(moment, probes[0].rows(way).shape[1]):
        moment = _mean_moment(denoiser, prompts, way, progress)
        if cache is not None:
            cache[key] = moment
    named_ones = those_naming(prompts, named) if named else []
    return _without(denoiser, moment.double(), prompts, named_ones, way, progress)


def unknown_share(denoiser: Denoiser, texts: Sequence[str]) -> float:
    """Share of the texts' tokens that are an unknown word to the encoder."""
    unknown = unknown_token(denoiser)
    tokens = [token for row in words_of(denoiser, texts) for token in row]
    return sum(token == unknown for token in tokens) / max(1, len(tokens))


def _cached_reading(
    cache: MutableMapping[str, Tensor] | None, probes: Sequence[Encoded], reading: Reading
) -> tuple[list[str], list[Tensor] | None]:
    """The keys of what :func:`_read` gives, and that from the cache if it is there and fits."""
    key = _cache_key(probes, reading)
    keys = [key + part for part in ("", "-words", "-witnesses")]
    kept = _from_cache(cache, keys)
    fits = probes[0].rows(TOKENS).shape[1], len(reading.words), len(reading.witnesses)
    return keys, kept if kept and _is_a_reading(kept, *fits) else None


def _from_cache(
    cache: MutableMapping[str, Tensor] | None, keys: Sequence[str]
) -> list[Tensor] | None:
    """The entries under all of the keys, if they are there and finite."""
    if cache is None or not all(key in cache for key in keys):
        return None
    found = [cache[key] for key in keys]
    return found if all(bool(rows.isfinite().all()) for rows in found) else None


def _is_a_reading(kept: Sequence[Tensor], width: int, named: int, held_out: int) -> bool:
    """Whether cached tensors have the shapes that :func:`_read` gives."""
    moment, words, witnesses = kept
    rows = witnesses.shape[1] if witnesses.ndim == 3 else 0
    return (
        _is_moment(moment, width)
        and words.shape == (named, 2, width)
        and 1 <= rows <= WITNESS_ROWS
        and witnesses.shape == (held_out, rows, width)
    )


def _is_moment(moment: Tensor, width: int) -> bool:
    """Whether it may be the mean of ``c c^T``, which is as large mirrored and never negative."""
    return (
        moment.shape == (width, width)
        and moment.dtype == torch.float64
        and torch.allclose(moment, moment.T)
        and bool((moment.diagonal() >= 0).all())
    )


def _probes(denoiser: Denoiser, prompts: Sequence[str]) -> list[Encoded]:
    return _encoded(denoiser, evenly_spaced(prompts, PROBE_CAPTIONS))


def _encoded(denoiser: Denoiser, texts: Sequence[str], together: bool = False) -> list[Encoded]:
    """Prompts as the network reads them."""
    prompts = denoiser.encode(texts, together=together)
    denoiser.read(prompts)
    return prompts


def _kept_in_front(denoiser: Denoiser, reading: Reading, probes: Sequence[Encoded]) -> int:
    """How many tokens in front have no row, see :func:`alignment.kept_in_front`."""
    ids = denoiser.token_ids(evenly_spaced(reading.protected, PROBE_CAPTIONS))
    both = [(one, probe.tokens) for one, probe in zip(ids, probes, strict=True)]
    return kept_in_front(both[0], both[-1])


def _read(denoiser: Denoiser, reading: Reading, head: int, progress: Reported) -> list[Tensor]:
    """Moment, rows of the words and rows of the witnesses.

    The moment is kept in float64: in float32 it is no longer positive where few prompts reach. The
    rows are for figures that people read, so half precision will do.

    Args:
        head: how many tokens in front have no row.
    """
    texts = [text for _, text in reading.words]
    ends = _ends(denoiser, reading.words)
    word_rows: list[Tensor] = []

    def take(text: str, prompt: Encoded) -> None:
        if len(word_rows) < len(texts) and text == texts[len(word_rows)]:
            places = prompt.places(TOKENS)
            rows = [first_at(places, place - head) for place in ends[len(word_rows)]]
            word_rows.append(prompt.rows(TOKENS)[rows].half())

    moment = _mean_moment(denoiser, reading.protected, TOKENS, progress, take)
    rows = _witness_rows(denoiser, [text for _, text in reading.witnesses], head, len(moment))
    stacked = torch.stack(word_rows) if word_rows else torch.zeros(0, 2, len(moment))
    return [moment, stacked.half(), rows]


def _witness_rows(denoiser: Denoiser, texts: Sequence[str], head: int, width: int) -> Tensor:
    """Rows of whole prompts, (n, rows, width), without what a long template has in front."""
    encoded = _encoded(denoiser, texts, together=True) if texts else []
    null, *ids = denoiser.token_ids(["", *texts])
    begin = min((word_span(one, null)[0] for one in ids), default=0) - head
    skipped = begin - 1 if begin > TEMPLATE_FROM else 0
    rows = torch.zeros(len(texts), WITNESS_ROWS, width, dtype=torch.float16)
    longest = 1
    for row, prompt in zip(rows, encoded, strict=True):
        first = first_at(prompt.places(TOKENS), skipped)
        taken = prompt.rows(TOKENS)[first : first + WITNESS_ROWS]
        row[: len(taken)] = taken.half()
        longest = max(longest, len(taken))
    return rows[:, :longest].contiguous()


def _ends(denoiser: Denoiser, words: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """For each word in its prompt the place of its last token, and that of the prompt's end."""
    upto = [text[: text.index(word) + len(word)] for word, text in words]
    null, *rows = denoiser.token_ids(["", *upto, *(text for _, text in words)])
    ends = [word_span(ids, null)[1] for ids in rows]
    last = [max(0, end - 1) for end in ends[: len(words)]]
    return list(zip(last, ends[len(words) :], strict=True))


def _without(
    denoiser: Denoiser,
    moment: Tensor,
    prompts: Sequence[str],
    left_out: Sequence[str],
    way: str,
    progress: Reported,
) -> Tensor:
    """The mean moment of the prompts without some of them."""
    count = len(prompts) - len(left_out)
    if not left_out or not count:
        return moment
    named = _mean_moment(denoiser, left_out, way, progress)
    return (moment * len(prompts) - named * len(left_out)) / count


def _mean_moment(
    denoiser: Denoiser,
    prompts: Sequence[str],
    way: str,
    progress: Reported,
    each: Callable[[str, Encoded], None] = lambda text, prompt: None,
) -> Tensor:
    total, device, together = torch.zeros(()), None, True
    for start in range(0, len(prompts), ENCODE_BATCH):
        batch = prompts[start : start + ENCODE_BATCH]
        encoded = denoiser.encode(batch, together=together)
        if together and way == POOLED and any(prompt.pooled is None for prompt in encoded):
            encoded, together = denoiser.encode(batch), False
        denoiser.read(encoded)
        for text, prompt in zip(batch, encoded, strict=True):
            each(text, prompt)
        rows = [prompt.rows(way) for prompt in encoded]
        alike = torch.cat([one * len(one) ** -0.5 for one in rows])
        device = device or _where_it_is_summed(denoiser.device, alike.shape[1])
        total = total.to(device) + second_moment([alike.to(device)]) * len(alike)
        progress(start + len(batch), len(prompts))
    return total.cpu() / len(prompts)


def _where_it_is_summed(device: torch.device, width: int) -> torch.device:
    """On the card where that has float64 and room beside the text encoder.

    Of SDXL's width the sum is a thousand GFLOP: most of a minute on one core, and seconds even on
    cards that are 64 times as slow in float64 as in float32.
    """
    there = width <= WIDEST_ON_A_CARD and _has_float64(device)
    return device if there else torch.device("cpu")


def _has_float64(device: torch.device) -> bool:
    """Whether a device multiplies in float64; some can't even hold such numbers."""
    try:
        one = torch.ones(1, 1, dtype=torch.float64, device=device)
        return float(one @ one) == 1
    except (TypeError, RuntimeError):
        return False


def second_moment(prompts: Iterable[Tensor]) -> Tensor:
    """``mean c c^T`` over the tokens of all prompts (tokens, width): (width, width) float64."""
    total, tokens = None, 0
    for rows in prompts:
        rows = rows.double()
        product = rows.T @ rows
        total = product if total is None else total.add_(product)
        tokens += rows.shape[0]
    if total is None:
        raise ValueError("second_moment needs at least one prompt.")
    return total / tokens


def _cache_key(probes: Sequence[Encoded], reading: Reading) -> str:
    """32 hex digits of all that the cached tensors depend on."""
    digest = Digest()
    digest.add("version", VERSION.encode())
    texts = {
        "protected": reading.protected,
        "words": [text for pair in reading.words for text in pair],
        "witnesses": [text for pair in reading.witnesses for text in pair],
    }
    for label, group in texts.items():
        for text in group:
            digest.add(label, text.encode("utf-8", "surrogatepass"))
    for probe in probes:
        digest.add_tensor("tokens", probe.tokens)
        if probe.pooled is not None:
            digest.add_tensor("pooled", probe.pooled)
        for way, read in sorted(probe.read.items()):
            digest.add_tensor(way, read.rows)
    return digest.hexdigest()[:32]
