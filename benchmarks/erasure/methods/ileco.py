"""iLECO (sd-webui-traintrain): move the concept's prediction onto the alternative's.

``w(sigma) |eps_th(z,e) - eps*(z,a)|^2`` where z is one batch of pure noise, drawn before the loop
and never noised to the level that is asked about; ``a`` is the empty prompt without an
alternative. Into a LoRA. It knows no keep prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from concept_surgery.erase_core.model.denoiser import Denoiser

from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods.base import Lora, Method, Outcome, in_turn, predict_eps

LEVELS = 1000


def train(denoiser: Denoiser, case: Case, seed: int, settings: Mapping[str, Any]) -> Outcome:
    """``settings``: steps, rate, batch, rank, alpha, snr_gamma."""
    generator = torch.Generator().manual_seed(seed)
    lora = Lora(denoiser.matrices(), settings["rank"], settings["alpha"], generator)
    optimiser = torch.optim.AdamW(lora.parameters(), settings["rate"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings["steps"])
    levels, count = denoiser.sigmas(LEVELS)[:-1], settings["batch"]
    pairs = [denoiser.encode([c.text, c.alternative]) for c in case.concepts]
    noise = torch.randn(count, *denoiser.latent_shape(64), generator=generator)
    losses = []
    for step in range(settings["steps"]):
        concept, instead = in_turn(pairs, step)
        sigma = levels[torch.randint(len(levels), (count,), generator=generator)]
        # Of unit variance at every level, as the network's input is.
        x = noise * (1 + sigma**2).sqrt().view(-1, 1, 1, 1)
        with torch.no_grad():
            target = predict_eps(denoiser, x, sigma, [instead] * count)
        student = predict_eps(denoiser, x, sigma, [concept] * count, lora.edit())
        weight = (settings["snr_gamma"] * sigma**2).clamp(max=1)  # min(snr, gamma) / snr
        loss = ((student - target).square().mean((1, 2, 3)) * weight).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-20:]
    return Outcome(lora.edit().to("cpu"), {"loss": sum(last) / len(last)})


PUBLISHED = {
    "steps": 500,
    "rate": 5e-4,
    "batch": 2,
    "rank": 4,
    "alpha": 8.0,
    "snr_gamma": 5.0,
}
ILECO = Method("ileco", train, PUBLISHED, "transformer", ("ileco.py",))
GRID = ({"rate": 1e-4}, {"rate": 5e-4}, {"rate": 2e-3})
