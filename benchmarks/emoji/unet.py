"""The denoiser: the host's own U-Net class with one level, trained as Stable Diffusion 1.5 was.

It predicts the noise (eps) on SD's schedule of 1000 steps. Every ``SNAPSHOT`` steps the averaged
weights are written to ``unet_average.pt``; a training goes on from ``unet.pt``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.emoji.autoencoder import CHANNELS, SIDE, load_autoencoder, to_input
from benchmarks.emoji.data import FOLDER, SIZE, empty_page, load_others, training_pictures
from benchmarks.emoji.loop import Average, Log, load, mixed, pick_device, save, set_rate
from benchmarks.emoji.text import TextEncoder, load_text_encoder, tokenize, unknown_words
from benchmarks.emoji.words import LEFT_OUT_PAIRS, OBJECT_NAMES, STYLE_NAMES, PromptMaker

STATE, AVERAGE, LATENTS, OTHERS = (
    FOLDER / name for name in ("unet.pt", "unet_average.pt", "latents.pt", "latents_of_others.pt")
)
CONFIG = {
    "image_size": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "model_channels": 320,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
}
VARIANTS, VARIANTS_OF_OTHERS = 24, 4
SHARE_OTHERS, SHARE_NOTHING, SHARE_ANYTHING = 0.42, 0.2, 0.05
BATCH, RATE, WARMUP, DECAY, WEIGHT_DECAY = 32, 7e-4, 200, 0.998, 0.05
SNAPSHOT = 100
SNR_CEILING, SNR_GAIN = 5.0, 9.0
_CACHED_PROMPTS = 8000


def unet_class() -> type[nn.Module]:
    """The host's U-Net; the host's modules become importable."""
    from tools.pack import use_host

    threads = torch.get_num_threads()
    use_host()
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    torch.set_num_threads(threads)
    return UNetModel


def build_unet() -> nn.Module:
    """With fresh weights: the host's layers come uninitialised."""
    model = unet_class()(**CONFIG, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=1 / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for name, module in model.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            nn.init.zeros_(module.weight)  # every block starts as no change
    return model


def alphas(device: torch.device) -> torch.Tensor:
    """How much of the picture's variance is left after each of the 1000 steps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float().to(device)


def latents(device: torch.device) -> torch.Tensor:
    """Latents of varied pictures (objects, styles, variants, 4, 8, 8), kept in a file."""
    return _encoded(LATENTS, lambda: training_pictures(VARIANTS, seed=3), device)


def latents_of_others(device: torch.device) -> tuple[list[str], torch.Tensor]:
    """Names and latents (others, styles, variants, 4, 8, 8) of what is none of the objects.

    Each comes a second time, mirrored: the more things a style comes with, the more it is a style.
    """
    names, masters = load_others()
    names, masters = names * 2, np.concatenate([masters, masters[:, :, :, ::-1]])
    pages = partial(training_pictures, VARIANTS_OF_OTHERS, 6, masters)
    return names, _encoded(OTHERS, pages, device)


@torch.no_grad()
def _encoded(path: Path, draw: Callable[[], np.ndarray], device: torch.device) -> torch.Tensor:
    kept = load(path)
    if kept is None:
        pages = draw()
        autoencoder = load_autoencoder(device)
        flat = pages.reshape(-1, SIZE, SIZE, 3)
        parts = np.array_split(flat, -(-len(flat) // 64))
        done = [autoencoder.encode(to_input(part, device)).half().cpu() for part in parts]
        kept = {"latents": torch.cat(done).reshape(*pages.shape[:3], CHANNELS, SIDE, SIDE)}
        save(kept, path)
    return kept["latents"]


def empty_latent(device: torch.device) -> torch.Tensor:
    """Latent (4, 8, 8) of the page with nothing on it."""
    with torch.no_grad():
        page = to_input(empty_page()[None], device)
        return load_autoencoder(device).encode(page)[0].half().cpu()


class Sentences:
    """States of prompts (B, 77, 768), most of them from memory."""

    def __init__(self, encoder: TextEncoder, device: torch.device) -> None:
        self._encoder, self._device = encoder, device
        self._kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        new = sorted({text for text in texts if text not in self._kept})
        if new:
            states = self._encode(new)
            if len(self._kept) + len(new) > _CACHED_PROMPTS:
                self._kept.clear()
                new = sorted(set(texts))
                states = self._encode(new)
            self._kept.update(zip(new, states.half(), strict=True))
        return torch.stack([self._kept[text] for text in texts]).float()

    def _encode(self, texts: list[str]) -> torch.Tensor:
        with mixed(self._device):
            return self._encoder(tokenize(texts).to(self._device))


class Batches:
    """Draws (latents, texts); the pairs that are left out never come.

    A share shows something else than the objects: a style that comes with hundreds of things is
    learned as a style, where sixty could be learned by heart one by one. Another share names the
    style alone, over any of the pictures. Yet another is empty, for prompts that name nothing.
    """

    def __init__(
        self,
        bank: torch.Tensor,
        others: tuple[list[str], torch.Tensor],
        empty: torch.Tensor,
        seed: int,
    ) -> None:
        self._bank, self._empty = bank, empty
        self._prompts = PromptMaker(seed, unknown_words())
        self._names, self._others = others
        self._draw = torch.Generator().manual_seed(seed)
        self._pairs = [
            (row, column)
            for row, name in enumerate(OBJECT_NAMES)
            for column, style in enumerate(STYLE_NAMES)
            if (name, style) not in LEFT_OUT_PAIRS
        ]

    def __call__(self, size: int) -> tuple[torch.Tensor, list[str]]:
        drawn = [self._one() for _ in range(size)]
        return torch.stack([latent for latent, _ in drawn]).float(), [text for _, text in drawn]

    def _one(self) -> tuple[torch.Tensor, str]:
        chance = float(torch.rand((), generator=self._draw))
        if chance < SHARE_NOTHING:
            return self._empty, self._prompts.draw_nothing()
        chance -= SHARE_NOTHING
        if chance < SHARE_ANYTHING:
            latent, _, style = self._other() if self._number(2) else self._object()
            return latent, self._prompts.draw_anything(style)
        if chance < SHARE_ANYTHING + SHARE_OTHERS:
            latent, name, style = self._other()
            return latent, self._prompts.draw_other(name, style)
        latent, name, style = self._object()
        return latent, self._prompts.draw(name, style)[0]

    def _object(self) -> tuple[torch.Tensor, str, str]:
        row, column = self._pairs[self._number(len(self._pairs))]
        latent = self._bank[row, column, self._number(self._bank.shape[2])]
        return latent, OBJECT_NAMES[row], STYLE_NAMES[column]

    def _other(self) -> tuple[torch.Tensor, str, str]:
        row, column, variant = (self._number(size) for size in self._others.shape[:3])
        return self._others[row, column, variant], self._names[row], STYLE_NAMES[column]

    def _number(self, most: int) -> int:
        return int(torch.randint(most, (), generator=self._draw))


def _loss(
    model: nn.Module, clean: torch.Tensor, states: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Error of the noise, weighted towards the noise levels that decide what is drawn."""
    count, device = len(clean), clean.device
    # One step from each of B equal parts of the schedule: less chance in the gradient.
    spread = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    steps = (spread[torch.randperm(count, device=device)] * len(kept)).long()
    left = kept[steps].view(-1, 1, 1, 1)
    noise = torch.randn_like(clean)
    noisy = left.sqrt() * clean + (1 - left).sqrt() * noise
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    # The CPU's fused attention takes a third of a step in its backward; the plain one a tenth.
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with mixed(device), plain:
        predicted = model(noisy, steps, states)
    errors = (predicted.float() - noise).square().mean((1, 2, 3))
    snr = (left / (1 - left)).view(-1)
    weights = snr.clamp_max(SNR_CEILING) / snr * (1 + (1 / snr).clamp_max(SNR_GAIN)).sqrt()
    return (errors * weights).mean()


def train(steps: int, batch: int = BATCH, rate: float = RATE, cooldown: int = 0) -> None:
    """Train up to step ``steps``, going on where it stopped.

    The rate is constant, so that it can always go on; over the last ``cooldown`` steps it falls
    to nothing, which gives the best model for now.
    """
    log, device = Log("unet"), pick_device()
    torch.manual_seed(4)
    model = build_unet().to(device, memory_format=torch.channels_last).train()
    average = Average(model, DECAY)
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=True
    )
    begin, state = 0, load(STATE)
    if state is not None:
        begin = state["step"]
        model.load_state_dict(state["model"])
        if "optimizer" in state:  # absent where the committed weights are trained further
            optimizer.load_state_dict(state["optimizer"])
        average.values = {name: state["average"][name].to(device) for name in average.values}
    if begin >= steps:
        return
    log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, from step {begin}")
    torch.manual_seed(5 + begin)
    banks = latents(device), latents_of_others(device), empty_latent(device)
    draw = Batches(*banks, seed=5 + begin)
    sentences, kept = Sentences(load_text_encoder(device), device), alphas(device)
    clock, total, seen = time.monotonic(), 0.0, 0
    for step in range(begin, steps):
        falling = min(1.0, (steps - step) / cooldown) if cooldown else 1.0
        set_rate(optimizer, rate * min(1.0, (step + 1) / WARMUP) * falling)
        clean, texts = draw(batch)
        loss = _loss(model, clean.to(device), sentences(texts), kept)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, step)
        total, seen = total + loss.item(), seen + 1
        if (step + 1) % 20 == 0:
            seconds = (time.monotonic() - clock) / seen
            log(f"step {step + 1} loss {total / seen:.4f} {seconds:.2f} s/step")
            clock, total, seen = time.monotonic(), 0.0, 0
        if (step + 1) % SNAPSHOT == 0 or step + 1 == steps:
            save({"step": step + 1, "model": average.values}, AVERAGE)
            save(
                {
                    "step": step + 1,
                    "model": model.state_dict(),
                    "average": average.values,
                    "optimizer": optimizer.state_dict(),
                },
                STATE,
            )


def load_unet(device: torch.device, path: Path = AVERAGE) -> tuple[nn.Module, int]:
    """The averaged model and its step."""
    state = load(path)
    if state is None:
        raise FileNotFoundError(f"no snapshot in {path}: train the denoiser first")
    model = build_unet()
    model.load_state_dict(state["model"])
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return model, state["step"]


@torch.no_grad()
def sample(
    model: nn.Module,
    states: torch.Tensor,
    empty: torch.Tensor,
    noise: torch.Tensor,
    steps: int = 20,
    guidance: float = 4.0,
) -> torch.Tensor:
    """The host's ``euler`` on its ``normal`` schedule: latents (B, 4, 8, 8)."""
    kept = alphas(noise.device)
    logs = ((1 - kept) / kept).sqrt().log()
    times = torch.linspace(999, 0, steps, device=noise.device)
    low, part = times.floor().long(), times.frac()
    sigmas = ((1 - part) * logs[low] + part * logs[times.ceil().long()]).exp()
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    both = torch.cat([states, empty.expand_as(states)])
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        nearest = (logs - now.log()).abs().argmin()
        scaled = (x / (1 + now**2).sqrt()).contiguous(memory_format=torch.channels_last)
        at = nearest.expand(2 * len(x))
        with_text, without = model(scaled.repeat(2, 1, 1, 1), at, both).chunk(2)
        x = x + (without + guidance * (with_text - without)) * (after - now)
    return x


def draw_noise(count: int, seed: int) -> torch.Tensor:
    """(count, 4, 8, 8)."""
    return torch.randn(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--cooldown", type=int, default=0)
    train(**vars(parser.parse_args()))
