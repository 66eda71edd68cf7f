"""An erasure on a pipeline: beside its weights, which stay as they are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..erase_core.artefact.erasure import Erasure as CoreErasure
from ..erase_core.artefact.fit import (
    is_of_encoder,
    other_base_warning,
    other_encoder_warning,
)
from ..erase_core.artefact.stack import (
    EXACT,
    STRONGEST,
    AppliedErasure,
    applied_twice_problem,
    overlap_warnings,
)
from ..erase_core.files.fingerprint import fingerprint, same_fingerprint
from ..erase_core.model.low_rank import LowRankEdit, Projections, side_path_hook
from ..erase_core.model.twin import twin_network
from ..erase_core.settings.layers import LayerRuleError, known_by_name, matching, reads_prompt
from ..erase_core.settings.settings import EraseSettings
from .networks import PipelineError, family_of, linear_layers, network_of, slot_of

_APPLIED: WeakKeyDictionary[nn.Module, list[AppliedErasure]] = WeakKeyDictionary()


def applied_to(network: nn.Module) -> list[AppliedErasure]:
    """The erasures on a pipeline's network, in the order in which they were applied."""
    return _APPLIED.get(network, [])


class Applied:
    """An erasure while it is on a pipeline. It goes with :meth:`remove`, or at the end of ``with``.

    As long as it is on, the layers add ``s (x R) B^T`` to what they give.
    """

    def __init__(self, pipe: Any, erasure: CoreErasure, strength: float) -> None:
        layers = fitting_layers(pipe, erasure)
        _refuse_strength(strength)
        self._network = network_of(pipe)
        _refuse_compiled(pipe, self._network)
        before = applied_to(self._network)
        problem = applied_twice_problem(before, erasure, _loras(layers))
        if problem:
            raise PipelineError(problem)
        for text in [*base_warnings(pipe, erasure), *overlap_warnings(before, erasure)]:
            warnings.warn(text, stacklevel=4)
        self._edits: dict[torch.device, LowRankEdit] = {}
        edit = erasure.edit()
        self._edit = LowRankEdit(
            edit.bases, {name: strength * factor for name, factor in edit.factors.items()}
        )
        self._note = AppliedErasure.of(erasure, EXACT, strength)
        self._handles = []
        if strength:
            _APPLIED[self._network] = [*before, self._note]
            self._handles = [
                layer.register_forward_hook(side_path_hook(name, self._active))
                for name, layer in layers.items()
            ]

    def _active(self, device: torch.device) -> tuple[LowRankEdit, Projections]:
        if device not in self._edits:
            self._edits[device] = self._edit.to(device)
        # Of its own for each layer: a tensor may hold other values in the next step.
        return self._edits[device], Projections()

    def remove(self) -> None:
        """Take it off again; a second time nothing happens."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        left = [one for one in applied_to(self._network) if one is not self._note]
        _APPLIED[self._network] = left

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def merged(pipe: Any, erasure: CoreErasure, strength: float) -> Any:
    """A pipeline with the erasure in its weights, which shares everything else with the given one.

    Raises:
        PipelineError: see :class:`Applied`; also a pipeline whose weights can't be added to.
    """
    from .refusals import refuse_unfit

    refuse_unfit(pipe)
    fitting_layers(pipe, erasure)
    _refuse_strength(strength)
    other, network = copy.copy(pipe), twin_network(network_of(pipe))
    for name, layer in _layers(network, pipe, erasure).items():
        weight = _weight(layer)
        change = strength * erasure.delta(name).to(weight.device)
        layer.weight = nn.Parameter((weight.float() + change).to(weight.dtype), False)
    vars(other)[slot_of(pipe)] = network
    return other


def fitting_layers(pipe: Any, erasure: CoreErasure) -> dict[str, nn.Linear]:
    """The layers of a pipeline's network that an erasure changes, by its names for them.

    Raises:
        PipelineError: the pipeline lacks some, or has them in another shape.
    """
    layers = _layers(network_of(pipe), pipe, erasure)
    record = erasure.record
    missing = [name for name in erasure.factors if name not in layers]
    if missing:
        raise PipelineError(
            f"The erasure of {erasure.concept!r} is for {record['family']} "
            f"({record['base']['name'] or 'unnamed model'}); this {type(pipe).__name__} lacks "
            f"{len(missing)} of its {len(erasure.factors)} matrices, for example {missing[0]}. "
            "Load the kind of model that it was made for."
        )
    for name, factor in erasure.factors.items():
        expected, weight = (len(factor), len(erasure.bases[name])), _weight(layers[name])
        if tuple(weight.shape) != expected and weight.is_floating_point():
            raise PipelineError(
                f"The erasure of {erasure.concept!r} has the shape {expected} at {name}, this "
                f"{type(pipe).__name__} {tuple(weight.shape)}. Load the kind of model that it was "
                "made for."
            )
    return layers


def misfits(pipe: Any, erasure: CoreErasure) -> list[str]:
    """What a person should know who puts an erasure on a pipeline; nothing if it was made on it.

    Raises:
        PipelineError: it doesn't fit at all.
    """
    from .calls import SMALL, ask

    layers = fitting_layers(pipe, erasure)
    found = base_warnings(pipe, erasure)
    null = ask(pipe, network_of(pipe), [""], SMALL).encoded()[0].tokens
    if not is_of_encoder(erasure, null):
        readers = {n: _weight(layer).detach().float().cpu() for n, layer in layers.items()}
        width = null.shape[1]
        readers = {n: w for n, w in readers.items() if reads_prompt(n) and w.shape[1] == width}
        found.append(other_encoder_warning(erasure, null, readers))
    return found


def base_warnings(pipe: Any, erasure: CoreErasure) -> list[str]:
    """That an erasure was made on another model than a pipeline's, where that is so."""
    family = family_of(pipe)
    layers = linear_layers(network_of(pipe), family)
    try:
        own = matching(layers, known_by_name(family.defaults.get("layers", EraseSettings.layers)))
    except LayerRuleError:
        own = []
    known = {name: _weight(layers[name]) for name in own}
    if not all(weight.ndim == 2 and weight.is_floating_point() for weight in known.values()):
        return []  # packed, so that there are no numbers to compare
    if same_fingerprint(erasure.record["base"]["fingerprint"], fingerprint(known)):
        return []
    return [other_base_warning(erasure, pipe.name_or_path or "")]


def _layers(network: Any, pipe: Any, erasure: CoreErasure) -> dict[str, nn.Linear]:
    every = linear_layers(network, family_of(pipe))
    return {name: every[name] for name in erasure.factors if name in every}


def _weight(layer: Any) -> Tensor:
    return getattr(layer, "base_layer", layer).weight


def _refuse_compiled(pipe: Any, network: nn.Module) -> None:
    """Compiled code doesn't notice new hooks: nothing would happen, in silence."""
    parts = network.modules()
    compiled = any(getattr(part, "_compiled_call_impl", None) is not None for part in parts)
    if compiled or getattr(pipe, slot_of(pipe)) is not network:
        raise PipelineError(
            f"The network of this {type(pipe).__name__} is compiled, and would draw as before. "
            "Apply the erasure before you compile it, or use merged() and compile that."
        )


def _refuse_strength(strength: float) -> None:
    if not -STRONGEST <= strength <= STRONGEST:
        raise PipelineError(
            f"strength must be between {-STRONGEST:g} and {STRONGEST:g}, not {strength!r}."
        )


def _loras(layers: Mapping[str, Any]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """B (out, rank) and R (width, rank) of the LoRAs on a network's layers, by name."""
    found = {}
    for name, layer in layers.items():
        ups, downs = getattr(layer, "lora_B", {}), getattr(layer, "lora_A", {})
        both = [(ups[k].weight.detach(), downs[k].weight.detach()) for k in ups if k in downs]
        if both:
            found[name] = [
                (up.detach().float().cpu(), down.detach().float().cpu().T) for up, down in both
            ]
    return found
