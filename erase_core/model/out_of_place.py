"""In-place additions answered out of place, for networks that overwrite what backward needs.

The host's Flux blocks write ``x += f(x)``. Plain autograd refuses that; with checkpointing it goes
through and the gradient is silently wrong. Inside the mode the same lines make new tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_OUT_OF_PLACE = {
    Tensor.__iadd__: torch.add,
    Tensor.add_: torch.add,
    Tensor.__isub__: torch.sub,
    Tensor.sub_: torch.sub,
    Tensor.__imul__: torch.mul,
    Tensor.mul_: torch.mul,
}


class OutOfPlace(TorchFunctionMode):
    """Only statements that assign, such as ``x += y``, see the result; only use it where all do.

    Args:
        always: also where no gradient is wanted of the operands, so that what a block is given is
            the same when it runs again.
    """

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self._always = always

    def __torch_function__(self, function, types, arguments=(), keywords=None) -> Any:
        """Called for every operation inside the mode."""
        instead = _OUT_OF_PLACE.get(function)
        if instead is not None and torch.is_grad_enabled():
            tensors = (one for one in arguments if isinstance(one, Tensor))
            if self._always or any(one.requires_grad for one in tensors):
                function = instead
        return function(*arguments, **(keywords or {}))
