"""The kohya LoRA names of a network's matrices, as every program that reads LoRAs knows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ..erase_core.settings.families import Family
from ..erase_core.settings.layers import known_by_name, matching
from ..erase_core.settings.settings import EraseSettings

PREFIX = "lora_unet_"
MATRIX = 2  # dimensions of one
# diffusers' names of the parts of a residual block, by where they lie in the original code.
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def matrix_paths(network: nn.Module, family: Family) -> dict[str, str]:
    """Paths of the network's matrices by the name that its family's LoRA files have for them.

    Hosts have linear layers of classes of their own, so a layer is one that has a matrix.
    """
    paths = [
        path
        for path, module in network.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == MATRIX
        and not isinstance(module, nn.Embedding)
    ]
    diffusers = dict(_diffusers_blocks(network)) if _named_after_diffusers(family) else {}
    named = {_name(path, diffusers): path for path in paths}
    return {name: path for name, path in named.items() if name.startswith(family.matrix_names)}


def trained_paths(network: nn.Module, family: Family, layers: str | None = None) -> dict[str, str]:
    """Paths of the matrices that train: those of a layer rule, and the reader of a pooled vector.

    Args:
        layers: a layer rule; None for the family's own. In place of one that needs predictions
            there are those that are known by name.

    Raises:
        LayerRuleError: the rule matches nothing.
    """
    paths = matrix_paths(network, family)
    rule = layers or family.defaults.get("layers", EraseSettings.layers)
    taken = {name: paths[name] for name in matching(paths, known_by_name(rule))}
    # It is no block, so it isn't named like one.
    reader = _path_of_pooled(network, family)
    return {**taken, family.pooled_matrix: reader} if reader else taken


def _path_of_pooled(network: nn.Module, family: Family) -> str:
    """Path of the matrix that reads the pooled vector; "" where there is none."""
    if not family.pooled_matrix:
        return ""
    names = {_name(path, {}): path for path, _ in network.named_modules()}
    return names.get(family.pooled_matrix, "")


def _named_after_diffusers(family: Family) -> bool:
    return any(name.startswith(f"{PREFIX}down_blocks_") for name in family.matrix_names)


def _name(path: str, blocks: Mapping[str, str]) -> str:
    parts = path.split(".")
    for length in (3, 2):  # "input_blocks.1.0" and "middle_block.1" are layers of a block
        layer, rest = ".".join(parts[:length]), ".".join(parts[length:])
        if layer in blocks:
            path = f"{blocks[layer]}.{_RESNET.get(rest, rest)}"
            break
    return PREFIX + path.replace(".", "_")


def _diffusers_blocks(network: nn.Module) -> Iterator[tuple[str, str]]:
    """diffusers' place of each layer of a U-Net, by its path in the original code."""
    yield from _side(network, "input_blocks", "down_blocks", "downsamplers_0")
    yield from _side(network, "output_blocks", "up_blocks", "upsamplers_0")
    counts = {"resnets": 0, "attentions": 0}
    for number, layer in enumerate(_children(network, "middle_block")):
        kind = _kind(layer)
        yield f"middle_block.{number}", f"mid_block.{kind}.{counts[kind]}"
        counts[kind] += 1


def _side(network: nn.Module, side: str, place: str, sampler: str) -> Iterator[tuple[str, str]]:
    level = block = 0
    for number, layers in enumerate(_children(network, side)):
        for position, layer in enumerate(layers.children()):
            kind, path = _kind(layer), f"{side}.{number}.{position}"
            if kind:
                yield path, f"{place}.{level}.{kind}.{block}"
            elif type(layer).__name__ in ("Upsample", "Downsample"):
                yield path, f"{place}.{level}.{sampler.replace('_', '.')}"
        kinds = [type(layer).__name__ for layer in layers.children()]
        if "Upsample" in kinds or "Downsample" in kinds:
            level, block = level + 1, 0
        elif any(map(_kind, layers.children())):
            block += 1


def _children(network: nn.Module, name: str) -> Iterator[nn.Module]:
    yield from getattr(network, name, nn.Identity()).children()


def _kind(layer: nn.Module) -> str:
    """What diffusers counts a layer among; "" for one that is neither."""
    if hasattr(layer, "in_layers"):
        return "resnets"
    return "attentions" if hasattr(layer, "transformer_blocks") else ""
