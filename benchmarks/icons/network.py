"""What is trained: a T5 encoder over whole words and diffusers' U-Net, a rectified flow, as one.

``x = (1 - s) x0 + s noise`` with ``s`` in (0, 1]; the network predicts the velocity ``noise - x0``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from benchmarks.icons.latents import CHANNELS, SIDE, Patches
from benchmarks.icons.libraries import T5Config, T5EncoderModel, UNet2DConditionModel
from benchmarks.icons.words import split_words, vocabulary

WIDTH, ROWS = 128, 24  # of what the text encoder gives
PADDING, END, UNKNOWN, SPECIAL = 0, 1, 2, 3  # the words' own numbers begin at SPECIAL
STEPS, GUIDANCE = 10, 4.0
TIMES = 1000  # what the U-Net's clock counts to


@cache
def _numbers() -> dict[str, int]:
    return {word: number for number, word in enumerate(vocabulary(), SPECIAL)}


def tokenize(texts: Sequence[str]) -> torch.Tensor:
    """Word numbers (B, 24): the words, one end token, and padding that is encoded like the rest."""
    rows = torch.full((len(texts), ROWS), PADDING)
    for row, text in zip(rows, texts, strict=True):
        words = [_numbers().get(word, UNKNOWN) for word in split_words(text)[: ROWS - 1]]
        row[: len(words) + 1] = torch.tensor([*words, END])
    return rows


def build_text_encoder() -> T5EncoderModel:
    """With fresh weights. Every row sees every other, padding too."""
    config = T5Config(
        vocab_size=len(vocabulary()) + SPECIAL,
        d_model=WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=4,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=ROWS,
        pad_token_id=PADDING,
        eos_token_id=END,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_unet() -> UNet2DConditionModel:
    """With fresh weights; prompts are read at 8 x 8 and at 4 x 4."""
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(80, 128, 160),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads, whatever it is called
        norm_num_groups=16,
    )


class Network(nn.Module):
    """Text encoder, denoiser and the map from pictures to latents."""

    def __init__(self, patches: Patches | None = None) -> None:
        super().__init__()
        self.text, self.unet = build_text_encoder(), build_unet()
        self.patches = patches or Patches()

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """States (B, 24, 128) of word numbers (B, 24)."""
        everything = torch.ones_like(tokens)
        return self.text(input_ids=tokens, attention_mask=everything).last_hidden_state

    def velocity(self, x: torch.Tensor, s: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """``noise - x0`` (B, 16, 16, 16) at noise levels (B,), under prompts (B, 24, 128)."""
        return self.unet(x, TIMES * s, states).sample


def noise_levels(steps: int) -> torch.Tensor:
    """Where a sampler stops on its way: ``steps + 1`` falling numbers from 1 to 0."""
    return torch.linspace(1, 0, steps + 1)


@torch.no_grad()
def sample(
    network: Network,
    states: torch.Tensor,
    against: torch.Tensor,
    noise: torch.Tensor,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """Euler's method with guidance: latents (B, 16, 16, 16).

    Args:
        states: of the prompts, (B, 24, 128).
        against: of the negative prompts, (B, 24, 128).
        noise: (B, 16, 16, 16).
    """
    x, both = noise, torch.cat([states, against])
    levels = noise_levels(steps).tolist()
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        at = torch.full((len(both),), now, device=x.device)
        given = x.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        with_text, without = network.velocity(given, at, both).float().chunk(2)
        x = x + (without + guidance * (with_text - without)) * (after - now)
    return x
