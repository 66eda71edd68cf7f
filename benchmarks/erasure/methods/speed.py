"""SPEED (Li et al. 2025, arXiv 2503.07392): closed form in the null space of what must stay.

For every value matrix W, with the last subject tokens' embeddings ``C1`` of the concepts, ``A`` of
their alternatives and ``C0`` of many words to retain:

``min |(dW) C1 - W (A - C1)|^2 + |dW|^2  with  dW = dW P,  dW C2 = 0``

``P`` projects onto the directions in which the mean of ``c c^T`` over C0 is below a threshold, and
``C2`` are the start token and three k-means centres of the empty prompt's other tokens (invariant
equality constraint). The words of C0 that the unconstrained edit changes more than the average are
taken (prior filter) and varied along the weakest direction of W (directed augmentation).

The paper retains lists of concepts of the same kind; here they are words of the plain captions
that this project ships, and the keep prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from concept_surgery.erase_core.method.reading import plain_captions
from concept_surgery.erase_core.model.denoiser import Denoiser
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from torch import Tensor

from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods.base import Method, Outcome, last_subject_token

WORDS = 300
CENTRES, ROUNDS = 3, 20


def null_space(retained: Tensor, threshold: float) -> Tensor:
    """Orthonormal columns (width, m): where the mean of ``c c^T`` is below the threshold.

    Args:
        retained: C0, (n, width).
    """
    values, vectors = torch.linalg.eigh(retained.T @ retained / len(retained))
    return vectors[:, values < threshold]


def solve(sources: Tensor, change: Tensor, space: Tensor, invariant: Tensor) -> Tensor:
    """D (out, width), the change of a matrix.

    In coordinates of the space that is left by P and the equality constraint, it is a ridge
    regression with ridge 1.

    Args:
        sources: C1, (n, width).
        change: ``W (A - C1)``, (n, out).
        space: columns of P's space, (width, m).
        invariant: C2, (k, width).
    """
    # Directions of the space that no column of C2 has a part in.
    _, sizes, directions = torch.linalg.svd(invariant @ space)
    rank = int((sizes > 1e-9 * sizes[0]).sum()) if len(sizes) else 0
    free = space @ directions[rank:].T
    inner = sources @ free
    ridge = inner.T @ inner / len(sources) + torch.eye(free.shape[1], dtype=free.dtype)
    return torch.linalg.solve(ridge, inner.T @ change / len(sources)).T @ free.T


def train(denoiser: Denoiser, case: Case, seed: int, settings: Mapping[str, Any]) -> Outcome:
    """``settings``: threshold, augmented (copies of each word), keys (also the key matrices)."""
    generator = torch.Generator().manual_seed(seed)
    sources, targets = (
        torch.stack([last_subject_token(denoiser, text) for text in texts])
        for texts in zip(*[(c.text, c.alternative) for c in case.concepts], strict=True)
    )
    texts = [*words_to_retain(case), *case.keep]
    words = torch.stack([last_subject_token(denoiser, text) for text in texts])
    invariant = _invariant(denoiser, generator)
    wanted = {
        name: weight.double()
        for name, weight in denoiser.matrices().items()
        if settings["keys"] or name.endswith("_to_v")
    }
    factors, free = {}, []
    for name, weight in wanted.items():
        retained = _prior(words, sources, targets, weight, settings["augmented"], generator)
        space = null_space(retained, settings["threshold"])
        free.append(space.shape[1])
        factors[name] = solve(sources, (targets - sources) @ weight.T, space, invariant).float()
    edit = LowRankEdit.shared(torch.eye(sources.shape[1]), factors)
    return Outcome(edit, {"free_directions": min(free)})


def words_to_retain(case: Case) -> list[str]:
    """Words of the plain captions without those that are erased."""
    words = sorted({w for line in plain_captions() for w in re.findall("[a-z]{3,}", line.lower())})
    words = [word for word in words if word not in case.erased]
    return words[:: max(1, len(words) // WORDS)][:WORDS]


def _prior(
    words: Tensor,
    sources: Tensor,
    targets: Tensor,
    weight: Tensor,
    copies: int,
    generator: torch.Generator,
) -> Tensor:
    """C0: the words that the edit would change most, and noisy copies of them."""
    cross = (targets - sources).T @ sources / len(sources)
    inner = torch.eye(words.shape[1], dtype=words.dtype) + sources.T @ sources / len(sources)
    plain = torch.linalg.solve(inner, (weight @ cross).T).T
    words = _above_mean(words, plain)
    weakest = torch.linalg.svd(weight).Vh[-1]
    sizes = torch.randn(copies, len(words), words.shape[1], generator=generator).double() @ weakest
    varied = words + sizes.unsqueeze(-1) * weakest
    return torch.cat([words, _above_mean(varied.flatten(0, 1), plain)]) if copies else words


def _above_mean(rows: Tensor, change: Tensor) -> Tensor:
    sizes = (rows @ change.T).norm(dim=1)
    return rows[sizes > sizes.mean()]


def _invariant(denoiser: Denoiser, generator: torch.Generator) -> Tensor:
    """C2 (4, width): the empty prompt's start token and centres of the rest."""
    rows = denoiser.encode([""])[0].tokens
    return torch.cat([rows[:1].double(), _centres(rows[1:].double(), CENTRES, generator)])


def _centres(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means."""
    centres = rows[torch.randperm(len(rows), generator=generator)[:count]]
    for _ in range(ROUNDS):
        nearest = torch.cdist(rows, centres).argmin(1)
        centres = torch.stack(
            [
                rows[nearest == k].mean(0) if (nearest == k).any() else centres[k]
                for k in range(count)
            ]
        )
    return centres


PUBLISHED = {"threshold": 0.1, "augmented": 10, "keys": False}
SPEED = Method("speed", train, PUBLISHED, "key-value", ("speed.py",))
GRID = tuple(
    {"threshold": threshold, "keys": keys} for keys in (False, True) for threshold in (0.1, 0.01)
)
