"""A toy denoiser with blocks that a backward keeps much of."""

from __future__ import annotations

import torch
from concept_surgery.erase_core.files.fingerprint import fingerprint
from concept_surgery.erase_core.model.low_rank import LowRankSidePath
from torch import nn

from .toy import CHANNELS, WIDTH, ToyDenoiser

HIDDEN, BLOCKS = 24, 10


class Block(nn.Module):
    """Cross-attention and a gated perceptron, as U-Nets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.query, self.norm = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 8 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, pixels, tokens):
        weights = self.query(self.norm(pixels)) @ self.key(tokens).transpose(1, 2)
        pixels = pixels + (weights / 5).softmax(dim=-1) @ self.value(tokens)
        passed, gate = self.up(self.norm(pixels)).chunk(2, dim=-1)
        return pixels + self.down(passed * nn.functional.gelu(gate))


class DeepToy(ToyDenoiser):
    """As the toy, with :data:`BLOCKS` blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS)).requires_grad_(False)
        self.enter = nn.Linear(CHANNELS, HIDDEN).requires_grad_(False)
        self.leave = nn.Linear(HIDDEN, CHANNELS).requires_grad_(False)
        self._trained = {
            f"toy_{number}_attn2_to_{which[0]}": getattr(block, which)
            for number, block in enumerate(self.blocks)
            for which in ("key", "value")
        }
        self.names = self._trained.keys()
        self._side_path = LowRankSidePath(self._trained)
        self.base = {"name": "deep toy", "fingerprint": fingerprint(self.matrices())}

    def weights(self):
        return [w for m in (self.blocks, self.enter, self.leave) for w in m.parameters()]

    def network(self, pixels, tokens, run):
        pixels = self.enter(pixels)
        for block in self.blocks:
            pixels = run(block, pixels, tokens)
        return self.leave(pixels)
