"""What is trained: the host's own classes of Z-Image, small, and the map from pictures to latents.

The transformer is the host's ``NextDiT`` and the text encoder the host's ``Qwen3_4B``, both with
sizes of their own. ``x = (1 - s) x0 + s noise``; the network predicts the velocity ``noise - x0``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.flow.text import PADDED, WIDTH, TextEncoder
from benchmarks.icons.latents import CHANNELS, Patches
from tools.pack import use_host

# Z-Image's configuration but for the sizes and for the modulation, which is Lumina 2's: Z-Image's
# asks for a width of 256 at least.
CONFIG = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": CHANNELS,
    "dim": 192,
    "cap_feat_dim": WIDTH,
    "n_layers": 4,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 4,
    "qk_norm": True,
    "axes_dims": [16, 16, 16],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "time_scale": 1000.0,
    "pad_tokens_multiple": PADDED,
}
SHIFT = 3.0  # of the noise levels, as the host samples Z-Image
STEPS, GUIDANCE = 10, 4.0
_GATE = 0.5  # where the gates of the blocks begin: half open


def build_transformer() -> nn.Module:
    """The host's class with fresh weights."""
    use_host()
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True
    import comfy.ops
    from comfy.ldm.lumina.model import NextDiT

    model = NextDiT(**CONFIG, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            nn.init.constant_(weight, 1.0 if name.endswith("weight") else 0.0)  # norms; biases
        elif "pad_token" in name:
            nn.init.normal_(weight, std=0.5)
        else:
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))
    for name, module in model.named_modules():
        if name.endswith("adaLN_modulation"):
            nn.init.normal_(module[-1].weight, std=0.2 / math.sqrt(module[-1].in_features))
            if "final" not in name:  # scale, gate, scale, gate
                module[-1].bias.data.view(4, -1)[1::2] = _GATE
    nn.init.zeros_(model.final_layer.linear.weight)
    return model


class Network(nn.Module):
    """Text encoder, transformer and the map from pictures to latents."""

    def __init__(self, rows: Sequence[int], patches: Patches | None = None) -> None:
        super().__init__()
        self.text, self.transformer = TextEncoder(rows), build_transformer()
        self.patches = patches or Patches()

    def entering(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What the entry layer reads of token ids (B, rows): normed states, zeros after the end."""
        normed = self.transformer.cap_embedder[0](self.text(tokens))
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return normed * (places < lengths[:, None])[..., None]

    def velocity(self, x: torch.Tensor, s: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """``noise - x0`` (B, 16, 16, 16), as the host's forward gives it for each prompt by itself.

        Args:
            x: noisy latents (B, 16, 16, 16).
            s: noise levels (B,).
            read: what the entry layer reads, (B, 32 or a multiple, width). Where all is zero the
                padding stands that the network has learned.
        """
        model = self.transformer
        time = model.t_embedder((1 - s) * model.time_scale, dtype=x.dtype)
        real = (read != 0).any(-1, keepdim=True)
        tokens = torch.where(real, model.cap_embedder[1](read), model.cap_pad_token)
        count = tokens.shape[1]
        rows, _, sizes, begin, turns = model.patchify_and_embed(x, tokens, None, time, count)
        for layer in model.layers:
            rows = layer(rows, None, turns, time)
        return -model.unpatchify(model.final_layer(rows, time), sizes, begin, return_tensor=True)


def noise_levels(steps: int) -> torch.Tensor:
    """Where a sampler stops on its way: ``steps + 1`` falling numbers from 1 to 0."""
    even = torch.linspace(1, 0, steps + 1)
    return SHIFT * even / (1 + (SHIFT - 1) * even)


@torch.no_grad()
def sample(
    network: Network,
    read: torch.Tensor,
    against: torch.Tensor,
    noise: torch.Tensor,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """Euler's method with guidance: latents (B, 16, 16, 16).

    Args:
        read: what the entry layer reads of the prompts, (B, rows, width).
        against: of the negative prompts, likewise.
        noise: (B, 16, 16, 16).
    """
    x, levels = noise, noise_levels(steps).tolist()
    both = torch.cat([read, against])
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        at = torch.full((len(both),), now, device=x.device)
        with_text, without = network.velocity(x.repeat(2, 1, 1, 1), at, both).chunk(2)
        x = x + (without + guidance * (with_text - without)) * (after - now)
    return x
