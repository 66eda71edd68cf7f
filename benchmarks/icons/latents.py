"""Pictures to latents and back: the main components of patches of 4 x 4 pixels, fixed and linear.

A picture of 64 x 64 pixels becomes 16 x 16 patches of 16 numbers. They are scaled halfway to equal
size: as they come fine detail would drown in the noise, and at equal sizes it would weigh as much
as colour.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.emoji.autoencoder import to_input, to_pages
from benchmarks.icons.data import SIZE, training_pictures

PATCH, CHANNELS = 4, 16
SIDE = SIZE // PATCH
_NUMBERS = 3 * PATCH**2


class Patches(nn.Module):
    """The map and its way back, empty until it is fitted or loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(_NUMBERS))
        self.register_buffer("basis", torch.zeros(_NUMBERS, CHANNELS))
        self.register_buffer("size", torch.ones(CHANNELS))

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents (B, 16, 16, 16) of pictures (B, 3, 64, 64) in 0..1."""
        numbers = functional.pixel_unshuffle(pictures, PATCH).permute(0, 2, 3, 1)
        return ((numbers - self.mean) @ self.basis / self.size).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The way back from :meth:`encode`."""
        numbers = (latents.permute(0, 2, 3, 1) * self.size) @ self.basis.T + self.mean
        return functional.pixel_shuffle(numbers.permute(0, 3, 1, 2), PATCH)

    def encoded(self, pages: np.ndarray) -> torch.Tensor:
        """Latents of pictures uint8 (B, 64, 64, 3)."""
        return self.encode(to_input(pages, self.mean.device))

    def pages(self, latents: torch.Tensor) -> np.ndarray:
        """Pictures uint8 (B, 64, 64, 3) of latents."""
        return to_pages(self.decode(latents))


def fitted_patches() -> Patches:
    """Fitted to two variants of every picture."""
    pages = training_pictures(2, seed=1).reshape(-1, SIZE, SIZE, 3)
    numbers = functional.pixel_unshuffle(to_input(pages, torch.device("cpu")), PATCH)
    rows = numbers.permute(0, 2, 3, 1).reshape(-1, _NUMBERS).double()
    mean = rows.mean(0)
    spread, basis = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    size = spread.flip(0)[:CHANNELS].pow(0.25)
    size *= (spread.flip(0)[:CHANNELS] / size.square()).mean().sqrt()  # latents of variance 1
    patches = Patches()
    patches.load_state_dict(
        {"mean": mean.float(), "basis": basis.flip(1)[:, :CHANNELS].float(), "size": size.float()}
    )
    return patches
