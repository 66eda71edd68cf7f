"""The repeated blocks of a network, run another way while a gradient is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from .activations import BlockRun

Again = Callable[[], Callable[[], AbstractContextManager[None]]]


@contextmanager
def blocks_run_by(
    network: nn.Module, kinds: tuple[type[nn.Module], ...], run: BlockRun, again: Again
) -> Iterator[None]:
    """Inside, each block of a network is run by ``run`` where gradients are wanted.

    Args:
        network: a twin's, never the host's own.
        kinds: classes of the blocks, none of which contains another.
        again: called in the forward; gives what surrounds the block, then and when it runs again.
    """
    blocks = [module for module in network.modules() if isinstance(module, kinds)]
    before = {block: vars(block).get("forward") for block in blocks}
    try:
        for block in blocks:
            block.forward = _run_by(run, block, block.forward, again)
        yield
    finally:
        for block, forward in before.items():
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward


def _run_by(
    run: BlockRun,
    block: nn.Module,
    forward: Callable[..., Any],
    again: Again,
) -> Callable[..., Any]:
    def instead(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        surroundings, hooked = again(), _hooks(block)

        def whole(*inputs: Any, **named: Any) -> Any:
            with surroundings(), _hooks_as(hooked):
                return forward(*inputs, **named)

        # The host writes into its dictionary of options as it goes from block to block.
        own = [dict(i) if isinstance(i, dict) else i for i in inputs]
        named = {name: dict(i) if isinstance(i, dict) else i for name, i in named.items()}
        return run(whole, *own, **named)

    return instead


def _hooks(block: nn.Module) -> dict[nn.Module, Any]:
    """The hooks on a block's layers; those of an erasure in exact mode are gone after a forward."""
    return {m: m._forward_hooks.copy() for m in block.modules() if m._forward_hooks}


@contextmanager
def _hooks_as(hooked: dict[nn.Module, Any]) -> Iterator[None]:
    before = {module: module._forward_hooks for module in hooked}
    try:
        for module, hooks in hooked.items():
            module._forward_hooks = hooks
        yield
    finally:
        for module, hooks in before.items():
            module._forward_hooks = hooks
