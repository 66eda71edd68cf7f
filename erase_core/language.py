"""Ordinary language: the second moment of token embeddings that the ridge protects."""

from __future__ import annotations

import hashlib
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
    denoiser: Denoiser, captions: Sequence[str], cache: MutableMapping[str, Tensor] | None = None
) -> Iterator[tuple[int, int]]:
    """Encode the captions and return their second moment (width, width), float64.

    A generator: yields (captions done, captions) as it goes, and returns the matrix.

    Args:
        cache: results by key, for example on disk. The key covers the captions and the
            embeddings of a few of them, hence the text encoder with everything in front of it
            (clip skip, LoRAs, textual inversions).
    """
    key = _cache_key(denoiser, captions)
    if cache is not None and key in cache:
        return cache[key].double()
    parts = []
    for start in range(0, len(captions), ENCODE_BATCH):
        batch = captions[start : start + ENCODE_BATCH]
        rows = torch.cat([prompt.tokens for prompt in denoiser.encode(batch, together=True)])
        parts.append((second_moment([rows]), rows.shape[0]))
        yield start + len(batch), len(captions)
    tokens = sum(count for _, count in parts)
    moment = sum(part * (count / tokens) for part, count in parts)
    if cache is not None:
        cache[key] = moment.float()
        moment = cache[key].double()
    return moment


def _cache_key(denoiser: Denoiser, captions: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join(captions).encode())
    for prompt in denoiser.encode(spread(captions, PROBE_CAPTIONS)):
        digest.update(prompt.tokens.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
