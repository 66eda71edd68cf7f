"""What the trainings share: the device, a log, checkpoints to go on from, averages."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.emoji.data import FOLDER


def pick_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed(device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16, as while training: half the time on a CPU that has it.

    On one that hasn't it would be many times slower, so there they stay in float32.
    """
    has_it = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=has_it)


class Log:
    """Lines with the time, on the screen and in ``build/emoji/<name>.log``."""

    def __init__(self, name: str) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self._path = FOLDER / f"{name}.log"

    def __call__(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write and rename into place, so that no half file is ever read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    torch.save(state, partial)
    partial.replace(path)


def load(path: Path) -> dict[str, Any] | None:
    """What ``save`` wrote, or None."""
    if not path.exists():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def cosine_rate(peak: float, step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to nothing."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class Average:
    """Exponential moving average of a module's parameters; short at first, so it is soon good."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the parameters after ``step`` steps."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        new = [value.detach() for _, value in module.named_parameters()]
        torch._foreach_lerp_(list(self.values.values()), new, weight)
