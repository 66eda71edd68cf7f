"""Models with an erasure in their weights, written whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..erase_core.artefact.erasure import Erasure
from ..erase_core.artefact.formats import concept_list
from .networks import PipelineError, original_name

MARK = "concept_surgery_merged"
_BLOCK = re.compile(r"lora_unet_(down|up)_blocks_(\d+)_attentions_(\d+)_(\w+)")
_MIDDLE = "lora_unet_mid_block_attentions_0_"
_BEFORE = ("model.diffusion_model.", "")


def merge_into_file(erasure: Erasure, checkpoint: Path, path: Path, strength: float = 1.0) -> None:
    """Write a checkpoint again with an erasure in it; all else is copied as it is.

    Args:
        checkpoint: a single file with the original code's names, as ComfyUI and Automatic1111 use.
        path: of the new file.

    Raises:
        PipelineError: the checkpoint can't be read, lacks matrices of the erasure or has them in
            another shape or packed; or ``path`` is there already or can't be written.
    """
    try:
        with safe_open(str(checkpoint), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise PipelineError(f"{str(checkpoint)!r} can't be read: {error}.") from error
    for name, key in _keys(erasure, tensors).items():
        weight, change = tensors[key], strength * erasure.delta(name)
        if weight.shape != change.shape or weight.element_size() < 2:
            raise PipelineError(
                f"{key} of {checkpoint.name!r} is {tuple(weight.shape)} in {weight.dtype}, and the "
                f"erasure of {erasure.concept!r} changes {tuple(change.shape)} numbers of 16 or "
                "more bits. Merge it into the kind of model that it was made for, unquantised."
            )
        tensors[key] = (weight.float() + change).to(weight.dtype)
    metadata[MARK] = f"{concept_list(erasure.record)} at strength {strength:g}"
    write_new(path, lambda place: save_file(tensors, place, metadata=metadata))


def write_new(path: Path, write: Callable[[Path], None]) -> None:
    """Let something be written under a temporary name and give it its own if nothing has that.

    Args:
        write: writes a file or a folder.

    Raises:
        PipelineError: the name is taken, or nothing can be written there; nothing is left behind.
    """
    taken = f"{str(path)!r} is there already. Choose another name."
    if os.path.lexists(path):
        raise PipelineError(taken)
    try:
        with tempfile.TemporaryDirectory(prefix=".concept-surgery-", dir=path.parent) as folder:
            place = Path(folder) / path.name
            write(place)
            if place.is_dir():
                os.mkdir(path)  # fails where there is something; an empty folder is replaced
                os.replace(place, path)
            else:
                os.link(place, path)
    except FileExistsError as error:
        raise PipelineError(taken) from error
    except (OSError, SafetensorError) as error:
        raise PipelineError(f"{str(path)!r} can't be written: {error}.") from error


def _keys(erasure: Erasure, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The checkpoint's keys of an erasure's matrices.

    Raises:
        PipelineError: some aren't there.
    """
    known: dict[str, str] = {}
    for key in tensors:
        for before in _BEFORE:
            if key.startswith(before) and key.endswith(".weight"):
                plain = key.removeprefix(before).removesuffix(".weight")
                known.setdefault(f"lora_unet_{plain.replace('.', '_')}", key)
    per_level = _per_level(known)
    found = {name: known.get(_original(name, per_level)) for name in erasure.factors}
    missing = [name for name, key in found.items() if key is None]
    if missing:
        raise PipelineError(
            f"The erasure of {erasure.concept!r} is for {erasure.record['family']}; this "
            f"checkpoint lacks {len(missing)} of its {len(found)} matrices, for example "
            f"{missing[0]}. Name the kind of model that it was made for."
        )
    return {name: key for name, key in found.items() if key is not None}


def _original(name: str, per_level: int) -> str:
    """The name in the original code of a matrix that is named after diffusers' blocks."""
    block = _BLOCK.fullmatch(name)
    if block:
        way, level, place, rest = block.groups()
        return original_name(f"{way}_blocks.{level}.attentions.{place}.{rest}", per_level)
    if name.startswith(_MIDDLE):
        return f"lora_unet_middle_block_1_{name.removeprefix(_MIDDLE)}"
    return name


def _per_level(known: Mapping[str, str]) -> int:
    """Blocks of each level of a U-Net: as many as come before it first gets smaller."""
    numbers = [
        int(n) for name in known for n in re.findall(r"^lora_unet_input_blocks_(\d+)_", name)
    ]
    smaller = [int(n) for name in known for n in re.findall(r"_input_blocks_(\d+)_0_op$", name)]
    return min(smaller) - 1 if smaller else max(numbers, default=0)
