"""From trained parts to committed weights, and from those to a checkpoint for the host.

``python -m benchmarks.emoji.build pack`` writes ``weights/emoji.safetensors`` from what lies in
``build/emoji``; :func:`build_emoji_checkpoint` expands that file. Matrices are kept as whole
numbers of 6 or 8 bits with one scale for each row. What comes from a seed or is zero isn't kept.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from benchmarks.emoji.autoencoder import LATENT_SCALE, Autoencoder, load_autoencoder
from benchmarks.emoji.autoencoder import PATH as AUTOENCODER
from benchmarks.emoji.classifier import COMMITTED as COMMITTED_JUDGE
from benchmarks.emoji.classifier import PATH as JUDGE
from benchmarks.emoji.data import FOLDER
from benchmarks.emoji.loop import load, save
from benchmarks.emoji.text import (
    HIDDEN,
    LAYERS,
    POSITIONS,
    REAL_LAYERS,
    TAUGHT,
    WIDTH,
    TextEncoder,
    load_text_encoder,
)
from benchmarks.emoji.text import PATH as TEXT
from benchmarks.emoji.unet import AVERAGE, STATE

WEIGHTS = Path(__file__).parent / "weights" / "emoji.safetensors"
CHECKPOINT = FOLDER / "emoji.safetensors"
BITS = {"unet": 6, "text": 8, "autoencoder": 8}
SMALLEST = 2048  # entries; smaller tensors and vectors stay in half precision
# Of a row's largest value: what is tried as the largest that is represented.
_CEILINGS = (1.0, 0.9, 0.8, 0.7, 0.6)
_LABEL = "emoji_weights"

Tensors = Mapping[str, torch.Tensor]


def build_emoji_checkpoint(path: Path, weights: Path = WEIGHTS) -> Path:
    """Write the checkpoint unless ``path`` already holds this very one, and return ``path``."""
    path, digest = Path(path), hashlib.sha256(weights.read_bytes()).hexdigest()
    if _read_label(path) != digest:
        unet, text, autoencoder = unpack(load_file(weights))
        write_checkpoint(path, unet, text, autoencoder, label=digest)
    return path


def place_judge() -> None:
    """Put the committed judge where the benchmark looks, unless one was trained there."""
    if not JUDGE.exists():
        JUDGE.parent.mkdir(parents=True, exist_ok=True)
        partial = JUDGE.with_name(f".{JUDGE.name}.{uuid.uuid4().hex}.part")
        shutil.copyfile(COMMITTED_JUDGE, partial)
        partial.replace(JUDGE)


def trained_parts() -> tuple[Tensors, TextEncoder, Autoencoder]:
    """The three parts as they lie in ``build/emoji``: the denoiser's average, text, pictures."""
    cpu, state = torch.device("cpu"), load(AVERAGE)
    if state is None:
        raise FileNotFoundError(f"no snapshot in {AVERAGE}: train the denoiser first")
    return state["model"], load_text_encoder(cpu), load_autoencoder(cpu)


def write_checkpoint(
    path: Path, unet: Tensors, text: TextEncoder, autoencoder: Autoencoder, label: str = ""
) -> None:
    """A file in half precision that the host takes for SD1.5."""
    tensors = {f"model.diffusion_model.{name}": value for name, value in unet.items()}
    tensors |= {
        f"cond_stage_model.transformer.text_model.{name}": value
        for name, value in text_tensors(text).items()
    }
    tensors |= {
        f"first_stage_model.{name}": value
        for name, value in autoencoder_tensors(autoencoder).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # two may write it at once
    halves = {name: value.detach().half().contiguous() for name, value in tensors.items()}
    save_file(halves, partial, metadata={_LABEL: label})
    partial.replace(path)


def _read_label(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_LABEL)
    except (OSError, SafetensorError):  # absent or cut short: in any case not this checkpoint
        return None


@torch.no_grad()
def text_tensors(encoder: TextEncoder) -> dict[str, torch.Tensor]:
    """The encoder in the shape of CLIP-L: the layers that don't exist add zero."""
    everything = torch.arange(len(encoder.table))
    tensors = {
        "embeddings.token_embedding.weight": encoder.embed(everything),
        "embeddings.position_embedding.weight": encoder.position,
        "final_layer_norm.weight": torch.ones(WIDTH),
        "final_layer_norm.bias": torch.zeros(WIDTH),
    }
    for number in range(LAYERS):
        root = f"encoder.layers.{number}"
        for norm in ("layer_norm1", "layer_norm2"):
            tensors[f"{root}.{norm}.weight"] = torch.ones(WIDTH)
            tensors[f"{root}.{norm}.bias"] = torch.zeros(WIDTH)
        sizes = {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            sizes[f"self_attn.{part}"] = (WIDTH, WIDTH)
        for name, shape in sizes.items():
            tensors[f"{root}.{name}.weight"] = torch.zeros(shape)
            tensors[f"{root}.{name}.bias"] = torch.zeros(shape[0])
    for number, layer in zip(REAL_LAYERS, encoder.layers, strict=True):
        root = f"encoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            narrow = layer.get_submodule(part)
            tensors[f"{root}.self_attn.{part}.weight"] = narrow.up @ narrow.down
            tensors[f"{root}.self_attn.{part}.bias"] = narrow.bias
        tensors[f"{root}.mlp.fc1.weight"][:HIDDEN] = layer.fc1.weight
        tensors[f"{root}.mlp.fc1.bias"][:HIDDEN] = layer.fc1.bias
        tensors[f"{root}.mlp.fc2.weight"][:, :HIDDEN] = layer.fc2.weight
        tensors[f"{root}.mlp.fc2.bias"] = layer.fc2.bias
    assert tensors["embeddings.position_embedding.weight"].shape == (POSITIONS, WIDTH)
    return tensors


def autoencoder_tensors(model: Autoencoder) -> dict[str, torch.Tensor]:
    """TAESD's tensors; the two blocks that were left out are zeros."""
    tensors = dict(model.state_dict())
    width = tensors["taesd_encoder.0.weight"].shape[0]
    for block in ("taesd_encoder.1", "taesd_decoder.18"):
        for number in (0, 2, 4):
            tensors[f"{block}.conv.{number}.weight"] = torch.zeros(width, width, 3, 3)
            tensors[f"{block}.conv.{number}.bias"] = torch.zeros(width)
    tensors["vae_scale"] = torch.tensor(LATENT_SCALE)
    tensors["vae_shift"] = torch.tensor(0.0)
    return tensors


def pack(path: Path = WEIGHTS) -> Path:
    """Write what was trained, made small, and the judge beside it."""
    unet, text, autoencoder = trained_parts()
    parts = {"unet": unet, "text": text.state_dict(), "autoencoder": autoencoder.state_dict()}
    small = {"text.known": torch.tensor(text.known, dtype=torch.int32)}
    for part, tensors in parts.items():
        for name, value in tensors.items():
            key = f"{part}.{name}"
            if value.dim() > 1 and value.numel() >= SMALLEST:
                small |= quantise(key, value, BITS[part])
            else:
                small[key] = value.half()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    save_file({name: value.contiguous() for name, value in small.items()}, partial)
    partial.replace(path)
    shutil.copyfile(JUDGE, path.with_name(COMMITTED_JUDGE.name))
    return path


def lay_out() -> None:
    """Put the committed weights where the trainings look, so that they can go on from there."""
    unet, text, autoencoder = unpack(load_file(WEIGHTS))
    save({"final": autoencoder.state_dict()}, AUTOENCODER)
    save({"known": text.known, "model": text.state_dict(), TAUGHT: True}, TEXT)
    save({"step": 0, "model": unet, "average": unet}, STATE)


def unpack(small: Tensors) -> tuple[Tensors, TextEncoder, Autoencoder]:
    """The way back from :func:`pack`."""
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in BITS}
    for key, value in small.items():
        part, _, name = key.partition(".")
        if name == "known" or name.endswith((":scale", ":shape")):
            continue
        if name.endswith(":numbers"):
            name = name.removesuffix(":numbers")
            value = restore(f"{part}.{name}", small, BITS[part])
        parts[part][name] = value.float()
    text, autoencoder = TextEncoder(small["text.known"].tolist()), Autoencoder()
    text.load_state_dict(parts["text"])
    autoencoder.load_state_dict(parts["autoencoder"])
    return parts["unet"], text, autoencoder


def quantise(key: str, value: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Whole numbers of ``bits`` bits and a scale for each row, the best of a few."""
    rows, top = value.detach().float().flatten(1), 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-8)
    best = torch.full_like(largest, torch.inf)
    numbers, scale = torch.zeros_like(rows), torch.zeros_like(largest)
    for ceiling in _CEILINGS:
        step = (largest * ceiling / top).half().float().clamp_min(1e-7)
        rounded = (rows / step).round().clamp(-top, top)
        error = (rounded * step - rows).square().sum(1, keepdim=True)
        numbers = torch.where(error < best, rounded, numbers)
        scale = torch.where(error < best, step, scale)
        best = torch.minimum(error, best)
    whole = (numbers + top).to(torch.uint8).flatten()
    return {
        f"{key}:numbers": _squeeze(whole) if bits == 6 else whole,
        f"{key}:scale": scale.half().flatten(),
        f"{key}:shape": torch.tensor(value.shape, dtype=torch.int32),
    }


def restore(key: str, small: Tensors, bits: int) -> torch.Tensor:
    """The way back from :func:`quantise`."""
    numbers, shape = small[f"{key}:numbers"], small[f"{key}:shape"].tolist()
    whole = _unsqueeze(numbers) if bits == 6 else numbers
    count = torch.Size(shape).numel()
    rows = whole[:count].float().sub(2 ** (bits - 1) - 1).reshape(shape[0], -1)
    return (rows * small[f"{key}:scale"].float().clamp_min(1e-7).unsqueeze(1)).reshape(shape)


def _squeeze(whole: torch.Tensor) -> torch.Tensor:
    """Four numbers of 6 bits into three bytes."""
    padded = torch.cat([whole, whole.new_zeros(-len(whole) % 4)]).int().reshape(-1, 4)
    word = padded[:, 0] | padded[:, 1] << 6 | padded[:, 2] << 12 | padded[:, 3] << 18
    return torch.stack([word & 255, word >> 8 & 255, word >> 16], 1).to(torch.uint8).flatten()


def _unsqueeze(small: torch.Tensor) -> torch.Tensor:
    """The way back from :func:`_squeeze`; up to three zeros more than went in."""
    low, middle, high = small.int().reshape(-1, 3).T
    word = low | middle << 8 | high << 16
    return torch.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], 1).flatten()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("pack", "expand", "plain", "lay-out"))
    parser.add_argument("--path", type=Path, default=CHECKPOINT)
    chosen = parser.parse_args()
    if chosen.what == "pack":
        print(pack())
    elif chosen.what == "lay-out":
        lay_out()
    elif chosen.what == "expand":
        print(build_emoji_checkpoint(chosen.path))
    else:
        write_checkpoint(chosen.path, *trained_parts())
        print(chosen.path)
