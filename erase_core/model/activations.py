"""What a backward keeps of the forward: counted before it is kept, or recomputed instead.

Both are ways to run the blocks of a network, see :meth:`Denoiser.around_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Gradients and results that backward holds in passing, in shares of what is kept of a block.
# Measured on shrunken models of SD1.5, SDXL, SD3 and Flux: 0.1 to 0.8 of the largest.
IN_PASSING = 0.5
PLAIN_GRADIENT = 3  # forward-equivalents of a forward with its backward


class BlockRun(Protocol):
    """A way to run a block: called with the block and what it is given.

    Attributes:
        forward_equivalents: what a prediction whose gradient is wanted costs in all when its blocks
            are run so. A plain one costs 3: a backward is as much work as two forwards.
    """

    forward_equivalents: int

    def __call__(self, block: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        """What the block gives."""


class Recompute:
    """Gradient checkpointing: of a block only the inputs are kept, backward runs it once more."""

    forward_equivalents = 4

    def __call__(self, block: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        """Run the block; it must give the same when it is run again, so without dropout."""
        from torch.utils.checkpoint import checkpoint  # half a second, since it imports sympy

        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


class SavedBytes:
    """Counts the bytes that a forward would keep for its backward, and keeps none of them.

    So it needs no more memory than a prediction, and no backward can follow. What several
    operations keep counts once, and what is in memory anyway doesn't count.

    Args:
        resident: what is in memory anyway: the weights, the edit.
    """

    forward_equivalents = 1

    def __init__(self, resident: Iterable[Tensor]) -> None:
        self._resident = dict(map(_storage, resident))
        self._saved: dict[StorageWeakRef, int] = {}
        self._outside: dict[StorageWeakRef, int] = {}  # of all blocks
        self._inputs: dict[StorageWeakRef, int] = {}  # of all blocks
        self._block: dict[StorageWeakRef, int] | None = None  # the one that is running
        self._largest = self._recomputing = 0

    def counting(self) -> AbstractContextManager:
        """Count the forward inside the block."""
        return torch.autograd.graph.saved_tensors_hooks(self._count, _nothing_was_kept)

    def __call__(self, block: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        """Run a block of the network that is counted."""
        self._block = {}
        try:
            result = block(*inputs, **named)
            own = sum(self._block.values())
        finally:
            self._block = None
        self._inputs |= self._new(_tensors([inputs, named]))
        # Backward runs from the end: what came after this block is gone when it is recomputed.
        again = self.kept_checkpointed + round((1 + IN_PASSING) * own)
        self._recomputing = max(self._recomputing, again)
        self._largest = max(self._largest, own)
        return result

    def _count(self, tensor: Tensor) -> None:
        found = self._new([tensor])
        self._saved |= found
        own = self._outside if self._block is None else self._block
        own |= found

    def _new(self, tensors: Iterable[Tensor]) -> dict[StorageWeakRef, int]:
        found = dict(map(_storage, tensors))
        return {ref: size for ref, size in found.items() if ref not in self._resident}

    @property
    def kept(self) -> int:
        """Bytes kept without checkpointing."""
        return sum(self._saved.values())

    @property
    def kept_checkpointed(self) -> int:
        """Bytes kept with checkpointing, before a block is recomputed."""
        return sum({**self._outside, **self._inputs}.values())

    @property
    def needed(self) -> int:
        """Bytes that forward and backward need at the most without checkpointing."""
        return self.kept + round(IN_PASSING * self._largest)

    @property
    def needed_checkpointed(self) -> int:
        """The same with checkpointing."""
        return max(self.kept_checkpointed, self._recomputing)


def _storage(tensor: Tensor) -> tuple[StorageWeakRef, int]:
    """The memory behind a tensor, by a name that isn't used again while it is held, and its size.

    Addresses would not do: what is counted is freed again at once.
    """
    storage = tensor.untyped_storage()
    return StorageWeakRef(storage), storage.nbytes()


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple | Mapping):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _tensors(value)


def _nothing_was_kept(_packed: None) -> Tensor:
    raise RuntimeError("A forward that was only counted can't be followed by a backward.")
