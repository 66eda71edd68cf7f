"""The low-rank change ``dW = B R^T``, and how it rides on a network's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LowRankEdit:
    """The weight changes ``dW = B R^T`` of the trained matrices.

    Attributes:
        bases: R by matrix name, each (width, rank). In the hard form it is one and the same
            tensor for all matrices.
        factors: B by matrix name, each (out, rank).
    """

    bases: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]

    @classmethod
    def shared(cls, basis: Tensor, factors: Mapping[str, Tensor]) -> LowRankEdit:
        """An edit whose matrices all have the same R."""
        return cls(dict.fromkeys(factors, basis), factors)

    def to(self, device: torch.device | str) -> LowRankEdit:
        """The edit on a device in float32, detached; bases that were one tensor stay one."""
        return self._each(lambda tensor: tensor.detach().to(device, torch.float32))

    def with_more(self, other: LowRankEdit) -> LowRankEdit:
        """Both edits; they are of different matrices."""
        return LowRankEdit({**self.bases, **other.bases}, {**self.factors, **other.factors})

    def copy(self) -> LowRankEdit:
        """The edit in memory of its own."""
        return self._each(torch.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> LowRankEdit:
        changed = {id(basis): change(basis) for basis in self.bases.values()}
        return LowRankEdit(
            {name: changed[id(basis)] for name, basis in self.bases.items()},
            {name: change(factor) for name, factor in self.factors.items()},
        )


class Projections:
    """``x R`` of what the layers are given in one forward, in the type of R.

    Hosts round the prompts to the model's type, and rounded ones are no longer orthogonal to R: in
    bf16 that alone would move exact prompts about as far as rounding the weights does. Where a
    layer is given such prompts, the original ones are projected.

    Args:
        prompts: what layers are given of the prompts, before it is rounded, as far as it is known:
            token embeddings (n, tokens, width), what goes with a pooled vector (n, width).
    """

    def __init__(self, prompts: Sequence[Tensor | None] = ()) -> None:
        self.prompts = [prompt for prompt in prompts if prompt is not None]
        self._seen: Tensor | None = None
        self._precise = torch.empty(0)
        self._projected: dict[int, Tensor] = {}

    def project(self, x: Tensor, basis: Tensor) -> Tensor:
        """``x R`` (..., rank). Layers that are given the same tensor share it."""
        if x is not self._seen:
            self._seen, self._precise, self._projected = x, self._unrounded(x, basis.dtype), {}
        if id(basis) not in self._projected:
            self._projected[id(basis)] = self._precise @ basis
        return self._projected[id(basis)]

    def _unrounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x``, each number that is a prompt's rounded one as it was before."""
        known = next((prompt for prompt in self.prompts if prompt.shape == x.shape), None)
        if x.dtype is dtype or known is None:
            return x.to(dtype)
        full = known.to(x.device, dtype)
        # What stands between the encoder and the layer may have changed some: those stay changed.
        return torch.where(full.to(x.dtype) == x, full, x.to(dtype))


Active = Callable[[torch.device], tuple[LowRankEdit | None, Projections]]


def side_path_hook(name: str, active: Active) -> Callable[..., Tensor | None]:
    """A forward hook by which a linear layer adds ``(x R) B^T`` to its output.

    A side path costs ``2 tokens width rank`` multiplications more per matrix; forming
    ``W + B R^T`` instead would build a gradient as large as every trained matrix at each step.

    Args:
        name: of the layer's matrix in the edit.
        active: gives, for a device, the edit there (None for no change) and the projections of the
            forward that runs.
    """

    def add(_layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        edit, projections = active(output.device)
        factor = None if edit is None else edit.factors.get(name)
        if edit is None or factor is None:
            return None
        projected = projections.project(inputs[0], edit.bases[name])
        return (output + projected @ factor.T).to(output.dtype)

    return add


class LowRankSidePath:
    """Lets linear layers add ``(x R) B^T`` to their output while an edit is active.

    Args:
        modules: the layers, by the matrix name that an edit uses.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._edit: LowRankEdit | None = None
        self._projections = Projections()
        self._handles = [
            module.register_forward_hook(side_path_hook(name, self._active))
            for name, module in modules.items()
        ]

    def _active(self, _device: torch.device) -> tuple[LowRankEdit | None, Projections]:
        return self._edit, self._projections

    @contextmanager
    def active(
        self, edit: LowRankEdit | None, prompts: Sequence[Tensor | None] = ()
    ) -> Iterator[None]:
        """Apply ``edit`` inside the block, which runs one forward with ``prompts``.

        Args:
            prompts: see :class:`Projections`.
        """
        previous = self._edit, self._projections
        self._edit, self._projections = edit, Projections(prompts)
        try:
            yield
        finally:
            self._edit, self._projections = previous

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        """What makes the edit that is active now active once more, for a part of the forward.

        With projections of its own: a part that is run twice must do the same both times.
        """
        edit, prompts = self._edit, self._projections.prompts
        return lambda: self.active(edit, prompts)

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for handle in self._handles:
            handle.remove()
