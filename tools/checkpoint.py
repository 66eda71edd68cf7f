"""Shrunken Stable Diffusion checkpoints with random weights.

The host recognises a model by the names and a few shapes of its tensors, so a U-Net with fewer
blocks passes as SD1.5, SD2 or SDXL and runs through exactly the code a real one runs through. The
text encoder cannot be shrunk in a file (its sizes are constants of the host), so only those of
SD1.5 have one; the autoencoder is TAESD.

Random weights are scaled so that a prompt matters: attention to the text is peaked rather than
an even average over 77 tokens, and the images lie mostly within the range of colours.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_RECIPE = 2  # part of the label in the file: raise it and files of an older recipe are redone

_CHANNELS = 320
_TIME = 4 * _CHANNELS
_TEXT = 768  # of SD1.5
_TOKENS = 49408
_POSITIONS = 77

# Found by measuring, see the note at the top. Everything else has unit gain.
_WORD_PEAK = 3.0  # how selective the text encoder's attention is
_WORD_MIXING = 0.3  # what a layer's attention adds to a word's own embedding
_WORD_CHANGE = 0.1  # what a layer's perceptron adds to it
_ATTENTION_PEAK = 1.5  # how selective the U-Net's attention to the text is
_TEXT_EFFECT = 2.0  # what that attention adds
_POOLED_EFFECT = 0.3  # what the pooled vector adds beside the noise level
_IMAGE_CONTRAST = 2.0
# A model that removes no noise leaves latents as wide as the noise it started from. Unscaled
# they would saturate the decoder, and every picture would be black, white and primary colours.
_LATENT_SCALE = 0.02


@dataclass(frozen=True)
class _Layout:
    """What there is in a U-Net.

    Attributes:
        levels: transformer blocks at each resolution on the way down.
        middle: transformer blocks in the middle; None is a single residual block.
        up: transformer blocks of every block on the way up.
        text: width of the token embeddings.
        linear: whether transformers read their input through a matrix instead of a convolution.
        pooled: size of the vector that is given beside the tokens; 0 for none.
    """

    levels: tuple[int, ...]
    middle: int | None
    up: tuple[int, ...]
    text: int = _TEXT
    linear: bool = False
    pooled: int = 0


LAYOUTS = {
    "one-level": _Layout((1,), 1, (1, 1)),
    "nano": _Layout((1,), None, (0, 0)),
    "two-level": _Layout((1, 1), 1, (1, 1, 1, 1)),
    "sd2": _Layout((1,), 1, (1, 1), text=1024, linear=True),
    # Of SDXL's kin, the one with the fewest blocks that the host knows.
    "sdxl": _Layout((0, 2, 5), None, (0,) * 6, text=2048, linear=True, pooled=2816),
}


class _Plan:
    """Names, shapes and scales of the tensors of one checkpoint; nothing is drawn yet."""

    def __init__(self) -> None:
        self.random: dict[str, tuple[tuple[int, ...], float]] = {}
        self.constant: dict[str, tuple[tuple[int, ...], float]] = {}
        self.averaging: set[str] = set()

    def weight(self, name: str, shape: tuple[int, ...], gain: float = 1.0) -> None:
        self.random[f"{name}.weight"] = (shape, gain / math.sqrt(math.prod(shape[1:])))

    def blur(self, name: str, size: int, fan_in: int, gain: float = 1.0) -> None:
        """A 3x3 convolution that mixes channels at random but only averages in space.

        A decoder of these shows a latent as patches of colour. With random kernels it would be
        static, in which nobody sees that two pictures differ. The mixing weights sum to zero,
        because the inputs, coming from ReLUs, have a large mean.
        """
        self.weight(name, (size, fan_in, 1, 1), gain / 9)
        self.averaging.add(f"{name}.weight")

    def table(self, name: str, shape: tuple[int, ...], std: float) -> None:
        self.random[f"{name}.weight"] = (shape, std)

    def bias(self, name: str, size: int, value: float = 0.0) -> None:
        self.constant[f"{name}.bias"] = ((size,), value)

    def linear(
        self, name: str, size: int, fan_in: int, bias: bool = True, gain: float = 1.0
    ) -> None:
        self.weight(name, (size, fan_in), gain)
        if bias:
            self.bias(name, size)

    def conv(
        self,
        name: str,
        size: int,
        fan_in: int,
        kernel: int = 3,
        bias: float | None = 0.0,
        gain: float = 1.0,
    ) -> None:
        self.weight(name, (size, fan_in, kernel, kernel), gain)
        if bias is not None:
            self.bias(name, size, bias)

    def norm(self, name: str, size: int) -> None:
        self.constant[f"{name}.weight"] = ((size,), 1.0)
        self.bias(name, size)

    def tensors(self, seed: int) -> dict[str, torch.Tensor]:
        """Draw the weights. Each tensor has its own stream, so layouts share what they can."""
        drawn = {
            name: torch.full(shape, value, dtype=torch.float16)
            for name, (shape, value) in self.constant.items()
        }
        for name, (shape, std) in self.random.items():
            stream = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
            tensor = torch.randn(shape, generator=stream).mul_(std)
            if name in self.averaging:
                tensor = (tensor - tensor.mean(1, keepdim=True)).repeat(1, 1, 3, 3)
            drawn[name] = tensor.half()
        return drawn


def build_checkpoint(
    path: Path, layout: str = "one-level", seed: int = 0, in_channels: int = 4
) -> Path:
    """Write a checkpoint unless ``path`` already holds this very one, and return ``path``.

    ``in_channels=9`` gives what the host takes for an inpainting model.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    path = Path(path)
    label = _label(layout, seed, in_channels)
    if _read_label(path) == label:
        return path
    plan = _Plan()
    _unet(plan, LAYOUTS[layout], in_channels)
    if LAYOUTS[layout].text == _TEXT:
        _text_encoder(plan)
        _autoencoder(plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        # A single entry of metadata: the order of several is not the same in each run.
        save_file(plan.tensors(seed), temporary, metadata={"random_weights": label})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _label(layout: str, seed: int, in_channels: int) -> str:
    return json.dumps(
        {"recipe": _RECIPE, "layout": layout, "seed": seed, "in_channels": in_channels},
        sort_keys=True,
    )


def _read_label(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("random_weights")
    except (OSError, SafetensorError):  # absent or cut short: in any case not this checkpoint
        return None


def _unet(plan: _Plan, layout: _Layout, in_channels: int) -> None:
    root = "model.diffusion_model"
    plan.linear(f"{root}.time_embed.0", _TIME, _CHANNELS)
    plan.linear(f"{root}.time_embed.2", _TIME, _TIME)
    if layout.pooled:
        plan.linear(f"{root}.label_emb.0.0", _TIME, layout.pooled)
        plan.linear(f"{root}.label_emb.0.2", _TIME, _TIME, gain=_POOLED_EFFECT)
    plan.conv(f"{root}.input_blocks.0.0", _CHANNELS, in_channels)
    for level, depth in enumerate(layout.levels):
        if level:
            plan.conv(f"{root}.input_blocks.{2 * level}.0.op", _CHANNELS, _CHANNELS)
        block = f"{root}.input_blocks.{2 * level + 1}"
        _residual(plan, f"{block}.0", _CHANNELS)
        _transformer(plan, f"{block}.1", layout, depth)
    _residual(plan, f"{root}.middle_block.0", _CHANNELS)
    if layout.middle is not None:
        _transformer(plan, f"{root}.middle_block.1", layout, layout.middle)
        _residual(plan, f"{root}.middle_block.2", _CHANNELS)
    for number, depth in enumerate(layout.up):
        block = f"{root}.output_blocks.{number}"
        _residual(plan, f"{block}.0", 2 * _CHANNELS)
        _transformer(plan, f"{block}.1", layout, depth)
        if number % 2 and number + 1 < len(layout.up):  # the last one before the next level
            plan.conv(f"{block}.{2 if depth else 1}.conv", _CHANNELS, _CHANNELS)
    plan.norm(f"{root}.out.0", _CHANNELS)
    plan.conv(f"{root}.out.2", 4, _CHANNELS)


def _residual(plan: _Plan, name: str, fan_in: int) -> None:
    plan.norm(f"{name}.in_layers.0", fan_in)
    plan.conv(f"{name}.in_layers.2", _CHANNELS, fan_in)
    plan.linear(f"{name}.emb_layers.1", _CHANNELS, _TIME)
    plan.norm(f"{name}.out_layers.0", _CHANNELS)
    plan.conv(f"{name}.out_layers.3", _CHANNELS, _CHANNELS)
    if fan_in != _CHANNELS:
        plan.conv(f"{name}.skip_connection", _CHANNELS, fan_in, kernel=1)


def _transformer(plan: _Plan, name: str, layout: _Layout, depth: int) -> None:
    if not depth:
        return
    plan.norm(f"{name}.norm", _CHANNELS)
    for part in ("proj_in", "proj_out"):
        if layout.linear:
            plan.linear(f"{name}.{part}", _CHANNELS, _CHANNELS)
        else:
            plan.conv(f"{name}.{part}", _CHANNELS, _CHANNELS, kernel=1)
    for number in range(depth):
        _transformer_block(plan, f"{name}.transformer_blocks.{number}", layout.text)


def _transformer_block(plan: _Plan, block: str, text: int) -> None:
    for number in (1, 2, 3):
        plan.norm(f"{block}.norm{number}", _CHANNELS)
    for attention, source in (("attn1", _CHANNELS), ("attn2", text)):
        reads_text = attention == "attn2"
        peak = _ATTENTION_PEAK if reads_text else 1.0
        effect = _TEXT_EFFECT if reads_text else 1.0
        plan.linear(f"{block}.{attention}.to_q", _CHANNELS, _CHANNELS, bias=False, gain=peak)
        plan.linear(f"{block}.{attention}.to_k", _CHANNELS, source, bias=False, gain=peak)
        plan.linear(f"{block}.{attention}.to_v", _CHANNELS, source, bias=False)
        plan.linear(f"{block}.{attention}.to_out.0", _CHANNELS, _CHANNELS, gain=effect)
    plan.linear(f"{block}.ff.net.0.proj", 8 * _CHANNELS, _CHANNELS)
    plan.linear(f"{block}.ff.net.2", _CHANNELS, 4 * _CHANNELS)


def _text_encoder(plan: _Plan) -> None:
    root = "cond_stage_model.transformer.text_model"
    plan.table(f"{root}.embeddings.token_embedding", (_TOKENS, _TEXT), std=0.05)
    plan.table(f"{root}.embeddings.position_embedding", (_POSITIONS, _TEXT), std=0.01)
    for number in range(12):
        layer = f"{root}.encoder.layers.{number}"
        plan.norm(f"{layer}.layer_norm1", _TEXT)
        plan.norm(f"{layer}.layer_norm2", _TEXT)
        plan.linear(f"{layer}.self_attn.q_proj", _TEXT, _TEXT, gain=_WORD_PEAK)
        plan.linear(f"{layer}.self_attn.k_proj", _TEXT, _TEXT, gain=_WORD_PEAK)
        plan.linear(f"{layer}.self_attn.v_proj", _TEXT, _TEXT)
        plan.linear(f"{layer}.self_attn.out_proj", _TEXT, _TEXT, gain=_WORD_MIXING)
        plan.linear(f"{layer}.mlp.fc1", 4 * _TEXT, _TEXT)
        plan.linear(f"{layer}.mlp.fc2", _TEXT, 4 * _TEXT, gain=_WORD_CHANGE)
    plan.norm(f"{root}.final_layer_norm", _TEXT)


def _autoencoder(plan: _Plan) -> None:
    """TAESD: blocks of three convolutions, resampled three times by two, without norms."""
    width = 64
    encoder, decoder = "first_stage_model.taesd_encoder", "first_stage_model.taesd_decoder"
    plan.conv(f"{encoder}.0", width, 3)
    plan.conv(f"{encoder}.14", 4, width)
    for number in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        _autoencoder_block(plan, f"{encoder}.{number}", width)
    for number in (2, 6, 10):
        plan.conv(f"{encoder}.{number}", width, width, bias=None)
    plan.blur(f"{decoder}.1", width, 4)
    plan.bias(f"{decoder}.1", width)
    plan.blur(f"{decoder}.19", 3, width, gain=_IMAGE_CONTRAST)
    plan.bias(f"{decoder}.19", 3, 0.35)  # brings the mean to about mid grey
    for number in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        _autoencoder_block(plan, f"{decoder}.{number}", width)
    for number in (7, 12, 17):
        plan.blur(f"{decoder}.{number}", width, width)
    plan.constant["first_stage_model.vae_scale"] = ((), _LATENT_SCALE)
    plan.constant["first_stage_model.vae_shift"] = ((), 0.0)


def _autoencoder_block(plan: _Plan, name: str, width: int) -> None:
    for number in (0, 2, 4):
        plan.conv(f"{name}.conv.{number}", width, width)
