"""The network of a pipeline: where it is, which family it is of, what its layers are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..erase_core.settings.families import FLUX, SD1, SD2, SD2_V, SD3, SDXL, Family, generic

_PREFIX = "lora_unet_"
_CLASSES = {"SD3Transformer2DModel": SD3, "FluxTransformer2DModel": FLUX}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)")
_INSIDE = re.compile(r"\.(base_layer|lora_[AB]\.\w+)$")  # of a layer that carries LoRAs
_SD2_WIDTH = 1024  # of its text encoder


class PipelineError(ValueError):
    """A pipeline, a folder or an erasure that can't be worked on as it is, and what to do."""


def slot_of(pipe: Any) -> str:
    """The name that a pipeline has for its network."""
    return "unet" if getattr(pipe, "transformer", None) is None else "transformer"


def network_of(pipe: Any) -> Any:  # a module of diffusers
    """The network itself, also where it was compiled."""
    network = getattr(pipe, slot_of(pipe), None)
    return getattr(network, "_orig_mod", network)


def family_of(pipe: Any) -> Family:
    """The family of a pipeline's network; a generic one where it isn't among those known."""
    network = network_of(pipe)
    known = _CLASSES.get(type(network).__name__)
    if known or type(network).__name__ != "UNet2DConditionModel":
        return known or generic(type(network).__name__)
    added = network.config.get("addition_embed_type")
    if added:
        return SDXL if added == "text_time" else generic(f"U-Net with {added}")
    if network.config.cross_attention_dim != _SD2_WIDTH:
        return SD1
    return SD2_V if pipe.scheduler.config.get("prediction_type") == "v_prediction" else SD2


def linear_layers(network: Any, family: Family) -> dict[str, nn.Linear]:
    """The linear layers of a network by the kohya name that the family's files have for them.

    What SDXL's files have no name for is left out. Other layers that a family doesn't name are
    called by their place in the network.
    """
    linear = {
        path: layer
        for path, layer in network.named_modules()
        if isinstance(getattr(layer, "base_layer", layer), nn.Linear) and not _INSIDE.search(path)
    }
    if family is SDXL:
        per_level = network.config.layers_per_block
        named = {path: original_name(path, per_level) for path in linear}
    else:
        named = {path: plain_name(path) for path in linear}
        for kohya, theirs in (family.diffusers_names or {}).items():
            named[theirs.partition(".")[2]] = kohya
    return {named[path]: layer for path, layer in linear.items() if named[path]}


def plain_name(path: str) -> str:
    """The kohya name of a layer that is called by its place in diffusers' network."""
    return _PREFIX + path.replace(".", "_")


def original_name(path: str, per_level: Any, separator: str = "_") -> str:
    """The name of a U-Net's layer in the original code, as kohya's; "" where none is known.

    Args:
        path: in diffusers' network.
        per_level: how many blocks each level has on the way down; a number for all or one each.
        separator: what stands between the parts; with "." it is the key in a checkpoint.
    """
    pooled = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    found = pooled.get(path, "")
    if path.startswith("mid_block.attentions.0."):
        found = "middle_block.1." + path.removeprefix("mid_block.attentions.0.")
    block = _BLOCK.fullmatch(path)
    if block:
        way, level, place, rest = block[1], int(block[2]), int(block[3]), block[4]
        counts = [per_level] * (level + 1) if isinstance(per_level, int) else list(per_level)
        if way == "up" and not isinstance(per_level, int):
            counts = counts[::-1]
        before = sum(count + 1 for count in counts[:level]) + place
        found = (
            f"input_blocks.{before + 1}.1.{rest}"
            if way == "down"
            else (f"output_blocks.{before}.1.{rest}")
        )
    return _PREFIX * (separator == "_") + found.replace(".", separator) if found else ""


def unnamed_layers(network: nn.Module, family: Family, names: Mapping[str, Any]) -> list[str]:
    """Places of the layers that neither the family nor kohya has a name for, sorted."""
    if family.diffusers_names == {}:
        return []
    known = family.diffusers_names or {}
    paths = {plain_name(path): path for path, _ in network.named_modules()}
    return sorted(paths[name] for name in names if name not in known)
