"""Finding a finished erasure again: the key of what it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, MutableMapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..files.digest import Digest, flat_bytes, tensor_bytes
from ..settings.settings import EraseSettings
from .erasure import Erasure

# What to do about a stored result, as a user chooses it.
USE_IF_THERE, TRAIN_AGAIN, USE_ONLY, RESUME = REUSE = (
    "use if there",
    "train again",
    "use only",
    "resume",
)

# Words of four bytes in one partial sum. PyTorch runs loops of up to this length in one thread:
# starting its threads costs more than the sum, a hundred times more where the cores are busy.
SUMMED_WORDS = 32_768
SUMS_AT_ONCE = 512  # bounds the memory beside the weights on an accelerator to about 200 MB


class NoStoredResultError(ValueError):
    """A stored result was demanded, and there is none."""


def result_key(
    settings: EraseSettings, embeddings: Iterable[Tensor], model: str, version: str
) -> str:
    """Name of the result that these ingredients lead to; equal everywhere for equal ingredients.

    Args:
        settings: all of them count.
        embeddings: of every prompt, in an order that the settings determine. They stand for the
            text encoder with all that is in front of it.
        model: the denoiser's identity.
        version: of the engine.
    """
    digest = Digest()
    digest.add("version", version.encode())
    digest.add("model", model.encode())
    digest.add("settings", json.dumps(_plain(settings.as_dict()), sort_keys=True).encode())
    for rows in embeddings:
        digest.add(f"{rows.dtype} {tuple(rows.shape)}", tensor_bytes(rows))
    return digest.hexdigest()


def steps_added_key(key: str, history: Sequence[Sequence[int]]) -> str:
    """Name of the result of a run that went on with more steps than it was begun with.

    It isn't what a run with that many steps gives from the start, so it never passes for that.

    Args:
        key: of the settings as they are now.
        history: for each time that steps were added, how many were done and planned until then.
    """
    digest = Digest()
    digest.add("key", key.encode())
    digest.add("history", json.dumps(history).encode())
    return digest.hexdigest()


def stored_result(
    results: MutableMapping[str, Erasure] | None, key: str, reuse: str = USE_IF_THERE
) -> Erasure | None:
    """The complete result stored under a key; None if the erasure is to be trained.

    Args:
        reuse: one of :data:`REUSE`.

    Raises:
        NoStoredResultError: there is none and ``reuse`` is "use only".
        ValueError: another ``reuse``.
    """
    if reuse not in REUSE:
        raise ValueError(f"Unknown choice {reuse!r}. Choose one of: {', '.join(REUSE)}.")
    found = None
    if results is not None and reuse != TRAIN_AGAIN:
        found = results.get(key)
        if found is not None and not found.record.get("complete"):
            found = None
    if found is None and reuse == USE_ONLY:
        raise NoStoredResultError(
            f"Nothing is stored for this erasure (key {key[:12]}), and {USE_ONLY!r} forbids to "
            "train it. It must have been trained to the end with the same model, LoRAs, text "
            f"encoder and settings, each of them; choose {USE_IF_THERE!r} to train it now."
        )
    return found


def word_sums(tensor: Tensor) -> Tensor:
    """Checksums of a tensor's bytes, (n,) int64, computed where the tensor is.

    Each is a sum of 32-bit words, multiplied by fixed random odd 64-bit numbers, modulo 2^64:
    multilinear hashing. Integers add up to the same in any order, so every device and every
    machine gives the same. A change of one word always shows, any other but once in 2^31.
    """
    words = _words(tensor)
    keys = _sum_keys().to(words.device)
    rest = len(words) % SUMMED_WORDS
    rows = words[: len(words) - rest].view(-1, SUMMED_WORDS)
    sums = [_products_summed(part, keys) for part in rows.split(SUMS_AT_ONCE) if len(part)]
    if rest:
        sums.append(_products_summed(words[None, -rest:], keys[:rest]))
    return torch.cat(sums) if sums else keys[:0]


def middle_bytes(tensor: Tensor, count: int) -> Tensor:
    """Up to about ``count`` bytes from the middle of a tensor, uint8, on its device."""
    flat = tensor.detach().reshape(-1)
    length = max(1, count // flat.element_size())
    start = max(0, (len(flat) - length) // 2)
    return flat_bytes(flat[start : start + length])


def bytes_on_cpu(parts: Sequence[Tensor]) -> list[bytes]:
    """The bytes of tensors that may lie on several devices, with one transfer for each device."""
    flat = [flat_bytes(part) for part in parts]
    found: dict[int, bytes] = {}
    for device in {part.device for part in flat}:
        places = [index for index, part in enumerate(flat) if part.device == device]
        data = tensor_bytes(torch.cat([flat[index] for index in places]).cpu())
        start = 0
        for index in places:
            end = start + len(flat[index])
            found[index] = bytes(data[start:end])
            start = end
    return [found[index] for index in range(len(flat))]


@cache
def _sum_keys() -> Tensor:
    noise = hashlib.shake_256(b"concept surgery, word sums").digest(8 * SUMMED_WORDS)
    return torch.frombuffer(bytearray(noise), dtype=torch.int64) | 1


def _products_summed(rows: Tensor, keys: Tensor) -> Tensor:
    """``rows @ keys`` modulo 2^64, for int32 rows (n, m) and int64 keys (m,)."""
    if rows.device.type == "cpu":
        return torch.stack([torch.dot(row.to(torch.int64), keys) for row in rows])
    return (rows * keys).sum(dim=1)  # accelerators multiply no matrices of integers


def _words(tensor: Tensor) -> Tensor:
    """The bytes as int32, filled up with zeros."""
    data = flat_bytes(tensor)
    missing = -len(data) % 4
    if missing or data.storage_offset() % 4:
        data = torch.cat([data, data.new_zeros(missing)])
    return data.view(torch.int32)


def _plain(value: Any) -> Any:
    """The same JSON for numbers that are equal: 1.0 becomes 1."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
