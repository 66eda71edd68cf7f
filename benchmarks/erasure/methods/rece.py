"""RECE (Gong et al. 2024, arXiv 2407.12383): UCE, and then what would revive the concept, in turn.

In each round, with ``W'`` the matrices so far, ``c`` the concept's token embeddings, ``a`` those in
their place and ``p_j`` those of the empty prompt and of the prompts to preserve, the embeddings
that still draw the concept are derived, and erased:

``c' = argmin sum_W |W' c' - W c|^2 + revival |c'|^2``
``   = (sum_W W'^T W' + revival 1)^-1 (sum_W W'^T W) c``
``W'' = argmin |W'' c' - W' a|^2 + preserve sum_j |W'' p_j - W' p_j|^2 + ridge |W'' - W'|^2``

The sums are over all key and value matrices; c, a and p are all tokens of a prompt, place by place,
padding too. Without an alternative an object goes to the empty prompt and a style to "art".

Equations and settings are those of the authors' code and README (github.com/CharlesGong12/RECE):
one round for objects and styles, preserve and ridge 0.1, revival 0.001 for styles. For objects it
is 0.1 where UCE finds them easy and 0.001 where it doesn't, which nobody knows beforehand: 0.1
here, and the other in the grid. With which coefficients its UCE began is not said; the names of its
files have those of UCE's defaults, so it begins with UCE as it is here, last subject tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from concept_surgery.erase_core.model.denoiser import Denoiser
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from torch import Tensor

from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods import uce
from benchmarks.erasure.methods.base import Method, Outcome
from benchmarks.erasure.methods.phrased import phrased


def revived(rows: Tensor, gram: Tensor, mixing: Tensor, ridge: float) -> Tensor:
    """c' (n, width): what the matrices ``W' = W M`` see as W sees c.

    Args:
        rows: c, (n, width).
        gram: the sum of ``W^T W`` over the matrices, (width, width).
        mixing: M, (width, width).
    """
    crossed = mixing.T @ gram
    inner = crossed @ mixing + ridge * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(inner, crossed @ rows.T).T


def train(denoiser: Denoiser, case: Case, seed: int, settings: Mapping[str, Any]) -> Outcome:
    """``settings``: rounds, revival by kind, preserve and ridge."""
    nothing = "art" if case.kind == "style" else ""
    erased = _tokens(denoiser, case.erased)
    instead = _tokens(denoiser, [concept.alternative or nothing for concept in case.concepts])
    kept = _tokens(denoiser, ["", *case.keep]) * settings["preserve"] ** 0.5
    start = uce.train(denoiser, case, seed, uce.PUBLISHED).edit
    factors = dict(start.factors)  # W itself, see there
    change = next(iter(start.bases.values())).T.double()
    mixing = torch.eye(len(change), dtype=change.dtype) + change
    gram = sum(weight.double().T @ weight.double() for weight in factors.values())
    for _ in range(settings["rounds"]):
        derived = revived(erased, gram, mixing, settings["revival"][case.kind])
        mixing = mixing @ uce.solve(derived, instead, kept, 1.0, settings["ridge"])
    # dW = W (M - 1): B = W, R = (M - 1)^T.
    change = (mixing - torch.eye(len(mixing), dtype=mixing.dtype)).T.float()
    return Outcome(LowRankEdit.shared(change, factors))


def _tokens(denoiser: Denoiser, texts: Sequence[str]) -> Tensor:
    """All tokens of the texts, one after the other, (n, width)."""
    return torch.cat([denoiser.encode([text])[0].tokens.double() for text in texts])


def _revival(scale: float) -> dict[str, dict[str, float]]:
    return {"revival": {"object": scale, "style": scale}}


PUBLISHED = {
    "rounds": 1,
    "revival": {"object": 0.1, "style": 0.001},
    "preserve": 0.1,
    "ridge": 0.1,
}
RECE = Method("rece", train, PUBLISHED, "key-value", ("rece.py", "uce.py"))
RECE_PHRASED = phrased(RECE)
# Not more rounds: after three, "fox" had values 25 times as long on the emoji model.
STEADY = {"preserve": 1.0, "ridge": 1.0}
GRID = ({}, _revival(0.001), {"preserve": 1.0}, STEADY, {**STEADY, "ridge": 10.0})
PHRASED_GRID = GRID
