"""Makes the model from nothing: ``python -m benchmarks.icons.train``.

The judge first, then text encoder and denoiser together, by the loss of the flow alone. Everything
lies in ``build/icons``; a training that was stopped goes on from its last snapshot. Some minutes on
a large GPU, days on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.emoji.loop import Average, load, mixed, pick_device, save, set_rate
from benchmarks.icons import classifier
from benchmarks.icons.data import FOLDER, SIZE, empty_page, training_pictures
from benchmarks.icons.latents import CHANNELS, SIDE, fitted_patches
from benchmarks.icons.loop import Log
from benchmarks.icons.network import Network, tokenize
from benchmarks.icons.words import STYLE_NAMES, THING_NAMES, PromptMaker

STATE, AVERAGE, PROMPTS = (FOLDER / name for name in ("state.pt", "average.pt", "prompts.npz"))
VARIANTS = 24
PROMPTS_EACH, PROMPTS_OF_NOTHING = 1600, 24000
SHARE_NOTHING = 0.13
STEPS, BATCH, RATE = 2800, 512, 1e-3
WARMUP, FALLING, DECAY, WEIGHT_DECAY = 200, 0.4, 0.998, 0.03
REPORT, SNAPSHOT = 100, 1000
_PAIRS = [(name, style) for name in THING_NAMES for style in STYLE_NAMES]


def prompt_bank() -> tuple[torch.Tensor, torch.Tensor]:
    """Word numbers of prompts for each pair (256, prompts, 24), and for an empty page."""
    if not PROMPTS.exists():
        with ProcessPoolExecutor() as pool:
            rows = list(pool.map(_prompts_for, range(len(_PAIRS) + 1), chunksize=8))
        partial = PROMPTS.with_suffix(".part.npz")
        np.savez_compressed(partial, pairs=np.stack(rows[:-1]), nothing=rows[-1])
        partial.replace(PROMPTS)
    kept = np.load(PROMPTS)
    return torch.from_numpy(kept["pairs"]), torch.from_numpy(kept["nothing"])


def _prompts_for(row: int) -> np.ndarray:
    """Of one pair; after the last pair those of nothing."""
    maker = PromptMaker(1000 + row)
    if row == len(_PAIRS):
        texts = [maker.draw_nothing() for _ in range(PROMPTS_OF_NOTHING)]
    else:
        texts = [maker.draw(*_PAIRS[row]) for _ in range(PROMPTS_EACH)]
    return tokenize(texts).short().numpy()


class Batches:
    """Draws (latents, word numbers); everything lies where the training runs."""

    def __init__(self, network: Network, device: torch.device) -> None:
        pages = training_pictures(VARIANTS, seed=3)
        flat = pages.reshape(-1, SIZE, SIZE, 3)
        parts = [network.patches.encoded(part).half() for part in np.array_split(flat, 48)]
        self._bank = torch.cat(parts).reshape(len(_PAIRS), VARIANTS, CHANNELS, SIDE, SIDE)
        self._empty = network.patches.encoded(empty_page()[None])[0].half()
        self._pairs, self._nothing = (bank.to(device) for bank in prompt_bank())
        self._device = device

    def __call__(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair, variant, prompt, blank = (
            torch.randint(most, (size,), device=self._device)
            for most in (len(_PAIRS), VARIANTS, self._pairs.shape[1], len(self._nothing))
        )
        nothing = torch.rand(size, device=self._device) < SHARE_NOTHING
        clean = torch.where(nothing.view(-1, 1, 1, 1), self._empty[None], self._bank[pair, variant])
        tokens = torch.where(nothing[:, None], self._nothing[blank], self._pairs[pair, prompt])
        return clean.float(), tokens.long()


def _loss(network: Network, clean: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean square error of the velocity, at noise levels spread evenly."""
    count, device = len(clean), clean.device
    # One level from each of B equal parts: less chance in the gradient.
    spread = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    level = 1 - spread
    noise = torch.randn_like(clean)
    s = level.view(-1, 1, 1, 1)
    noisy = ((1 - s) * clean + s * noise).contiguous(memory_format=torch.channels_last)
    # The CPU's fused attention is slow in its backward.
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with plain:
        states = network.encode(tokens)  # small, so in full precision
        with mixed(device):
            found = network.velocity(noisy, level, states)
    return (found.float() - (noise - clean)).square().mean()


def _progress(begin: float, minutes: float | None, steps: int) -> Callable[[int], float]:
    """How much of the training is done, by the steps or, if given, by the minutes."""
    if minutes is None:
        return lambda step: step / steps
    return lambda step: max(step / steps, (time.monotonic() - begin) / (60 * minutes))


def train(
    steps: int = STEPS, batch: int = BATCH, rate: float = RATE, minutes: float | None = None
) -> None:
    """Train up to step ``steps`` or for so many minutes, going on where it stopped.

    The rate is constant at first and falls to nothing over the last ``FALLING`` of it.
    """
    log, device = Log("train"), pick_device()
    torch.manual_seed(4)
    network = Network(fitted_patches()).to(device, memory_format=torch.channels_last)
    network.patches.to(memory_format=torch.contiguous_format)
    average = Average(network, DECAY)
    optimizer = torch.optim.AdamW(
        network.parameters(), rate, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=True
    )
    first, state = 0, load(STATE)
    if state is not None:
        first = state["step"]
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average.values = {name: state["average"][name].to(device) for name in average.values}
    draw = Batches(network, device)
    size = sum(weight.numel() for weight in network.parameters()) / 1e6
    log(f"{size:.2f} M parameters on {device}, from step {first}")
    torch.manual_seed(5 + first)
    done = _progress(time.monotonic(), minutes, steps)
    step, clock, total = first, time.monotonic(), torch.zeros((), device=device)
    while (share := done(step)) < 1:
        set_rate(optimizer, rate * min(1.0, (step + 1) / WARMUP, (1 - share) / FALLING))
        loss = _loss(network, *draw(batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update(network, step)
        step, total = step + 1, total + loss.detach()
        if step % REPORT == 0:
            seconds = (time.monotonic() - clock) / REPORT
            log(f"step {step} loss {total.item() / REPORT:.4f} {seconds:.3f} s/step {share:.0%}")
            clock, total = time.monotonic(), torch.zeros((), device=device)
        if step % SNAPSHOT == 0:
            _snapshot(step, network, average, optimizer)
    _snapshot(step, network, average, optimizer)
    log(f"done at step {step}")


def _snapshot(
    step: int, network: Network, average: Average, optimizer: torch.optim.Optimizer
) -> None:
    kept = {"step": step, "average": average.values, "network": network.state_dict()}
    save({**kept, "optimizer": optimizer.state_dict()}, STATE)
    patches = {f"patches.{name}": value for name, value in network.patches.state_dict().items()}
    save({"step": step, "network": {**average.values, **patches}}, AVERAGE)


def trained_network(device: torch.device) -> Network:
    """The averaged one of the last snapshot, frozen."""
    state = load(AVERAGE)
    if state is None:
        raise FileNotFoundError(f"no snapshot in {AVERAGE}: train first")
    return filled_network(state["network"]).to(device)


def filled_network(tensors: dict[str, torch.Tensor]) -> Network:
    """A frozen network with these weights; the word vectors count once."""
    network = Network()
    missing = network.load_state_dict(tensors, strict=False)
    assert set(missing.missing_keys) <= {"text.encoder.embed_tokens.weight"}, missing
    assert not missing.unexpected_keys, missing
    return network.eval().requires_grad_(False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--minutes", type=float, help="stop after so many, whatever the step")
    chosen = parser.parse_args()
    classifier.train()
    train(chosen.steps, chosen.batch, chosen.rate, chosen.minutes)


if __name__ == "__main__":
    main()
