"""ESD (Gandikota et al. 2023, arXiv 2303.07345) with its settings of 2025.

``|eps_th(x,e) - [eps*(x,0) - eta (eps*(x,e) - eps*(x,0))]|^2`` on states of the frozen model's own
guided trajectory under ``e``, stopped at a random step. The 2025 code writes the target as
``eps*(e) - 2 (eps*(e) - eps*(0))``, which is eta = 1 here. It knows no alternative and no keep
prompts. Biases stay as they are: only matrices can be edited here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from concept_surgery.erase_core.denoiser import Denoiser

from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods.base import (
    Method,
    Outcome,
    in_turn,
    partly_denoised,
    predict_eps,
    whole_matrices,
)


def train(denoiser: Denoiser, case: Case, seed: int, settings: Mapping[str, Any]) -> Outcome:
    """``settings``: steps, rate, eta, guidance and sampling_steps of the trajectories."""
    generator = torch.Generator().manual_seed(seed)
    edit = whole_matrices(denoiser.matrices())
    optimiser = torch.optim.Adam(list(edit.factors.values()), settings["rate"])
    sigmas = denoiser.sigmas(settings["sampling_steps"])
    null, *concepts = denoiser.encode(["", *case.erased])
    shape, losses = denoiser.latent_shape(64), []
    for step in range(settings["steps"]):
        concept = in_turn(concepts, step)
        stop = int(torch.randint(settings["sampling_steps"], (1,), generator=generator))
        x = partly_denoised(
            denoiser,
            torch.randn(1, *shape, generator=generator),
            *(null, concept, sigmas, stop, settings["guidance"]),
            bfloat16=True,
        )
        sigma = sigmas[stop].view(1)
        with torch.no_grad():
            eps = predict_eps(denoiser, x.repeat(2, 1, 1, 1), sigma.repeat(2), [null, concept])
        target = eps[:1] - settings["eta"] * (eps[1:] - eps[:1])
        loss = (predict_eps(denoiser, x, sigma, [concept], edit) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    last = losses[-20:]
    return Outcome(edit.to("cpu"), {"loss": sum(last) / len(last)})


PUBLISHED = {"steps": 200, "rate": 5e-5, "eta": 1.0, "guidance": 3.0, "sampling_steps": 50}
X = Method("esd-x", train, PUBLISHED, "cross-attention", ("esd.py",))
X_STRICT = Method("esd-x-strict", train, PUBLISHED, "key-value", ("esd.py",))
GRID = ({"rate": 2e-5}, {"rate": 5e-5}, {"rate": 1.5e-4}, {"rate": 5e-4})
