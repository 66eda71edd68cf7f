"""UCE (Gandikota et al. 2024, arXiv 2308.14761), in closed form.

For every key and value matrix W, with ``c_i`` the last subject token's embedding of the i-th
concept, ``a_i`` that of its alternative and ``p_j`` those of the prompts to preserve:

``W' = argmin sum_i s |W' c_i - W a_i|^2 + sum_j |W' p_j - W p_j|^2 + lambda |W' - W|^2``
``   = (sum_i s W a_i c_i^T + sum_j W p_j p_j^T + lambda W)
     (sum_i s c_i c_i^T + sum_j p_j p_j^T + lambda 1)^-1``

Without an alternative an object goes to the empty prompt and a style to "art".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from concept_surgery.erase_core.model.denoiser import Denoiser
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from torch import Tensor

from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods.base import Method, Outcome, last_subject_token

# The phrasings that the concepts are widened to, where that is asked for.
PHRASINGS = {
    "object": ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
    "style": ("painting in {} style", "art in {} style", "picture in {} style", "{} style"),
}


def solve(
    sources: Tensor, targets: Tensor, preserved: Tensor, scale: float, ridge: float
) -> Tensor:
    """M (width, width) with ``W' = W M``.

    Args:
        sources, targets: c_i and a_i, (n, width).
        preserved: p_j, (m, width).
    """
    width = sources.shape[1]
    kept = preserved.T @ preserved + ridge * torch.eye(width, dtype=sources.dtype)
    left = scale * targets.T @ sources + kept
    right = scale * sources.T @ sources + kept
    return torch.linalg.solve(right, left.T).T


def train(denoiser: Denoiser, case: Case, seed: int, settings: Mapping[str, Any]) -> Outcome:
    """``settings``: scale of the concepts, ridge, phrasings (whether they are widened)."""
    pairs = [
        (c.text, c.alternative or ("art" if case.kind == "style" else "")) for c in case.concepts
    ]
    if settings["phrasings"]:
        pairs += [(f.format(e), f.format(a)) for e, a in pairs for f in PHRASINGS[case.kind]]
    sources, targets = (
        torch.stack([last_subject_token(denoiser, text) for text in texts])
        for texts in zip(*pairs, strict=True)
    )
    preserved = torch.stack([last_subject_token(denoiser, text) for text in case.keep])
    mixing = solve(sources, targets, preserved, settings["scale"], settings["ridge"])
    change = (mixing - torch.eye(len(mixing), dtype=mixing.dtype)).T.float()
    matrices = denoiser.matrices()
    # dW = W (M - 1): B = W, R = (M - 1)^T.
    factors = {name: weight.float().clone() for name, weight in matrices.items()}
    return Outcome(LowRankEdit.shared(change, factors))


PUBLISHED = {"scale": 1.0, "ridge": 0.5, "phrasings": False}
UCE = Method("uce", train, PUBLISHED, "key-value", ("uce.py",))
GRID = tuple(
    {"ridge": ridge, "phrasings": wide} for wide in (False, True) for ridge in (0.5, 5.0, 50.0)
)
