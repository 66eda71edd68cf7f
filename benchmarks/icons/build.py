"""From trained weights to committed ones: ``python -m benchmarks.icons.build``.

Writes ``weights/icons.safetensors`` from ``build/icons/average.pt``, large tensors as whole numbers
of 8 bits with a scale for each row, and puts the judge beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.emoji.build import SMALLEST, quantise, restore
from benchmarks.emoji.loop import load
from benchmarks.icons.classifier import COMMITTED as COMMITTED_JUDGE
from benchmarks.icons.classifier import PATH as JUDGE
from benchmarks.icons.network import Network
from benchmarks.icons.train import AVERAGE, filled_network

WEIGHTS = Path(__file__).parent / "weights" / "icons.safetensors"
BITS = 8
_EXACT = "patches."  # few numbers that every picture goes through


def pack(path: Path = WEIGHTS) -> Path:
    """Write what was trained, made small, and the judge beside it."""
    state = load(AVERAGE)
    if state is None:
        raise FileNotFoundError(f"no snapshot in {AVERAGE}: train first")
    small = made_small(state["network"], (_EXACT,))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    save_file({name: value.cpu().contiguous() for name, value in small.items()}, partial)
    partial.replace(path)
    if JUDGE.exists():
        shutil.copyfile(JUDGE, path.with_name(COMMITTED_JUDGE.name))
    return path


def made_small(
    tensors: Mapping[str, torch.Tensor], exact: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Weights in whole numbers or half precision, to be read again by :func:`unpack`.

    Args:
        exact: how the names of those begin that stay as they are.
    """
    small: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name.startswith(exact):
            small[name] = value.float()
        elif value.dim() > 1 and value.numel() >= SMALLEST:
            small |= quantise(name, value.cpu(), BITS)
        else:
            small[name] = value.half()
    return small


def unpack(small: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The way back from :func:`pack`."""
    tensors = {}
    for key, value in small.items():
        if key.endswith(":numbers"):
            name = key.removesuffix(":numbers")
            tensors[name] = restore(name, small, BITS)
        elif not key.endswith((":scale", ":shape")):
            tensors[key] = value.float()
    return tensors


def packed_network(path: Path = WEIGHTS) -> Network:
    """The committed one, frozen, on the CPU."""
    return filled_network(unpack(load_file(path)))


if __name__ == "__main__":
    print(pack())
