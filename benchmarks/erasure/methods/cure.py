"""CURE (Biswas, Roy and Roy 2025, arXiv 2505.12677): the concept's directions are projected out.

For every key and value matrix W, with ``u_i`` and ``s_i`` the singular directions and values of the
token embeddings of the concepts (f) or of what is retained (r):

``W' = W (1 - (P_f - P_f P_r)),  P = sum_i l_i u_i u_i^T``
``l_i = alpha r_i / ((alpha - 1) r_i + 1),  r_i = s_i^2 / sum_j s_j^2``

At alpha 1 the weights are the shares of energy; as alpha grows, P becomes the projection onto all
directions. A concept goes to nothing, its keys and values lose that part; an alternative has no
place. Several concepts are one set of embeddings.

The authors' code for erasing isn't public. The equations and alpha 2 (5 for nudity alone) are from
readers of the paper who quote them and agree. What could not be confirmed: which tokens are in a
set, where the abstract says "token embeddings", and what is retained, which one reader leaves empty
for objects. Decided: all tokens of the bare words, padding too, and the keep prompts retained; the
last subject tokens alone, and nothing retained, are in the grid. Where the method is told the
phrasings, it also retains what stands in their place: else "a photo of" would go as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from concept_surgery.erase_core.model.denoiser import Denoiser
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from torch import Tensor

from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods.base import Method, Outcome, last_subject_token
from benchmarks.erasure.methods.phrased import phrased


def projector(rows: Tensor, alpha: float) -> Tensor:
    """P (width, width) of the rows (n, width); zero where there are none."""
    if not len(rows):
        return rows.new_zeros(rows.shape[1], rows.shape[1])
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    shares = sizes.square() / sizes.square().sum()
    weights = alpha * shares / ((alpha - 1) * shares + 1)
    return directions.T * weights @ directions


def eraser(forgotten: Tensor, retained: Tensor, alpha: float) -> Tensor:
    """``P_f - P_f P_r`` (width, width) of two sets of rows."""
    erased = projector(forgotten, alpha)
    return erased - erased @ projector(retained, alpha)


def train(denoiser: Denoiser, case: Case, seed: int, settings: Mapping[str, Any]) -> Outcome:
    """``settings``: alpha, tokens, retained.

    The tokens are "all" or "subject", the last subject tokens; retained are "none", the "keep"
    prompts, or those and the "alternatives".
    """
    keep = list(case.keep) if settings["retained"] != "none" else []
    if settings["retained"] == "alternatives":
        keep += [c.alternative for c in case.concepts if c.alternative != c.text]
    forgotten = _rows(denoiser, case.erased, settings["tokens"])
    retained = _rows(denoiser, keep, settings["tokens"]) if keep else forgotten[:0]
    change = -eraser(forgotten, retained, settings["alpha"]).T.float()
    # dW = -W (P_f - P_f P_r): B = W.
    factors = {name: weight.float().clone() for name, weight in denoiser.matrices().items()}
    return Outcome(LowRankEdit.shared(change, factors))


def _rows(denoiser: Denoiser, texts: Sequence[str], tokens: str) -> Tensor:
    """The embeddings of the texts (n, width)."""
    if tokens == "subject":
        return torch.stack([last_subject_token(denoiser, text) for text in texts])
    return torch.cat([denoiser.encode([text])[0].tokens.double() for text in texts])


PUBLISHED = {"alpha": 2.0, "tokens": "all", "retained": "keep"}
CURE = Method("cure", train, PUBLISHED, "key-value", ("cure.py",))
CURE_PHRASED = phrased(CURE.with_settings(CURE.name, retained="alternatives"))
PHRASED_GRID = ({}, {"alpha": 5.0}, {"tokens": "subject"}, {"tokens": "subject", "alpha": 5.0})
GRID = (
    {},
    {"alpha": 5.0},
    {"tokens": "subject"},
    {"retained": "none"},
    {"retained": "none", "alpha": 5.0},
    {"retained": "none", "tokens": "subject"},
)
