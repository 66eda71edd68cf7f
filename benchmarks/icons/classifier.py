"""The judge of pictures: which thing, if any, in which style.

The first model's classifier with other heads, trained in the same way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.emoji.autoencoder import to_input
from benchmarks.emoji.classifier import BATCH, FEATURES, NO_LABEL, Classifier, Labelled, fit
from benchmarks.emoji.loop import pick_device
from benchmarks.emoji.words import NOTHING
from benchmarks.icons.data import FOLDER, SIZE, empty_page, training_pictures
from benchmarks.icons.latents import fitted_patches
from benchmarks.icons.loop import Log
from benchmarks.icons.words import STYLE_NAMES, THING_NAMES

PATH = FOLDER / "classifier.safetensors"
COMMITTED = Path(__file__).parent / "weights" / "classifier.safetensors"
NAMES = (*THING_NAMES, NOTHING)
STEPS, VARIANTS = 1500, 24
_CHUNK = 64


class Judge(Classifier):
    """Pictures (B, 3, 64, 64) in 0..1 to logits of names (B, 65) and styles (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.name = nn.Linear(FEATURES, len(NAMES))
        self.style = nn.Linear(FEATURES, len(STYLE_NAMES))


def load_judge(path: Path | None = None, device: torch.device | None = None) -> Judge:
    """The one trained here or else the committed one, frozen."""
    path = path or (PATH if PATH.exists() else COMMITTED)
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.to(device or torch.device("cpu")).requires_grad_(False)


@torch.no_grad()
def classify(judge: Judge, pages: np.ndarray) -> tuple[list[str], list[str]]:
    """Names of the things (or of nothing) and styles in pictures uint8 (B, 64, 64, 3)."""
    device = next(judge.parameters()).device
    names, styles = [], []
    for begin in range(0, len(pages), _CHUNK):
        of_name, of_style = judge(to_input(pages[begin : begin + _CHUNK], device))
        names += [NAMES[n] for n in of_name.argmax(1).tolist()]
        styles += [STYLE_NAMES[n] for n in of_style.argmax(1).tolist()]
    return names, styles


def decoded(pages: np.ndarray) -> np.ndarray:
    """Pictures uint8 (B, 64, 64, 3) as the latents give them back."""
    patches = fitted_patches()
    parts = np.array_split(pages, -(-len(pages) // _CHUNK))
    return np.concatenate([patches.pages(patches.encoded(part)) for part in parts])


def train(steps: int = STEPS) -> None:
    """Train from the start; a few minutes on two cores."""
    if PATH.exists():
        return
    log, device = Log("classifier"), pick_device()
    torch.manual_seed(2)
    pages = training_pictures(VARIANTS, seed=2)
    again = decoded(pages[:, :, : VARIANTS // 2].reshape(-1, SIZE, SIZE, 3))
    again = again.reshape(*pages.shape[:2], -1, SIZE, SIZE, 3)
    pages = np.concatenate([pages, again], 2)
    nothing = np.broadcast_to(empty_page(), (1, *pages.shape[1:]))
    pages = np.concatenate([pages, nothing])
    stream = torch.Generator().manual_seed(2)

    def draw() -> Labelled:
        places = [torch.randint(size, (BATCH,), generator=stream) for size in pages.shape[:3]]
        pictures = to_input(pages[tuple(place.numpy() for place in places)], device)
        styles = places[1].where(places[0] < len(THING_NAMES), NO_LABEL)  # an empty page has none
        return pictures, places[0], styles

    judge = fit(Judge().to(device), draw, steps, stream, log)
    halves = {name: value.half().contiguous() for name, value in judge.state_dict().items()}
    save_file(halves, PATH)
    log(f"thing and style right in new variants: {accuracy()}")


def accuracy() -> dict[str, float]:
    """Share of new variants of all pictures, as they are and decoded, judged right in both."""
    pages = training_pictures(2, seed=99)
    rows, columns, count = pages.shape[:3]
    right = [(name, style) for name in THING_NAMES for style in STYLE_NAMES for _ in range(count)]
    flat, judge = pages.reshape(rows * columns * count, SIZE, SIZE, 3), load_judge()
    shares = {}
    for label, shown in (("pictures", flat), ("decoded", decoded(flat))):
        found = zip(*classify(judge, shown), strict=True)
        shares[label] = float(np.mean([a == b for a, b in zip(found, right, strict=True)]))
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    train(parser.parse_args().steps)
