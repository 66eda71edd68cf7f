"""From trained weights to committed ones, and from those to a file for the host.

``python -m benchmarks.flow.build`` writes ``weights/flow.safetensors`` from the last snapshot,
large tensors as whole numbers of 8 bits with a scale for each row. ``... build expand`` writes
``transformer.safetensors`` and ``text_encoder.safetensors`` into ``build/flow``, named as the host
names them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.emoji.loop import load
from benchmarks.flow.network import Network
from benchmarks.flow.text import table
from benchmarks.flow.words import FOLDER
from benchmarks.icons.build import made_small, unpack

WEIGHTS = Path(__file__).parent / "weights" / "flow.safetensors"
AVERAGE = FOLDER / "average.pt"
TRANSFORMER, TEXT_ENCODER = (
    FOLDER / f"{name}.safetensors" for name in ("transformer", "text_encoder")
)
_EXACT = ("patches.", "text.rows")  # few numbers, or numbers that are names


def pack(path: Path = WEIGHTS) -> Path:
    """Write what was trained, made small."""
    state = load(AVERAGE)
    if state is None:
        raise FileNotFoundError(f"no snapshot in {AVERAGE}: train first")
    small = made_small(state["network"], _EXACT)
    small["text.rows"] = state["network"]["text.rows"].int()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    save_file({name: value.cpu().contiguous() for name, value in small.items()}, partial)
    partial.replace(path)
    return path


def packed_network(path: Path = WEIGHTS) -> Network:
    """The committed one, frozen, on the CPU."""
    return filled_network(unpack(load_file(path)))


def filled_network(tensors: Mapping[str, torch.Tensor]) -> Network:
    """A frozen network with these weights."""
    tensors = dict(tensors)
    rows = tensors.pop("text.rows").long()
    network = Network(rows.tolist())
    missing = network.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys and missing.missing_keys == ["text.rows"], missing
    return network.eval().requires_grad_(False)


def host_weights(network: Network) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The transformer's and the text encoder's, named as the host names them."""
    words = table()
    words[network.text.rows] = network.text.words
    text = {f"model.{name}": value for name, value in network.text.model.state_dict().items()}
    return dict(network.transformer.state_dict()), text | {"model.embed_tokens.weight": words}


def expand(path: Path = WEIGHTS) -> tuple[Path, Path]:
    """Write the two files for the host (17 and 81 MB); those that are there stay."""
    if not (TRANSFORMER.exists() and TEXT_ENCODER.exists()):
        FOLDER.mkdir(parents=True, exist_ok=True)
        parts = host_weights(packed_network(path))
        for to, weights in zip((TRANSFORMER, TEXT_ENCODER), parts, strict=True):
            partial = to.with_name(f".{to.name}.part")
            save_file({name: value.contiguous() for name, value in weights.items()}, partial)
            partial.replace(to)
    return TRANSFORMER, TEXT_ENCODER


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("pack", "expand"), default="pack")
    print(pack() if parser.parse_args().what == "pack" else expand())
