"""Recognising the host's MODEL again after a restart: everything that training sees of it."""

from __future__ import annotations

import inspect
import logging
import re
import uuid
from collections.abc import Collection, Iterable, Mapping
from types import FunctionType
from typing import Any

import comfy.utils
import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

from ..erase_core.artefact.identity import Digest, bytes_on_cpu, middle_bytes, word_sums
from .exact import side_paths
from .packed import contents, is_plain

SAMPLING = "model_sampling"

# Of a weight that is not trained, a few kilobytes from its middle: another checkpoint, or a merge
# of two, differs everywhere. Reading all of a large model would take longer than is worth it.
SAMPLED_BYTES = 4096
DEEPEST = 8


def model_identity(model, trained: Collection[str]) -> str:
    """A name for what training sees of the host's model; the same whenever it is loaded again.

    The matrices that are trained count byte for byte as they were before patching, the other
    weights by a sample. To them come the patches with their strengths, erasures beside the
    weights, the sampling object and other replaced parts. Whatever has no content that can be
    read makes the name one of a kind, so that nothing wrong is found under it; the log says what
    it was.

    Args:
        model: the host's ModelPatcher, loaded or not.
        trained: host keys of the matrices that are trained.
    """
    content, trained = _Content(), frozenset(trained)
    with torch.inference_mode():  # a loader's weights are inference tensors
        content.network(model, trained)
        content.patches(model, trained)
        content.parts(model)
    if content.unknown:
        logging.warning(
            "Concept Surgery: what upstream nodes put on the model (%s) can't be recognised "
            "again. The result will be stored, but not found a second time.",
            ", ".join(sorted(content.unknown)),
        )
    return content.hexdigest()


class _Content:
    """Collects labels and tensors; the tensors' bytes are fetched at the end, all at once."""

    def __init__(self) -> None:
        self.unknown: set[str] = set()
        self._parts: list[tuple[str, Tensor | None]] = []

    def network(self, model, trained: Collection[str]) -> None:
        """The unpatched weights; a model that is loaded has them in its backup."""
        inner = model.model
        self._say("network", *map(_type_name, (inner, inner.model_config, inner.latent_format)))
        self._say("precision", inner.get_dtype(), _object(model, "manual_cast_dtype"))
        state = inner.state_dict()
        for key in sorted(state):
            if not key.startswith(SAMPLING) and not _is_part_of_another(inner, key):
                kept = model.backup.get(key)
                weight = _itself(inner, key, state[key]) if kept is None else kept.weight
                if weight is None:
                    self._say(key, "counted only", tuple(state[key].shape))
                else:
                    self._tensor(key, weight, key in trained)

    def patches(self, model, trained: Collection[str]) -> None:
        """Weight patches with their strengths. Not the host's uuids: they are random."""
        for key in sorted(model.patches):
            self._value(f"patch {key}", model.patches[key], key in trained)

    def parts(self, model) -> None:
        """The sampling object, other replaced parts, and what else acts on the weights."""
        self._value(SAMPLING, _object(model, SAMPLING), whole=True)
        replaced = {k: v for k, v in model.object_patches.items() if k != SAMPLING}
        self._value("replaced", replaced)
        self._value("wrapped", model.weight_wrapper_patches)
        self._value("injected", model.injections)
        self._value("hooks", getattr(model, "forced_hooks", None))
        for key, paths in sorted(side_paths(model).items()):
            edits = [path.on(torch.device("cpu")) for path in paths]
            self._value(key, [(edit.bases, edit.factors) for edit in edits], whole=True)

    def hexdigest(self) -> str:
        """The digest of everything collected."""
        digest = Digest()
        data = iter(bytes_on_cpu([part for _, part in self._parts if part is not None]))
        for label, part in self._parts:
            digest.add(label, b"" if part is None else next(data))
        return digest.hexdigest()

    def _say(self, *words: Any) -> None:
        self._parts.append((repr([str(word) for word in words]), None))

    def _tensor(self, label: str, tensor: Tensor, whole: bool) -> None:
        if not is_plain(tensor):
            self._packed(label, tensor, whole)
            return
        self._say(label, tensor.dtype, tuple(tensor.shape))
        part = word_sums(tensor) if whole else middle_bytes(tensor, SAMPLED_BYTES)
        self._parts.append(("bytes", part))

    def _packed(self, label: str, tensor: Tensor, whole: bool) -> None:
        """Numbers in a tensor class of their own: what they are unpacked from."""
        parts = contents(tensor)
        if parts is None:
            self._mark_unknown(label, tensor)
            return
        self._say(label, _type_name(tensor), tensor.dtype, tuple(tensor.shape))
        self._value("packed", parts, whole)

    def _value(self, label: str, value: Any, whole: bool = False, depth: int = 0) -> None:
        """Any value by its content."""
        if isinstance(value, Tensor):
            self._tensor(label, value, whole)
        elif value is None or isinstance(value, bool | int | float | str | torch.dtype):
            self._say(label, type(value).__name__, repr(value))
        elif depth == DEEPEST:
            self._mark_unknown(label, value)
        else:
            self._many(label, value, whole, depth + 1)

    def _many(self, label: str, value: Any, whole: bool, depth: int) -> None:
        """A value that consists of others."""
        members = _members(value)
        if members is None:
            self._mark_unknown(label, value)
            return
        kind, items = members
        self._say(label, kind)
        for name, item in items:
            self._value(str(name), item, whole, depth)
        self._say("end")

    def _mark_unknown(self, label: str, value: Any) -> None:
        self.unknown.add(_type_name(value))
        self._say(label, "unknown", uuid.uuid4())


def _members(value: Any) -> tuple[str, Iterable[tuple[Any, Any]]] | None:
    """What kind of collection a value is and its items by name; None if it can't be told."""
    if isinstance(value, Mapping):
        return "mapping", sorted(value.items(), key=lambda item: repr(item[0]))
    if isinstance(value, list | tuple):
        return "list", enumerate(value)
    if isinstance(value, WeightAdapterBase):
        return _type_name(value), enumerate(value.weights)
    if isinstance(value, nn.Module):
        return _module_members(value)
    if inspect.ismethod(value):
        owner = value.__self__
        kept = _type_name(owner) if isinstance(owner, nn.Module) else owner
        return "method", [("function", value.__func__), ("of", kept)]
    if inspect.isfunction(value):
        return _function_members(value)
    if inspect.isclass(value):
        return f"class {_name(value)}", ()
    return None


def _function_members(function: FunctionType) -> tuple[str, Iterable[tuple[Any, Any]]] | None:
    """Where a function was written, and the values it was made with."""
    try:
        kept = inspect.getclosurevars(function).nonlocals
    except ValueError:  # one of its variables has no value yet
        return None
    defaults = {"defaults": function.__defaults__, "named": function.__kwdefaults__}
    name = f"function {_name(function)}:{function.__code__.co_firstlineno}"
    return name, [*kept.items(), *defaults.items()]


def _module_members(module: nn.Module) -> tuple[str, Iterable[tuple[Any, Any]]]:
    """A module's classes (nodes build theirs from others under one name), values and tensors."""
    classes = " ".join(map(_name, type(module).__mro__))
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
    }
    return classes, sorted({**own, **module.state_dict()}.items())


def _itself(network: nn.Module, key: str, weight: Tensor) -> Tensor | None:
    """The weight behind an entry of a state dict; None for one that no layer has.

    Packs whose weights are no plain tensors put placeholders without content into it, so that the
    host knows the size; layers of hosts that pack weights put the bytes alone into it.
    """
    own = _attribute(network, key)
    if weight.device.type == "meta":
        return own
    return weight if own is None or is_plain(own) else own


def _is_part_of_another(network: nn.Module, key: str) -> bool:
    """Whether an entry of a state dict is noted beside a packed weight, which has it itself.

    Such as the scale of a patched weight, while the unpatched one lies in the backup with its own.
    """
    layer = key.rpartition(".")[0]
    weight = _attribute(network, f"{layer}.weight")
    if not isinstance(weight, Tensor) or is_plain(weight):
        return False
    return _attribute(network, key) is None


def _attribute(network: nn.Module, key: str) -> Any:
    try:
        return comfy.utils.get_attr(network, key)
    except AttributeError:
        return None


def _object(model, name: str) -> Any:
    """A part of the model with object patches looked at; None where the host has no such part."""
    try:
        return model.get_model_object(name)
    except AttributeError:
        return None


def _type_name(value: Any) -> str:
    return _name(type(value))


def _name(thing: Any) -> str:
    """Module and name of a class or function; the host names some modules by their path."""
    module = re.split(r"\W", thing.__module__)[-1]
    return f"{module}.{thing.__qualname__}"
