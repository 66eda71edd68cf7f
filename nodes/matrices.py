"""Which matrices a model of the host has, under which names, and the numbers in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.lora
from torch import Tensor

from ..erase_core.files.fingerprint import PACKED_WITHIN, SAME_WITHIN, fingerprint, same_fingerprint
from ..erase_core.settings.layers import LayerRuleError, known_by_name, matching
from ..erase_core.settings.settings import EraseSettings
from .families import model_family
from .packed import as_numbers, is_packed, unpatched


def kohya_keys(model) -> dict[str, str]:
    """Host keys of the model's weights by every LoRA name that the host knows for them."""
    return comfy.lora.model_lora_keys_unet(model.model, {})


def original_weights(model, keys: Mapping[str, str]) -> dict[str, Tensor]:
    """The unpatched weights behind host keys, by name; loaded patches are looked through."""
    found = {}
    for name, key in keys.items():
        module = model.model.get_submodule(key.removesuffix(".weight"))
        weight = model.backup[key].weight if key in model.backup else module.weight
        found[name] = as_numbers(module, unpatched(weight))
    return found


def has_packed_weights(model) -> bool:
    """Whether some of the network's weights are kept as packed bytes, as GGUF files do."""
    return any(is_packed(weight) for weight in model.model.diffusion_model.parameters())


def trained_keys(model, layers: str | None = None) -> dict[str, str]:
    """Host keys of the matrices that train, by kohya name.

    They are those that a layer rule takes, None for the family's own, and the one that reads the
    pooled vector.

    Raises:
        LayerRuleError: the rule matches nothing.
    """
    keys, family = kohya_keys(model), model_family(model)
    taken = _keys_by_rule(model, layers)
    if family.pooled_matrix in keys:
        taken[family.pooled_matrix] = keys[family.pooled_matrix]
    return taken


def _keys_by_rule(model, layers: str | None = None) -> dict[str, str]:
    """Host keys of the matrices that a layer rule takes, by kohya name; None is the family's own.

    Raises:
        LayerRuleError: the rule matches nothing.
    """
    keys, family = matrix_keys(model), model_family(model)
    rule = layers or family.defaults.get("layers", EraseSettings.layers)
    return {name: keys[name] for name in matching(keys, known_by_name(rule))}


def matrix_keys(model) -> dict[str, str]:
    """Host keys of all matrices by the kohya name that the model's family has for them.

    In the order of the names: the host's own is another in every process, as it lists a set.
    """
    weights, family = model.model.state_dict(), model_family(model)
    keys = {
        name: key
        for name, key in kohya_keys(model).items()
        if name.startswith(family.matrix_names) and key in weights and weights[key].ndim == 2
    }
    # A host may know several names for one matrix; the first is the one made from its key.
    first = {key: name for name, key in reversed(keys.items())}
    return {name: key for name, key in sorted((name, key) for key, name in first.items())}


def editable_keys(model) -> dict[str, str]:
    """Host keys of all matrices that may be edited, by the name that the family has for them."""
    keys, family = kohya_keys(model), model_family(model)
    found = matrix_keys(model)
    if family.pooled_matrix in keys:
        found[family.pooled_matrix] = keys[family.pooled_matrix]
    return found


def known_matrices(model) -> dict[str, Tensor]:
    """The unpatched matrices that a family is recognised by, by kohya name.

    They are those that its own layer rule takes, or all where that takes none.
    """
    try:
        keys = _keys_by_rule(model)
    except LayerRuleError:
        keys = matrix_keys(model)
    return original_weights(model, keys)


def base_fingerprint(model) -> list[float]:
    """Fingerprint of the unpatched matrices that an erasure changes."""
    return fingerprint(known_matrices(model))


def is_base_of(model, record: Mapping[str, Any]) -> bool:
    """Whether an erasure was made on this model, by its record, whatever is patched onto it."""
    within = PACKED_WITHIN if has_packed_weights(model) else SAME_WITHIN
    return same_fingerprint(record["base"]["fingerprint"], base_fingerprint(model), within)
