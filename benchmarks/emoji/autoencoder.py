"""The autoencoder: TAESD's layers, 64 x 64 pixels to 4 x 8 x 8 and back.

Names and shapes are those of the host's ``comfy.taesd.taesd.TAESD``. The sampler's latents are
the encoder's output times ``0.18215 / vae_scale``; with ``vae_scale = 0.18215`` they are the
encoder's output itself, which is brought to mean 0 and variance 1 in each channel.

The two blocks at full resolution would take 40 % of the time and are left out: a block of zeros
is a ReLU.
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.emoji.data import FOLDER, SIZE, contact_sheet, training_pictures
from benchmarks.emoji.loop import Log, cosine_rate, load, mixed, pick_device, save, set_rate

PATH = FOLDER / "autoencoder.pt"
LATENT_SCALE = 0.18215
CHANNELS, SIDE = 4, SIZE // 8
_WIDTH = 64

STEPS, BATCH, RATE = 3000, 8, 1e-3
REFINING, REFINING_RATE = 1500, 5e-4  # of the decoder alone
VARIANTS = 24
NOISE = 0.15  # the most noise on a latent while the decoder is trained
LAST_CONV = "14"


def _conv(fan_in: int, size: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(fan_in, size, 3, padding=1, **options)


class _Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = _WIDTH
        self.conv = nn.Sequential(
            *(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.conv(x) + x)


def _encoder() -> nn.Sequential:
    layers: list[nn.Module] = [_conv(3, _WIDTH), nn.ReLU()]
    for _ in range(3):
        layers.append(_conv(_WIDTH, _WIDTH, stride=2, bias=False))
        layers += [_Block() for _ in range(3)]
    return nn.Sequential(*layers, _conv(_WIDTH, CHANNELS))


def _decoder() -> nn.Sequential:
    layers: list[nn.Module] = [_Clamp(), _conv(CHANNELS, _WIDTH), nn.ReLU()]
    for _ in range(3):
        layers += [_Block() for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), _conv(_WIDTH, _WIDTH, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), _conv(_WIDTH, 3))


class Autoencoder(nn.Module):
    """Pictures (B, 3, 64, 64) in 0..1 to latents (B, 4, 8, 8) and back."""

    def __init__(self) -> None:
        super().__init__()
        self.taesd_encoder = _encoder()
        self.taesd_decoder = _decoder()

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents as the sampler sees them."""
        return self.taesd_encoder(pictures)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures, not yet clamped to 0..1."""
        return self.taesd_decoder(latents)


def to_input(pages: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (B, 64, 64, 3) to float (B, 3, 64, 64) in 0..1."""
    pictures = torch.from_numpy(pages).to(device).permute(0, 3, 1, 2).float().div_(255)
    return pictures.contiguous(memory_format=torch.channels_last)


def to_pages(pictures: torch.Tensor) -> np.ndarray:
    """The way back from :func:`to_input`."""
    rounded = pictures.detach().clamp(0, 1).mul(255).round().byte()
    return rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def vary_colours(pictures: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
    """Tint some, so that the autoencoder doesn't only know these drawings."""
    count = len(pictures)
    gain = 1 + 0.15 * (torch.rand(count, 3, 1, 1, generator=stream) - 0.5)
    gain = torch.where(torch.rand(count, 1, 1, 1, generator=stream) < 0.3, gain, torch.ones(()))
    return (pictures * gain.to(pictures.device)).clamp(0, 1)


def load_autoencoder(device: torch.device) -> Autoencoder:
    """The trained one, frozen; raises where there is none."""
    state = load(PATH)
    if state is None or "final" not in state:
        raise FileNotFoundError(f"no trained autoencoder in {PATH}: train it first")
    model = Autoencoder()
    model.load_state_dict(state["final"])
    model.to(device, memory_format=torch.channels_last).requires_grad_(False)
    return model


def train(steps: int = STEPS) -> None:
    """Train, or go on where it stopped; afterwards the latents' norm is folded into the encoder."""
    log, device = Log("autoencoder"), pick_device()
    torch.manual_seed(0)
    model, norm = Autoencoder(), nn.BatchNorm2d(CHANNELS, affine=False, momentum=0.01)
    model.to(device, memory_format=torch.channels_last)
    norm.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    state, begin = load(PATH), 0
    if state is not None:
        if "final" in state:
            return
        begin = state["step"]
        model.load_state_dict(state["model"])
        norm.load_state_dict(state["norm"])
        optimizer.load_state_dict(state["optimizer"])
    pages = training_pictures(VARIANTS, seed=1).reshape(-1, SIZE, SIZE, 3)
    stream = torch.Generator().manual_seed(begin)
    clock, total = time.monotonic(), 0.0
    for step in range(begin, steps):
        set_rate(optimizer, cosine_rate(RATE, step, steps))
        chosen = torch.randint(len(pages), (BATCH,), generator=stream).numpy()
        loss = _loss(model, norm, vary_colours(to_input(pages[chosen], device), stream))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - clock) / 50
            log(f"step {step + 1}/{steps} loss {total / 50:.4f} {seconds:.2f} s/step")
            clock, total = time.monotonic(), 0.0
        if (step + 1) % 200 == 0:
            resumable = {"model": model.state_dict(), "norm": norm.state_dict()}
            save({**resumable, "optimizer": optimizer.state_dict(), "step": step + 1}, PATH)
    _fold(model, norm)
    save({"final": model.state_dict()}, PATH)
    _judge(model, pages, log, device)


def refine(steps: int = REFINING) -> None:
    """Train the decoder further on latents that stay as they are: what draws stays valid."""
    log, device = Log("autoencoder"), pick_device()
    torch.manual_seed(7)
    model = load_autoencoder(device)
    decoder = model.taesd_decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), REFINING_RATE, betas=(0.9, 0.99))
    pages = training_pictures(VARIANTS, seed=1).reshape(-1, SIZE, SIZE, 3)
    _judge(model, pages, log, device)
    stream, clock, total = torch.Generator().manual_seed(7), time.monotonic(), 0.0
    for step in range(steps):
        set_rate(optimizer, cosine_rate(REFINING_RATE, step, steps))
        chosen = torch.randint(len(pages), (BATCH,), generator=stream).numpy()
        loss = _loss(model, nn.Identity(), to_input(pages[chosen], device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - clock) / 50
            log(f"decoder, step {step + 1}/{steps} loss {total / 50:.4f} {seconds:.2f} s/step")
            clock, total = time.monotonic(), 0.0
    save({"final": model.state_dict()}, PATH)
    _judge(model, pages, log, device)


def _loss(model: Autoencoder, norm: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    with mixed(pictures.device):
        encoded = model.encode(pictures)
    latents = norm(encoded.float())
    strength = NOISE * torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
    with mixed(pictures.device):
        drawn = model.decode(latents + strength * torch.randn_like(latents))
    drawn = drawn.float()
    loss = functional.l1_loss(drawn, pictures) + 2 * functional.mse_loss(drawn, pictures)
    # The colours of areas, hue apart from lightness: without this the encoder kept no axis from
    # green to pink for thousands of steps, and trees came out grey.
    coarse = functional.avg_pool2d(drawn - pictures, 4)
    red, green, blue = coarse.unbind(1)
    hue = torch.stack([red - green, blue - (red + green) / 2], 1)
    loss = loss + coarse.abs().mean() + 3 * hue.abs().mean() + 20 * hue.square().mean()
    for axis in (2, 3):  # edges: without them thin lines of ink come out grey
        loss = loss + functional.l1_loss(drawn.diff(dim=axis), pictures.diff(dim=axis))
    return loss


@torch.no_grad()
def _fold(model: Autoencoder, norm: nn.BatchNorm2d) -> None:
    """Put the latents' mean and variance into the encoder's last convolution."""
    last = model.taesd_encoder.get_submodule(LAST_CONV)
    factor = (norm.running_var + norm.eps).rsqrt()
    last.weight.mul_(factor.view(-1, 1, 1, 1))
    last.bias.sub_(norm.running_mean).mul_(factor)


@torch.no_grad()
def _judge(model: Autoencoder, pages: np.ndarray, log: Log, device: torch.device) -> None:
    chosen = random.Random(0).sample(range(len(pages)), 60)
    pictures = to_input(pages[chosen], device)
    latents = model.encode(pictures)
    drawn = model.decode(latents)
    error = functional.mse_loss(drawn.clamp(0, 1), pictures)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    log(f"PSNR {-10 * error.log10().item():.1f} dB, latents' mean {mean.tolist()}")
    log(f"latents' deviation {deviation.tolist()}, largest {latents.abs().max().item():.2f}")
    pairs = np.stack([pages[chosen], to_pages(drawn)], 1).reshape(-1, SIZE, SIZE, 3)
    contact_sheet(pairs, 12, FOLDER / "autoencoder.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--decoder", action="store_true", help="the decoder alone, from here on")
    chosen = parser.parse_args()
    if chosen.decoder:
        refine()
    else:
        train(chosen.steps)
