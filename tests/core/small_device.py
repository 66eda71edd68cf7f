"""A device of any size: counts the bytes of all tensors that are alive, and runs out of them."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class SmallDevice(TorchDispatchMode):
    """Memory of what is made inside, in forward and backward, by the operations themselves.

    Args:
        size: bytes; more raises what PyTorch raises on a device.
    """

    def __init__(self, size: float = float("inf")) -> None:
        super().__init__()
        self.size = size
        self.alive = self.peak = self.failures = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        """Called for every operation inside."""
        before = {storage_of(t) for t in tree_flatten((arguments, keywords))[0] if is_tensor(t)}
        result = function(*arguments, **(keywords or {}))
        for tensor in filter(is_tensor, tree_flatten(result)[0]):
            if storage_of(tensor) not in before:
                self._made(tensor)
        if self.alive > self.size:
            self.failures += 1
            raise RuntimeError("Small device out of memory. Tried to allocate.")
        self.peak = max(self.peak, self.alive)
        return result

    def _made(self, tensor: Tensor) -> None:
        storage, name = tensor.untyped_storage(), storage_of(tensor)
        if name in self._known:
            return
        self._known.add(name)
        self.alive += storage.nbytes()
        weakref.finalize(storage, self._gone, name, storage.nbytes())

    def _gone(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.alive -= size


def is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
