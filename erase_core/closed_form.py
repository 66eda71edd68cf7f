"""The edit in closed form: the instant form, and where training starts.

Keys and values are linear in the token embeddings, so asking ``(W + dW) C_e = W C_a`` for all
prompts of a concept, while ordinary language stays, is a ridge regression. Its solution is
``dW = W M`` with one small M for all matrices, and the best ``dW = B R^T`` of a given rank is the
reduced-rank regression (Izenman 1975): M cut off in the metric of what it is applied to and of
what it changes. It needs no prediction of the model at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

from .subspace import complement

# More columns than this in all, and the file is larger than what it saves.
MOST_COLUMNS = 640
# Matrices that stand for all when their common metric is formed; it only ranks directions.
METRIC_MATRICES = 32
# Directions that neither the prompts nor ordinary language use are kept from dividing by zero.
FLOOR = 1e-6
# Of the subspace iteration that finds the leading directions.
OVERSAMPLING, ITERATIONS = 16, 12


@dataclass(frozen=True)
class TokenEdit:
    """What the tokens of one concept's prompts must become to keys and values.

    Attributes:
        source: C_e of every token of every template, (n, width).
        target: the embedding that stands for each of them in the alternative, (n, width).
    """

    source: Tensor
    target: Tensor

    @property
    def change(self) -> Tensor:
        """``target - source``, (n, width) float64."""
        return self.target.double() - self.source.double()


@dataclass(frozen=True)
class ClosedForm:
    """A solution ``dW = W A R^T``, its columns grouped by concept.

    Attributes:
        basis: R, (width, rank) float64, orthonormal within each concept's columns.
        mixing: A, (width, rank) float64.
        columns: for each concept, where its columns begin and end.
        moved: for each concept, how far keys and values go, ``1 - |(W+dW) C_e - W C_a|^2 /
            |W (C_a - C_e)|^2`` summed over all matrices, each relative to its own size.
        distance: mean over the concepts of ``mean |W (C_a - C_e)|^2``, likewise relative.
        harm: how much ordinary keys and values change, ``tr(dW M dW^T) / tr(W M W^T)``.
    """

    basis: Tensor
    mixing: Tensor
    columns: list[tuple[int, int]]
    moved: list[float]
    distance: float
    harm: float

    def factors(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """B = W A by matrix name, (out, rank) float32 on each matrix's device."""
        mixing = self.mixing.float()
        return {name: w.float() @ mixing.to(w.device) for name, w in matrices.items()}


class EditRegression:
    """The ridge regression of several concepts' edits, solved for any ridge at once.

    Minimises ``sum_i mean |W (target_i - source_i) - dW source_i|^2 + ridge tr(dW M dW^T)`` over
    ``dW = W A R^T`` with ``R`` orthogonal to the exact set. The concepts share one system, so that
    each is solved in the presence of the others; the solution is a sum over the concepts, each
    with columns of its own, and one of them can be taken out of it again.

    Args:
        edits: the concepts' tokens.
        exact: orthonormal columns (width, m) that R must not see.
        moment: M, second moment of the embeddings that must stay, (width, width).
        matrices: W by name, (out, width).
    """

    def __init__(
        self,
        edits: Sequence[TokenEdit],
        exact: Tensor,
        moment: Tensor,
        matrices: Mapping[str, Tensor],
    ) -> None:
        self._edits, self._moment = edits, moment.double()
        self._free = complement(exact)
        self._metric = metric(matrices, self._moment)
        seen = [edit.source.double() @ self._free for edit in edits]
        self._cross = [
            edit.change.T @ rows / len(rows) for edit, rows in zip(edits, seen, strict=True)
        ]
        self._sources = sum(rows.T @ rows / len(rows) for rows in seen)
        self._protected = self._free.T @ self._moment @ self._free
        self._protected.diagonal().add_(FLOOR * self._protected.diagonal().mean() + 1e-30)
        self._values, self._vectors = _generalised_eigh(self._sources, self._protected)
        self._distances = [_weighed_square(edit.change.float(), self._metric) for edit in edits]

    def solve(self, ridge: float, rank: int) -> ClosedForm:
        """The best solution for a ridge.

        Args:
            ridge: strength of the protection; 0 leaves ordinary language all but unprotected.
            rank: most columns for a concept; fewer when all would be more than 640.
        """
        ridge = max(ridge, FLOOR)
        rank = max(1, min(rank, MOST_COLUMNS // len(self._edits)))
        inner = self._sources + ridge * self._protected
        weights = self._vectors / (self._values.clamp(min=0) + ridge).sqrt()  # inner^-1, halved
        bases, mixings = [], []
        for cross in self._cross:
            leading = torch.linalg.qr(weights @ self._leading(cross, weights, rank)).Q
            # The best A for this R: cross R (R^T inner R)^-1.
            mixings.append(torch.linalg.solve(leading.T @ inner @ leading, (cross @ leading).T).T)
            bases.append(self._free @ leading)
        return self._account(bases, mixings)

    def _leading(self, cross: Tensor, weights: Tensor, rank: int) -> Tensor:
        """Leading right singular vectors of ``G^(1/2) M inner^(1/2)``, (free, at most rank).

        By subspace iteration on its square, which needs thin products only.
        """

        def square(vectors: Tensor) -> Tensor:
            return weights.T @ (cross.T @ (self._metric @ (cross @ (weights @ vectors))))

        size = min(rank + OVERSAMPLING, weights.shape[1])
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(weights.shape[1], size, generator=generator, dtype=torch.float64)
        for _ in range(ITERATIONS):
            vectors = torch.linalg.qr(square(vectors)).Q
        small = vectors.T @ square(vectors)
        values, turns = torch.linalg.eigh((small + small.T) / 2)
        real = int((values > values[-1] * 1e-12).sum())
        return vectors @ turns[:, -min(rank, max(1, real)) :].flip(1)

    def _account(self, bases: list[Tensor], mixings: list[Tensor]) -> ClosedForm:
        """What a solution does. In float32: the figures are for people."""
        basis, mixing = torch.cat(bases, dim=1), torch.cat(mixings, dim=1)
        ends = [0]
        for part in bases:
            ends.append(ends[-1] + part.shape[1])
        weighed = (self._metric @ mixing).float()
        own = mixing.float().T @ weighed  # A^T G A
        moved = []
        for edit, before in zip(self._edits, self._distances, strict=True):
            # |change - A z|^2 = |change|^2 - 2 <change, A z> + |A z|^2 with z = R^T source.
            z = edit.source.float() @ basis.float()
            along = ((edit.change.float().T @ z) * weighed).sum()
            squared = ((z.T @ z) * own).sum()
            moved.append(float(2 * along - squared) / before)
        inner = basis.T @ self._moment @ basis
        harm = float((own.double() * inner).sum())
        distances = [
            before / len(edit.source)
            for edit, before in zip(self._edits, self._distances, strict=True)
        ]
        columns = list(zip(ends[:-1], ends[1:], strict=True))
        return ClosedForm(basis, mixing, columns, moved, sum(distances) / len(distances), harm)


def metric(matrices: Mapping[str, Tensor], moment: Tensor) -> Tensor:
    """``mean_m W^T W / tr(W M W^T)``, (width, width) float64 on the CPU.

    What a change of a token embedding does to keys and values, every matrix counting alike. At
    most 32 matrices, spread over the names, stand for all.
    """
    names = sorted(matrices)
    chosen = names[:: -(-len(names) // METRIC_MATRICES)]
    total = torch.zeros_like(moment, dtype=torch.float64)
    for name in chosen:
        weight = matrices[name].float()
        gram = (weight.T @ weight).double().cpu()
        total += gram / (gram * moment.double()).sum() / len(chosen)
    return total


def _weighed_square(rows: Tensor, metric: Tensor) -> float:
    """``sum |row|^2`` in a metric."""
    return float(((rows @ metric.float()) * rows).sum())


def _generalised_eigh(matrix: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Values and V with ``V^T positive V = 1`` and ``V^T matrix V = diag(values)``.

    With it ``(matrix + ridge positive)^-1 = V diag(1 / (values + ridge)) V^T`` for every ridge.
    """
    root = torch.linalg.cholesky(positive)
    half = torch.linalg.solve_triangular(root, matrix, upper=False)
    both = torch.linalg.solve_triangular(root, half.T, upper=False)
    values, vectors = torch.linalg.eigh((both + both.T) / 2)
    return values, torch.linalg.solve_triangular(root.T, vectors, upper=True)


def align_tokens(erased: Sequence[int], alternative: Sequence[int]) -> list[int]:
    """For each token of a prompt, the token that plays its role in the alternative prompt.

    Equal words stand for each other; the last token of a replaced part for the last of its
    replacement, and so on backwards; a part that is left out becomes the end of the prompt; end
    and padding tokens stand for their own kind at the same distance from the last word.

    Args:
        erased, alternative: token ids with start, end and padding tokens.

    Returns:
        Positions in ``alternative``, one for each token of ``erased``.
    """
    end, other_end = _content_length(erased), _content_length(alternative)
    roles = [0] * len(erased)
    matcher = SequenceMatcher(None, erased[:end], alternative[:other_end], autojunk=False)
    for kind, start, stop, other_start, other_stop in matcher.get_opcodes():
        for position in range(start, stop):
            if kind == "equal":
                roles[position] = other_start + position - start
            elif kind == "replace":
                roles[position] = max(other_start, other_stop - (stop - position))
            else:
                roles[position] = other_end
    for position in range(end, len(erased)):
        roles[position] = min(other_end + position - end, len(alternative) - 1)
    return roles


def _content_length(ids: Sequence[int]) -> int:
    """Tokens before the run of equal ids (end and padding) that closes a prompt."""
    length = len(ids)
    while length > 1 and ids[length - 2] == ids[-1]:
        length -= 1
    return length - 1
