"""The same erasure and the same pictures in the real ComfyUI, to compare with."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from benchmarks.emoji.build import build_emoji_checkpoint
from tools import graphs
from tools.environment import BUILD
from tools.host import ComfyHost

# What is trained in each host: quick, yet with everything that a real one has.
TRAINING: dict[str, Any] = {
    "erase": "cat",
    "replace_with": "rabbit",
    "keep": "a photo of a dog",
    "preset": "balanced",
    "training_seed": 7,
    "resolution": 64,
    "captions": 200,
}
PROMPTS = ("a photo of a cat", "the flat cat", "a photo of a dog", "a tiger, ink", "a red apple")
PICTURE: dict[str, Any] = {"seed": 7, "steps": 12, "cfg": 5.0, "size": 64}
_TIMEOUT = 1800.0


@dataclass(frozen=True)
class ComfySide:
    """A trained file, and pictures by strength (0 and 1) and prompt, in 0..255."""

    file: Path
    pictures: dict[tuple[int, str], np.ndarray]


def run_comfy(work: Path) -> ComfySide:
    """Train, save and draw in a ComfyUI of its own; what ``work`` already holds is taken."""
    kept = work / "pictures.npz"
    if not kept.exists():
        _run(work, kept)
    with np.load(kept) as arrays:
        pictures = {(s, t): arrays[f"{s} {t}"] for s in (0, 1) for t in PROMPTS}
        return ComfySide(Path(str(arrays["trained"])), pictures)


def _run(work: Path, kept: Path) -> None:
    checkpoint = build_emoji_checkpoint(BUILD / "checkpoints" / "emoji.safetensors")
    graph = (
        graphs.loader(checkpoint.name)
        | graphs.train(stored_result="train again", **TRAINING)
        | graphs.save(filename="cat")
        | graphs.show("path", ("save", 0))
        | graphs.apply()
    )
    names = {}
    for strength, model in ((0, "loader"), (1, "apply")):
        for number, text in enumerate(PROMPTS):
            names[strength, text] = name = f"p{strength}{number}"
            graph |= graphs.picture(name, text, model=(model, 0), **PICTURE)
    with ComfyHost(work, checkpoints=[checkpoint]) as host:
        outputs = host.run(graph, _TIMEOUT)["outputs"]
        drawn = {f"{s} {t}": _picture(host, outputs[name]) for (s, t), name in names.items()}
    np.savez(kept, trained=outputs["path"]["text"][0], **drawn)


def changes(path: Path) -> dict[str, np.ndarray]:
    """The change of each matrix that a file holds, ``up @ down`` times ``alpha / rank``."""
    values = load_file(path)
    found = {}
    for name in sorted(key[: -len(".lora_up.weight")] for key in values if ".lora_up" in key):
        up, down = values[f"{name}.lora_up.weight"], values[f"{name}.lora_down.weight"]
        scale = float(values[f"{name}.alpha"]) / down.shape[0]
        found[name] = scale * (up.double().flatten(1) @ down.double().flatten(1)).numpy()
    return found


def apart(a: Path, b: Path) -> float:
    """How far the changes of two files are apart, as a share of the first; the worst matrix."""
    first, second = changes(a), changes(b)
    if first.keys() != second.keys():
        raise ValueError(f"{a} and {b} don't change the same matrices")
    norm = np.linalg.norm
    return max(float(norm(first[n] - second[n]) / norm(first[n])) for n in first)


def _picture(host: ComfyHost, output: dict[str, Any]) -> np.ndarray:
    picture = Image.open(io.BytesIO(host.image(output["images"][0])))
    return np.asarray(picture.convert("RGB")).astype(np.float32)
