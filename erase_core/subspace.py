"""The subspace of the edit: what must stay exact, what moves, and how much of it is left.

In a U-Net the prompt enters only through ``K = W_k C`` and ``V = W_v C`` of the cross-attentions.
With ``dW = B R^T`` and ``R`` orthogonal to the token embeddings of a prompt, ``dW C = 0``: the
model's output for that prompt is the original's, at every layer, state and noise level.

All linear algebra here is float64 on the CPU (MPS has no float64, and float32 would leak).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

KEEP_FLOOR = 0.25
REFUSE_BELOW = 0.10


class SubspaceError(ValueError):
    """The exact prompts leave too little room for the edit."""


@dataclass(frozen=True)
class KeptPrompt:
    """What became of a prompt that must be kept.

    Attributes:
        text: the prompt.
        exact: whether it is in the exact set.
        share_left: share of the edit direction left with it (and all before it) in the exact set.
    """

    text: str
    exact: bool
    share_left: float


@dataclass(frozen=True)
class EditSubspace:
    """The basis of the edit and the account of what it protects.

    Attributes:
        basis: R, (width, rank), float64, orthonormal and orthogonal to the exact set.
        share_left: share of the edit direction left beside the exact set, 0 to 1.
        share_spanned: share of what is left that R spans.
        exact_rank: dimension of the exact set.
        kept: the keep prompts in the user's order.
    """

    basis: Tensor
    share_left: float
    share_spanned: float
    exact_rank: int
    kept: list[KeptPrompt] = field(default_factory=list)


def edit_subspace(
    edits: Tensor,
    required: Sequence[Tensor],
    keep: Sequence[tuple[str, Tensor]],
    rank: int,
) -> EditSubspace:
    """Choose the exact set and the basis R of an edit.

    Args:
        edits: differences ``C_e - C_a`` over all templates and tokens, (n, width).
        required: token embeddings (tokens, width) of the prompts that must be exact in any case.
        keep: name and token embeddings of the prompts to keep, most important first. One that
            would leave less than 25 % of the edit direction stays out of the exact set.
        rank: most columns R may have.

    Raises:
        SubspaceError: the required prompts alone leave less than 10 % of the edit direction, or
            the embeddings don't differ or aren't finite.
    """
    edits = edits.double().cpu()
    total = float(edits.square().sum())
    if not isfinite(total):
        raise SubspaceError(
            "The text encoder's embeddings contain NaN or infinity. Load the CLIP in fp32 or bf16, "
            "and check that it encodes ordinary prompts."
        )
    if total == 0:
        raise SubspaceError(
            "The text encoder gives the concept and its alternative the same embeddings, so there "
            "is no difference to train on. Name a different alternative."
        )
    exact = torch.zeros(edits.shape[1], 0, dtype=torch.float64)
    for rows in required:
        exact = extend_basis(exact, rows)
    left = _share_left(edits, exact, total)
    if left < REFUSE_BELOW:
        raise SubspaceError(
            f"Only {left:.0%} of the difference that must be edited is left beside the null "
            "prompt and your negative prompts (at least 10 % is needed). Remove negative prompts "
            "that name the concept or come close to it."
        )
    kept = []
    for text, rows in keep:
        wider = extend_basis(exact, rows)
        share = _share_left(edits, wider, total)
        fits = share >= KEEP_FLOOR
        if fits:
            exact, left = wider, share
        kept.append(KeptPrompt(text, fits, share))
    basis, spanned = _leading_directions(edits, exact, rank)
    return EditSubspace(basis, left, spanned, exact.shape[1], kept)


def extend_basis(basis: Tensor, rows: Tensor) -> Tensor:
    """Orthonormal columns (width, m) that span ``basis`` and every row of ``rows`` (n, width).

    Nothing is truncated but what is rounding in float64: dropping the small singular values of
    real embeddings leaks a hundredth of the prompt.
    """
    rows = rows.double().cpu()
    rest = _remove(rows, basis)
    _, sizes, directions = torch.linalg.svd(rest, full_matrices=False)
    rounding = max(rows.shape) * torch.finfo(torch.float64).eps * rows.norm(dim=1).max()
    fresh = directions[sizes > rounding]
    return torch.linalg.qr(torch.cat([basis, _remove(fresh, basis).T], dim=1)).Q


def leakage(basis: Tensor, tokens: Tensor) -> float:
    """Largest share of a token embedding that R still sees: ``max |R^T c| / |c|``."""
    tokens = tokens.double().cpu()
    return float(
        ((tokens @ basis.double()).norm(dim=1) / tokens.norm(dim=1).clamp(min=1e-12)).max()
    )


def _leading_directions(edits: Tensor, exact: Tensor, rank: int) -> tuple[Tensor, float]:
    rest = _remove(edits, exact)
    _, sizes, directions = torch.linalg.svd(rest, full_matrices=False)
    real = int((sizes > sizes[0] * 1e-9).sum())
    leading = directions[: min(rank, real)]
    basis = torch.linalg.qr(_remove(leading, exact).T).Q
    return basis, float(sizes[: len(leading)].square().sum() / sizes.square().sum())


def _share_left(edits: Tensor, exact: Tensor, total: float) -> float:
    return float(_remove(edits, exact).square().sum()) / total


def _remove(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows without their part in the span of ``basis``; twice, since once leaves rounding."""
    for _ in range(2):
        rows = rows - (rows @ basis) @ basis.T
    return rows
