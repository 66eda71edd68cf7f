"""The pooled vector: the second way on which a prompt enters some models.

One matrix reads it, beside numbers that have nothing to do with the prompt. Taken for a prompt of
a single token, it is edited like the tokens are: what must stay exact is orthogonal to R, ordinary
language is protected by a ridge, and the start is the closed form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ..model.denoiser import Encoded, LowRankEdit
from .closed_form import ClosedForm, EditRegression, TokenEdit
from .encoded import EncodedPrompts
from .protection import RIDGES, Choice, strongest_that_moves
from .subspace import extend_basis

# Prompts of ordinary language whose pooled vectors are protected. They are encoded one by one, as
# hosts give the pooled vector of one prompt only.
POOLED_PROMPTS = 256
# How far their second moment is drawn towards one that protects all directions alike: farther than
# that of tokens, as the prompts are few beside the size of a pooled vector.
POOLED_SHRINKAGE = 0.1
# With a smaller share of the way left beside what must stay, nothing is edited.
LEAST_LEFT = 0.1


def as_tokens(prompts: EncodedPrompts) -> EncodedPrompts:
    """The same prompts, each with its pooled vector for its only token."""

    def single(prompt: Encoded) -> Encoded:
        return Encoded(prompt.pooled[None])

    pairs = [
        replace(pair, erased=single(pair.erased), alternative=single(pair.alternative))
        for pair in prompts.pairs
    ]
    concepts = range(len(prompts.edits))
    return EncodedPrompts(
        pairs=pairs,
        edits=[
            TokenEdit(
                torch.cat([pair.erased.tokens for pair in pairs if pair.concept == concept]),
                torch.cat([pair.alternative.tokens for pair in pairs if pair.concept == concept]),
            )
            for concept in concepts
        ],
        null=single(prompts.null),
        negatives=[single(prompt) for prompt in prompts.negatives],
        keep=[(text, single(prompt)) for text, prompt in prompts.keep],
    )


@dataclass(frozen=True)
class PooledEdit:
    """What the matrix that reads the pooled vector gets.

    Attributes:
        name: of the matrix.
        choice: the closed form and its ridge, for the part of the matrix that reads the vector.
        moment: what the ridge protects, (size, size).
        weight: that part, (out, size).
        width: all that the matrix reads; the pooled vector comes first.
    """

    name: str
    choice: Choice
    moment: Tensor
    weight: Tensor
    width: int

    @property
    def solution(self) -> ClosedForm:
        """The closed form."""
        return self.choice.solution

    def edit(self, columns: list[tuple[int, int]] | None = None) -> LowRankEdit:
        """The closed form as an edit of the whole matrix.

        Args:
            columns: where each concept's columns shall begin and end. Those that are too many for
                what the vectors need stay zero; where there are too few, the first are taken.
        """
        wanted = columns or self.solution.columns
        basis = torch.zeros(self.width, wanted[-1][1])
        mixing = torch.zeros(len(self.weight.T), wanted[-1][1])
        for (start, end), (first, last) in zip(wanted, self.solution.columns, strict=True):
            count = min(end - start, last - first)
            own, theirs = slice(start, start + count), slice(first, first + count)
            basis[: len(mixing), own] = self.solution.basis[:, theirs].float()
            mixing[:, own] = self.solution.mixing[:, theirs].float()
        factor = self.weight.float() @ mixing.to(self.weight.device)
        return LowRankEdit({self.name: basis}, {self.name: factor})

    def protected(self) -> tuple[dict[str, Tensor], Tensor]:
        """The matrix by its name, and the moment of all that it reads (width, width)."""
        rest = self.width - len(self.moment)
        whole = functional.pad(self.weight.float(), (0, rest))
        return {self.name: whole}, functional.pad(self.moment, (0, rest, 0, rest))


def solve_pooled(
    name: str,
    matrix: Tensor,
    prompts: EncodedPrompts,
    exact: list[Encoded],
    moment: Tensor,
    rank: int,
    ridge: float | None = None,
) -> PooledEdit | None:
    """The closed form for pooled vectors; None where what must stay leaves nothing to edit.

    Args:
        name: of the matrix that reads them.
        matrix: W, (out, width).
        prompts: pooled vectors as tokens, see :func:`as_tokens`.
        exact: the prompts among them that can't move.
        moment: second moment of what must stay, (size, size).
        rank: most columns for a concept.
        ridge: the user's own; None for the strongest that keeps what can be attained, as nothing is
            predicted here.
    """
    basis = torch.zeros(len(moment), 0, dtype=torch.float64)
    for prompt in exact:
        basis = extend_basis(basis, prompt.tokens)
    for edit in prompts.edits:
        way, left = edit.change, edit.change - (edit.change @ basis) @ basis.T
        if not float(left.norm()) > LEAST_LEFT * float(way.norm()) > 0:
            return None
    weight = matrix[:, : len(moment)]
    regression = EditRegression(prompts.edits, basis, moment, {name: weight})
    # Every other ridge will do: one matrix of many, whose rest is measured and reported.
    ridges = RIDGES[::2] if ridge is None else (ridge,)
    choice = _end_of(strongest_that_moves(regression, rank, None, ridges=ridges))
    return PooledEdit(name, choice, moment, weight, matrix.shape[1])


def _end_of(stage: Iterator[int]) -> Choice:
    while True:
        try:
            next(stage)
        except StopIteration as end:
            return end.value
