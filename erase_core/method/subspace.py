"""What must stay exact: the space of token embeddings that the edit can't see.

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

from ..settings.settings import EraseSettings

KEEP_FLOOR = EraseSettings.keep_room
# Of so many prompts that don't fit it is looked for what would make them.
MOST_REMEDIES = 8
REFUSE_BELOW = 0.10
NOT_FINITE = (
    "The text encoder's embeddings contain NaN or infinity. Load the CLIP in fp32 or bf16, and "
    "check that it encodes ordinary prompts."
)


class SubspaceError(ValueError):
    """The exact prompts leave too little room for the edit."""


@dataclass(frozen=True)
class KeptPrompt:
    """What became of a prompt that must be kept.

    Attributes:
        text: the prompt.
        exact: whether it is in the exact set.
        share_left: share of the edit left with it (and all before it) in the exact set; with
            several concepts, of the one that is left the least.
        share_first: the same if it were the first of the keep prompts, where that is another
            figure; for prompts that aren't exact, of the first few.
        share_without_negatives: the same without the negative prompts.
    """

    text: str
    exact: bool
    share_left: float
    share_first: float | None = None
    share_without_negatives: float | None = None


@dataclass(frozen=True)
class ExactSet:
    """The prompts that can't move, as a space of token embeddings, and what they leave.

    Attributes:
        basis: (width, m) float64, orthonormal; spans every token of every exact prompt.
        shares_left: share of each concept's edit that is left beside it, 0 to 1.
        kept: the keep prompts in the user's order.
    """

    basis: Tensor
    shares_left: list[float]
    kept: list[KeptPrompt] = field(default_factory=list)

    @property
    def share_left(self) -> float:
        """Share left to the concept that it leaves the least."""
        return min(self.shares_left)


def exact_set(
    edits: Sequence[Tensor],
    required: Sequence[Tensor],
    keep: Sequence[tuple[str, Tensor]],
    room: float = KEEP_FLOOR,
) -> ExactSet:
    """Choose the exact set.

    Args:
        edits: for each concept, the differences ``C_a - C_e`` over its templates and tokens,
            (n, width).
        required: token embeddings (tokens, width) of the prompts that must be exact in any case,
            the null prompt first.
        keep: name and token embeddings of the prompts to keep, most important first.
        room: a keep prompt that would leave less than this share of some concept's edit stays out
            of the exact set.

    Raises:
        SubspaceError: the required prompts alone leave less than 10 % of an edit, or the
            embeddings don't differ or aren't finite.
    """
    edits = [_checked(rows.double().cpu()) for rows in edits]
    basis = torch.zeros(edits[0].shape[1], 0, dtype=torch.float64)
    for rows in required:
        basis = extend_basis(basis, rows)
    shares = _shares_left(edits, basis)
    if min(shares) < REFUSE_BELOW:
        raise SubspaceError(
            f"Only {min(shares):.0%} of the difference that must be edited is left beside the null "
            "prompt and your negative prompts (at least 10 % is needed). Remove negative prompts "
            "that name the concept or come close to it."
        )
    held = _Held(edits, required[:1], basis)
    kept: list[KeptPrompt] = []
    for text, rows in keep:
        wider = extend_basis(basis, rows)
        left = _shares_left(edits, wider)
        if min(left) >= room:
            basis, shares = wider, left
            held.rows.append(rows)
            kept.append(KeptPrompt(text, True, min(left)))
            continue
        few = sum(not one.exact for one in kept) < MOST_REMEDIES
        others = held.otherwise(rows, len(required) > 1) if few else (None, None)
        kept.append(KeptPrompt(text, False, min(left), *others))
    return ExactSet(basis, shares, kept)


@dataclass(frozen=True)
class _Held:
    """What is in the exact set already, to say what it would leave in another order.

    Attributes:
        null: rows of the null prompt, (tokens, width), if any.
        required: basis of all that must be exact in any case.
        rows: of each keep prompt that is exact, (tokens, width).
    """

    edits: Sequence[Tensor]
    null: Sequence[Tensor]
    required: Tensor
    rows: list[Tensor] = field(default_factory=list)

    def otherwise(self, rows: Tensor, negatives: bool) -> tuple[float | None, float | None]:
        """The share that a prompt would leave as the first one kept, and without negatives.

        Args:
            negatives: whether there are any.
        """
        first = without = None
        if self.rows:
            first = min(_shares_left(self.edits, extend_basis(self.required, rows)))
        if negatives:
            basis = self.required[:, :0]
            for one in (*self.null, *self.rows, rows):
                basis = extend_basis(basis, one)
            without = min(_shares_left(self.edits, basis))
        return first, without


def extend_basis(basis: Tensor, rows: Tensor) -> Tensor:
    """Orthonormal columns (width, m) that span ``basis`` and every row of ``rows`` (n, width).

    Nothing is truncated but what is rounding in float64: dropping the small singular values of
    real embeddings leaks a hundredth of the prompt.
    """
    rows = rows.double().cpu()
    if not len(rows):  # of an encoder that has nothing to say of an empty prompt
        return basis
    rest = remove_span(rows, basis)
    _, sizes, directions = torch.linalg.svd(rest, full_matrices=False)
    rounding = max(rows.shape) * torch.finfo(torch.float64).eps * rows.norm(dim=1).max()
    fresh = directions[sizes > rounding]
    return torch.linalg.qr(torch.cat([basis, remove_span(fresh, basis).T], dim=1)).Q


def remove_span(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows without their part in the span of ``basis``; twice, since once leaves rounding."""
    for _ in range(2):
        rows = rows - (rows @ basis) @ basis.T
    return rows


def leakage(basis: Tensor, tokens: Tensor) -> float:
    """Largest share of a token embedding that R still sees: ``max |R^T c| / |c|``."""
    tokens = tokens.double().cpu()
    if not len(tokens):
        return 0.0
    return float(
        ((tokens @ basis.double()).norm(dim=1) / tokens.norm(dim=1).clamp(min=1e-12)).max()
    )


def _checked(rows: Tensor) -> Tensor:
    size = float(rows.square().sum())
    if not isfinite(size):
        raise SubspaceError(NOT_FINITE)
    if size == 0:
        raise SubspaceError(
            "The text encoder gives the concept and its alternative the same embeddings, so there "
            "is no difference to train on. Name a different alternative."
        )
    return rows


def _shares_left(edits: Sequence[Tensor], basis: Tensor) -> list[float]:
    taken = [float((rows @ basis).square().sum() / rows.square().sum()) for rows in edits]
    return [max(0.0, 1 - share) for share in taken]
