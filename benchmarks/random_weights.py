"""A network of real size whose weights know nothing: time and memory don't depend on them."""

from __future__ import annotations

import torch
from torch import nn


def fill_network(network: nn.Module, seed: int = 0) -> None:
    """Matrices and kernels of unit gain, norms as they begin, no biases."""
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        else:
            weight.fill_(0)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            module.weight.fill_(1)
