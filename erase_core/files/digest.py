"""Hashes of labelled parts, tensors among them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


class Digest:
    """SHA-256 over labelled parts, framed so that no two lists of parts read alike."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, label: str, data: bytes | memoryview) -> None:
        """Take in one part."""
        name = label.encode()
        self._hash.update(len(name).to_bytes(8, "little") + name)
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    def add_tensor(self, label: str, tensor: Tensor) -> None:
        """Take in a tensor on the CPU with its type and its shape."""
        self.add(f"{label} {tensor.dtype} {tuple(tensor.shape)}", tensor_bytes(tensor))

    def hexdigest(self) -> str:
        """The digest, 40 hex digits."""
        return self._hash.hexdigest()[:40]


def content_hash(text: str, tensors: Mapping[str, Tensor]) -> str:
    """What the content of a file is recognised by, 40 hex digits.

    Args:
        text: what else belongs to the content.
        tensors: by name, on the CPU. Their order doesn't count.
    """
    digest = Digest()
    digest.add("text", text.encode())
    for name in sorted(tensors):
        digest.add_tensor(name, tensors[name])
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor on the CPU as bytes; without a copy where they lie in a row."""
    return flat_bytes(tensor).numpy().data


def flat_bytes(tensor: Tensor) -> Tensor:
    """The values of a tensor as bytes, (n,) uint8, where the tensor is."""
    return tensor.detach().reshape(-1).view(torch.uint8)
