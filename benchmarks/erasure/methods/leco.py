"""ESD into a LoRA, as LECO (p1atdev, 2023) does it.

``|eps_th(x,e) - [eps*(x,0) - s (eps*(x,e) - eps*(x,0))]|^2`` with s = 1, on states of the trained
model's own guided trajectory, stopped at a random step. It knows no keep prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from concept_surgery.erase_core.model.denoiser import Denoiser

from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods.base import (
    Lora,
    Method,
    Outcome,
    in_turn,
    partly_denoised,
    predict_eps,
)


def train(denoiser: Denoiser, case: Case, seed: int, settings: Mapping[str, Any]) -> Outcome:
    """``settings``: steps, rate, batch, rank, alpha, scale, guidance, sampling_steps."""
    generator = torch.Generator().manual_seed(seed)
    lora = Lora(denoiser.matrices(), settings["rank"], settings["alpha"], generator)
    optimiser = torch.optim.AdamW(lora.parameters(), settings["rate"])
    sigmas = denoiser.sigmas(settings["sampling_steps"])
    null, *concepts = denoiser.encode(["", *case.erased])
    count, shape, losses = settings["batch"], denoiser.latent_shape(64), []
    for step in range(settings["steps"]):
        concept = in_turn(concepts, step)
        stop = int(torch.randint(1, settings["sampling_steps"], (1,), generator=generator))
        with _converted_once(denoiser):
            x = partly_denoised(
                denoiser,
                torch.randn(count, *shape, generator=generator),
                *(null, [concept] * count, sigmas, [stop] * count, settings["guidance"]),
                edit=lora.edit(),
                bfloat16=True,
            )
        sigma = sigmas[stop].repeat(count)
        with torch.no_grad():
            prompts = [null] * count + [concept] * count
            eps = predict_eps(denoiser, x.repeat(2, 1, 1, 1), sigma.repeat(2), prompts)
        plain, towards = eps.chunk(2)
        target = plain - settings["scale"] * (towards - plain)
        student = predict_eps(denoiser, x, sigma, [concept] * count, lora.edit())
        loss = (student - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    last = losses[-20:]
    return Outcome(lora.edit().to("cpu"), {"loss": sum(last) / len(last)})


@contextmanager
def _converted_once(denoiser: Denoiser) -> Iterator[None]:
    """Within it, autocast converts each frozen weight once a trajectory, not once an evaluation.

    It keeps what it converted of leaves that want a gradient only, and a trajectory takes none.
    That saves a quarter of the time and changes no number.
    """
    frozen = [w for w in denoiser.weights() if isinstance(w, torch.nn.Parameter)]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


PUBLISHED = {
    "steps": 500,
    "rate": 1e-4,
    "batch": 2,
    "rank": 4,
    "alpha": 1.0,
    "scale": 1.0,
    "guidance": 3.0,
    "sampling_steps": 50,
}
LECO = Method("leco", train, PUBLISHED, "transformer", ("leco.py",))
# A batch of one and fewer steps: what a tuning can afford.
SHORT = {"steps": 150, "batch": 1, "sampling_steps": 25}
GRID = ({**SHORT, "rate": 3e-4}, {**SHORT, "rate": 1e-3}, {**SHORT, "rate": 3e-3})
