"""A small judge of pictures: which object, if any, in which style.

Trained on the pictures and on what the autoencoder makes of them, with sizes, places, tints, blur
and noise varied. The 128 numbers before its two heads also serve as features.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from benchmarks.emoji.autoencoder import PATH as AUTOENCODER
from benchmarks.emoji.autoencoder import load_autoencoder, to_input, to_pages, vary_colours
from benchmarks.emoji.data import FOLDER, SIZE, empty_page, training_pictures
from benchmarks.emoji.loop import Log, cosine_rate, pick_device, set_rate
from benchmarks.emoji.words import NOTHING, OBJECT_NAMES, STYLE_NAMES

PATH = FOLDER / "classifier.safetensors"
COMMITTED = Path(__file__).parent / "weights" / "classifier.safetensors"
FEATURES = 128
NAMES = (*OBJECT_NAMES, NOTHING)
STEPS, BATCH, RATE = 1500, 64, 2e-3
VARIANTS, DECODED = 32, 12
NO_LABEL = -100  # what torch's cross entropy leaves out
_CHUNK = 64

# Pictures (B, 3, 64, 64) in 0..1, their names and their styles (B,).
Labelled = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _stage(fan_in: int, size: int) -> list[nn.Module]:
    halve = nn.Conv2d(fan_in, size, 3, stride=2, padding=1)
    return [halve, nn.GroupNorm(8, size), nn.ReLU()]


class Classifier(nn.Module):
    """Pictures (B, 3, 64, 64) in 0..1 to logits of names (B, 61) and styles (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*_stage(3, 32), *_stage(32, 64), *_stage(64, 96))
        self.top = nn.Sequential(*_stage(96, FEATURES), nn.Conv2d(FEATURES, FEATURES, 3, padding=1))
        self.name = nn.Linear(FEATURES, len(NAMES))
        self.style = nn.Linear(FEATURES, len(STYLE_NAMES))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 128), for comparing pictures."""
        return functional.relu(self.top(self.body(pictures * 2 - 1)).mean((2, 3)))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(pictures)
        return self.name(features), self.style(features)


def load_classifier(path: Path | None = None, device: torch.device | None = None) -> Classifier:
    """The one trained here or else the committed one, frozen."""
    path = path or (PATH if PATH.exists() else COMMITTED)
    model = Classifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.to(device or torch.device("cpu")).requires_grad_(False)


@torch.no_grad()
def classify(model: Classifier, pages: np.ndarray) -> tuple[list[str], list[str]]:
    """Names of the objects (or of nothing) and styles in pictures uint8 (B, 64, 64, 3)."""
    device = next(model.parameters()).device
    names, styles = [], []
    for part in np.array_split(pages, -(-len(pages) // _CHUNK)):
        of_name, of_style = model(to_input(part, device))
        names += [NAMES[n] for n in of_name.argmax(1).tolist()]
        styles += [STYLE_NAMES[n] for n in of_style.argmax(1).tolist()]
    return names, styles


@torch.no_grad()
def decoded(pages: np.ndarray, device: torch.device) -> np.ndarray:
    """Pictures uint8 (B, 64, 64, 3) as the autoencoder gives them back."""
    autoencoder, done = load_autoencoder(device), []
    for part in np.array_split(pages, -(-len(pages) // _CHUNK)):
        done.append(to_pages(autoencoder.decode(autoencoder.encode(to_input(part, device)))))
    return np.concatenate(done)


def _spoil(pictures: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
    """Tints, some blur, some noise: what a sampled picture may suffer from."""
    kept = torch.rand(3, generator=stream)
    if kept[0] < 0.5:
        pictures = functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    if kept[1] < 0.5:
        size = 0.08 * kept[2]
        pictures = pictures + size * torch.randn(pictures.shape, generator=stream).to(pictures)
    gain = 1 + 0.3 * (torch.rand(len(pictures), 3, 1, 1, generator=stream) - 0.5)
    return (pictures * gain.to(pictures)).clamp(0, 1)


def fit(
    model: Classifier,
    draw: Callable[[], Labelled],
    steps: int,
    stream: torch.Generator,
    log: Log,
) -> Classifier:
    """Train a judge on batches; what has no label counts nothing."""
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.02)
    clock = time.monotonic()
    for step in range(steps):
        set_rate(optimizer, cosine_rate(RATE, step, steps))
        pictures, *labels = draw()
        found = model(_spoil(vary_colours(pictures, stream), stream))
        loss = sum(
            functional.cross_entropy(scores, right.to(scores.device), label_smoothing=0.05)
            for scores, right in zip(found, labels, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            seconds = (time.monotonic() - clock) / 100
            log(f"step {step + 1}/{steps} loss {loss.item():.3f} {seconds:.2f} s/step")
            clock = time.monotonic()
    return model


def train(steps: int = STEPS) -> None:
    """Train from the start; a few minutes."""
    if PATH.exists():
        return
    log, device = Log("classifier"), pick_device()
    torch.manual_seed(2)
    pages = training_pictures(VARIANTS, seed=2)
    if AUTOENCODER.exists():
        again = pages[:, :, :DECODED].reshape(-1, SIZE, SIZE, 3)
        shape = (*pages.shape[:2], DECODED, SIZE, SIZE, 3)
        pages = np.concatenate([pages, decoded(again, device).reshape(shape)], 2)
    nothing = np.broadcast_to(empty_page(), (1, *pages.shape[1:]))
    pages = np.concatenate([pages, nothing])
    stream = torch.Generator().manual_seed(2)

    def draw() -> Labelled:
        places = [torch.randint(size, (BATCH,), generator=stream) for size in pages.shape[:3]]
        pictures = to_input(pages[tuple(place.numpy() for place in places)], device)
        styles = places[1].where(places[0] < len(OBJECT_NAMES), NO_LABEL)  # an empty page has none
        return pictures, places[0], styles

    model = fit(Classifier().to(device), draw, steps, stream, log)
    halves = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(halves, PATH)
    judge(log)


def judge(log: Log) -> tuple[float, float]:
    """Accuracy (object, style) on new variants of all pictures, as the autoencoder draws them."""
    device = pick_device()
    fresh = training_pictures(2, seed=99)
    flat, (rows, columns, count) = fresh.reshape(-1, SIZE, SIZE, 3), fresh.shape[:3]
    right_names = [OBJECT_NAMES[n] for n in range(rows) for _ in range(columns * count)]
    right_styles = [
        STYLE_NAMES[s] for _ in range(rows) for s in range(columns) for _ in range(count)
    ]
    scores = (0.0, 0.0)
    for label, pages in (("pictures", flat), ("decoded", decoded(flat, device))):
        names, styles = classify(load_classifier(device=device), pages)
        scores = (np.mean(np.equal(names, right_names)), np.mean(np.equal(styles, right_styles)))
        log(f"{label}: object {scores[0]:.4f} style {scores[1]:.4f}")
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    train(parser.parse_args().steps)
