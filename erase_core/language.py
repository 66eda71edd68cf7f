"""Ordinary language: the second moment of token embeddings that the ridge protects."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from importlib import resources

import torch
from torch import Tensor

from .denoiser import Denoiser

ENCODE_BATCH = 16
PROBE_CAPTIONS = 4


def plain_captions(count: int | None = None) -> list[str]:
    """Captions and tags shipped with the pack, spread evenly over the list when not all.

    Args:
        count: how many; None or more than there are gives all.
    """
    text = resources.files(__package__).joinpath("data/captions.txt").read_text("utf-8")
    captions = text.splitlines()
    return spread(captions, len(captions) if count is None else count)


def spread(items: Sequence[str], count: int) -> list[str]:
    """``count`` of the items at even distances (all when there are not more)."""
    if count >= len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def naming(captions: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Those captions in which one of the texts stands as words of its own, also with a plural s."""
    words = "|".join(re.escape(text) for text in texts)
    pattern = re.compile(rf"(?<!\w)(?:{words})s?(?!\w)", re.IGNORECASE)
    return [caption for caption in captions if pattern.search(caption)]


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


def encode_language(
    denoiser: Denoiser,
    captions: Sequence[str],
    cache: MutableMapping[str, Tensor] | None = None,
    left_out: Sequence[str] = (),
    pooled: bool = False,
) -> Iterator[tuple[int, int]]:
    """Encode the captions and return their second moment (width, width), float64.

    Every caption counts alike, however long. A generator: yields (captions done, captions) as it
    goes, and returns the matrix.

    Args:
        cache: results by key, for example on disk. The key covers the captions and the
            embeddings of a few of them, hence the text encoder with everything in front of it
            (clip skip, LoRAs, textual inversions).
        left_out: those of the captions that shall not count. They are taken out of what is
            cached, so that the cache serves every concept.
        pooled: of their pooled vectors instead of their tokens.
    """
    key = _cache_key(denoiser, captions) + ("-pooled" if pooled else "")
    if cache is None or key not in cache:
        moment = yield from _mean_moment(denoiser, captions, pooled)
        cache = {} if cache is None else cache
        # In float64: rounded to float32 it is no longer positive where few captions reach.
        cache[key] = moment
    moment = cache[key].double()
    count = len(captions) - len(left_out)
    if not left_out or not count:
        return moment
    named = yield from _mean_moment(denoiser, left_out, pooled)
    return (moment * len(captions) - named * len(left_out)) / count


def _mean_moment(
    denoiser: Denoiser, captions: Sequence[str], pooled: bool
) -> Iterator[tuple[int, int]]:
    total = 0.0
    for start in range(0, len(captions), ENCODE_BATCH):
        batch = captions[start : start + ENCODE_BATCH]
        encoded = denoiser.encode(batch, together=not pooled)
        prompts = [one.pooled[None] if pooled else one.tokens for one in encoded]
        alike = torch.cat([rows * len(rows) ** -0.5 for rows in prompts])
        total = total + second_moment([alike]) * len(alike)
        yield start + len(batch), len(captions)
    return total / len(captions)


def _cache_key(denoiser: Denoiser, captions: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join(captions).encode())
    for prompt in denoiser.encode(spread(captions, PROBE_CAPTIONS)):
        digest.update(prompt.tokens.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
