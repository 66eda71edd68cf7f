"""A network again, over the storage of another: one copy of the weights, and autograd takes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def twin_network(
    network: nn.Module,
    shared: Callable[[nn.Module], Iterable[Any]] = lambda module: (),
    as_packed: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> nn.Module:
    """The network again, as normal tensors over the same storage.

    What hosts load in inference mode are inference tensors, which autograd refuses even when
    frozen. Nothing is trained in the twin: its parameters take no gradient. Must be called outside
    inference mode.

    Args:
        shared: of a module what the twin shall have itself, not a copy of.
        as_packed: puts a plain tensor into the class of another, with what that class keeps
            beside the numbers; for weights that are packed.
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _over_same_storage(tensor, as_packed)
        for thing in shared(module):
            memo[id(thing)] = thing
    return copy.deepcopy(network, memo)


def _over_same_storage(
    tensor: Tensor, as_packed: Callable[[Tensor, Tensor], Tensor] | None
) -> Tensor:
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    size = Tensor.size(tensor)  # a packed tensor's shape is that of the numbers in it
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), size, tensor.stride())
    if as_packed is not None and type(tensor) not in (Tensor, nn.Parameter):
        alias = as_packed(alias, tensor)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(alias, requires_grad=False)
    return alias
