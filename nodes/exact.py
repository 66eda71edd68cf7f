"""An erasure beside the weights: the layers add its part to what they give, the weights stay.

Merged into fp16, bf16 or fp8 weights, ``W + B R^T`` is rounded again, and that moves every prompt.
Here the layers give ``W x + s B (R^T x)``: where ``R^T x`` is zero, nothing is added to ``W x``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..erase_core import Erasure
from ..erase_core.model.low_rank import LowRankEdit, Projections, side_path_hook

WRAPPER_TYPE = "apply_model"  # the host's WrappersMP.APPLY_MODEL, in every host that has wrappers
WRAPPER_KEY = "concept_surgery_exact:"


class ExactModeError(ValueError):
    """A host or a model on which an erasure can't ride beside the weights."""


class SidePath:
    """A wrapper around the host's ``apply_model`` under which the layers add one erasure.

    The hooks are on the layers only during the call. They are put on the model that is run, which
    may be the host's, a copy of it or the twin that training runs.

    Args:
        erasure: what to add.
        keys: host key of every matrix, by the erasure's names.
        strength: factor of what is added.
    """

    def __init__(self, erasure: Erasure, keys: Mapping[str, str], strength: float) -> None:
        self._keys = dict(keys)
        self._edits: dict[torch.device, LowRankEdit] = {}
        # The host runs nodes in inference mode; training can't use tensors made in there.
        with torch.inference_mode(False):
            bases = {id(r): r.detach().float().clone() for r in erasure.bases.values()}
            self._edit = LowRankEdit(
                {name: bases[id(r)] for name, r in erasure.bases.items()},
                {name: strength * b.detach().float() for name, b in erasure.factors.items()},
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> SidePath:
        """Itself: nodes that copy a model's options shall not copy the tensors along."""
        return self

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        *others: Any,
        **keywords: Any,
    ) -> Tensor:
        """Run the model with the erasure; as the host calls its wrappers.

        Raises:
            ExactModeError: a layer is missing, or compiled code can't be switched off.
        """
        projections = Projections([c_crossattn, keywords.get("y")])
        with contextlib.ExitStack() as stack:
            stack.enter_context(_uncompiled())
            for name, key in self._keys.items():
                layer = _layer(executor.class_obj, key)
                hook = side_path_hook(name, lambda device: (self.on(device), projections))
                stack.callback(layer.register_forward_hook(hook).remove)
            return executor(x, t, c_concat, c_crossattn, *others, **keywords)

    def on(self, device: torch.device) -> LowRankEdit:
        """The edit, strength included, on a device; moved there once."""
        if device not in self._edits:
            with torch.inference_mode(False):
                self._edits[device] = self._edit.to(device)
        return self._edits[device]

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """Host key and ``s B R^T`` (out, width) of every matrix, float32 on the CPU."""
        for name, key in self._keys.items():
            yield key, self._edit.factors[name] @ self._edit.bases[name].T


def add_side_path(patcher, erasure: Erasure, keys: Mapping[str, str], strength: float) -> None:
    """Let the host's ModelPatcher run with an erasure beside its weights.

    Raises:
        ExactModeError: the host or its patcher has no wrappers.
    """
    if not hasattr(patcher, "add_wrapper_with_key"):
        raise ExactModeError(
            f"This model ({type(patcher).__name__}) can't carry an erasure beside its weights. "
            "Choose mode 'merge'."
        )
    side_path = SidePath(erasure, keys, strength)
    patcher.add_wrapper_with_key(WRAPPER_TYPE, WRAPPER_KEY + erasure.identity, side_path)


def side_paths(patcher) -> dict[str, list[SidePath]]:
    """The erasures beside a model's weights, by wrapper key, as the host's options hold them."""
    wrappers = getattr(patcher, "wrappers", {}).get(WRAPPER_TYPE, {})
    return {key: paths for key, paths in wrappers.items() if is_side_path(key)}


def is_side_path(key: str | None) -> bool:
    """Whether a wrapper of this key is one of ours."""
    return key is not None and key.startswith(WRAPPER_KEY)


def _layer(model: nn.Module, key: str) -> nn.Module:
    try:
        return model.get_submodule(key.removesuffix(".weight"))
    except AttributeError as error:
        raise ExactModeError(
            f"The model that is run has no layer {key.removesuffix('.weight')!r} ({error}); "
            "another node has replaced it. Choose mode 'merge' in Apply Erased UNet."
        ) from error


def _uncompiled() -> contextlib.AbstractContextManager:
    """Run compiled models as they were written: compiled code doesn't notice new hooks."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()  # nothing can have been compiled
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None:
        raise ExactModeError(
            f"torch.compile is in use, and PyTorch {torch.__version__} can't leave compiled code "
            "aside for a while. Choose mode 'merge' in Apply Erased UNet, or PyTorch 2.6 or newer."
        )
    return set_stance("force_eager")
