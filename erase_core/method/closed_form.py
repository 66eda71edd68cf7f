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
from itertools import accumulate

import torch
from torch import Tensor

from .subspace import remove_span

# More columns than this in all, and the file is larger than what it saves.
MOST_COLUMNS = 640
# Matrices that stand for all when their common metric is formed; it only ranks directions.
METRIC_MATRICES = 24
# Directions that neither the prompts nor ordinary language use are kept from dividing by zero.
FLOOR = 1e-6
# Of the subspace iteration that finds the leading directions: it ends when a round adds less than
# this share to what they weigh.
OVERSAMPLING, MOST_ITERATIONS, LEAST_GROWTH = 16, 30, 1e-4
JITTERS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)
# Directions of the space found that are smaller than this lie in the exact set.
REAL_DIRECTION = 1e-6


@dataclass(frozen=True)
class TokenTargets:
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

    With P the projector beside the exact set, G the metric of keys and values and, for a concept,
    ``cross = mean change (P source)^T`` and ``inner = P (sum_i S_i + ridge M) P`` (S the sources'
    second moment), the solution is ``A R^T = cross inner^-1``, and the best of a rank holds the
    directions r that are leading in ``cross^T G cross r = size * inner r``.

    Args:
        edits: the concepts' tokens.
        exact: orthonormal columns (width, m) that R must not see.
        moment: M, second moment of the embeddings that must stay, (width, width).
        matrices: W by name, (out, width).
    """

    def __init__(
        self,
        edits: Sequence[TokenTargets],
        exact: Tensor,
        moment: Tensor,
        matrices: Mapping[str, Tensor],
    ) -> None:
        self._edits, self._exact = edits, exact.double()
        self.metric = Metric.of(matrices, moment)
        self._metric = self.metric.matrix
        self._moment = moment.double()
        self._protected = self._beside_exact(self._beside_exact(self._moment).T)
        scale = float(self._protected.diagonal().mean()) + 1e-30
        self._protected.diagonal().add_(FLOOR * scale)
        # What R can't see is made regular, so that inner has a Cholesky factor.
        self._sources = scale * self._exact @ self._exact.T
        width = len(self._moment)
        # By concept, in float32: what R is searched with, and what the figures are made of.
        self._crosses = torch.empty(len(edits), width, width)
        self._moments = torch.empty(len(edits), width, width)
        self._distances = torch.empty(len(edits))
        for index, edit in enumerate(edits):
            self._take_in(index, edit)

    def _take_in(self, index: int, edit: TokenTargets) -> None:
        """Add a concept's second moment to the system, and keep what is needed of it alone."""
        seen, change = self._beside_exact(edit.source.double()), edit.change.float()
        second = seen.T @ seen / len(seen)
        self._sources += second
        self._moments[index] = second
        self._crosses[index] = change.T @ seen.float() / len(seen)
        self._distances[index] = ((change @ self._metric.float()) * change).sum() / len(change)

    def solve(self, ridge: float, rank: int) -> ClosedForm:
        """The best solution for a ridge.

        Args:
            ridge: strength of the protection; 0 leaves ordinary language all but unprotected.
            rank: most columns for a concept; fewer when all would be more than 640.
        """
        rank = max(1, min(rank, MOST_COLUMNS // len(self._edits)))
        inner = self._sources + max(ridge, FLOOR) * self._protected
        spaces = self._search(inner, rank)
        parts = [
            self._best_within(edit, space.double(), inner, rank)
            for edit, space in zip(self._edits, spaces, strict=True)
        ]
        return self._account(parts)

    def _search(self, inner: Tensor, rank: int) -> Tensor:
        """For each concept a space that holds its leading directions, (concepts, width, size).

        Subspace iteration on ``L^-1 cross^T G cross L^-T`` with ``inner = L L^T``, until what the
        leading directions weigh grows no more. It only has to find the space, so float32 will do.
        """
        width = len(inner)
        root = _cholesky(inner).float()
        whiten = torch.linalg.solve_triangular(root, torch.eye(width), upper=False)
        size = min(rank + OVERSAMPLING, width - self._exact.shape[1])
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(len(self._crosses), width, size, generator=generator)
        rows = torch.linalg.qr(start).Q.mT
        weight = torch.zeros(len(rows))
        for _ in range(MOST_ITERATIONS):
            images = rows @ whiten @ self._crosses.mT
            rows = images @ self._metric.float() @ self._crosses @ whiten.T
            turned, triangles = torch.linalg.qr(rows.mT)
            rows, before = turned.mT, weight
            weight = torch.linalg.svdvals(triangles)[:, :rank].sum(dim=1)
            if bool((weight - before <= LEAST_GROWTH * weight).all()):
                break
        return (rows @ whiten).mT

    def _best_within(
        self, edit: TokenTargets, space: Tensor, inner: Tensor, rank: int
    ) -> tuple[Tensor, Tensor]:
        """R (width, at most rank) and A (width, same) of one concept, best within a space."""
        space = self._beside_exact(space.T).T
        sizes, turns = torch.linalg.eigh(space.T @ inner @ space)
        beside = sizes > sizes[-1] * REAL_DIRECTION
        space = space @ (turns[:, beside] / sizes[beside].sqrt())  # now space^T inner space = 1
        image = edit.change.T @ (edit.source.double() @ space) / len(edit.source)  # cross space
        sizes, turns = torch.linalg.eigh(image.T @ self._metric @ image)
        real = int((sizes > sizes[-1] * 1e-12).sum())
        turns = turns[:, -min(rank, max(1, real)) :].flip(1)
        # dW = W (cross r) r^T with r = space turns = R triangle.
        basis, triangle = torch.linalg.qr(space @ turns)
        return self._beside_exact(basis.T).T, image @ turns @ triangle.T

    def _beside_exact(self, rows: Tensor) -> Tensor:
        return remove_span(rows, self._exact)

    def _account(self, parts: Sequence[tuple[Tensor, Tensor]]) -> ClosedForm:
        """What a solution does. Moved is in float32: the figures are for people."""
        basis = torch.cat([basis for basis, _ in parts], dim=1)
        mixing = torch.cat([mixing for _, mixing in parts], dim=1)
        weighed = self._metric @ mixing
        own = mixing.T @ weighed  # A^T G A
        # mean |change - A R^T source|^2 in G is
        # |change|^2 - 2 <G A R^T, cross> + <R A^T G A R^T, S>.
        along = self._crosses.flatten(1) @ (weighed @ basis.T).float().flatten()
        squared = self._moments.flatten(1) @ (basis @ own @ basis.T).float().flatten()
        moved = (2 * along - squared) / self._distances
        harm = float((own * (basis.T @ self._moment @ basis)).sum())
        ends = [0, *accumulate(own.shape[1] for own, _ in parts)]
        columns = list(zip(ends[:-1], ends[1:], strict=True))
        distance = float(self._distances.mean())
        return ClosedForm(basis, mixing, columns, moved.tolist(), distance, harm)


def _cholesky(positive: Tensor) -> Tensor:
    """L with ``L L^T`` the matrix, to which as much of the identity is added as rounding asks for.

    Raises:
        torch.linalg.LinAlgError: it is far from positive, or not finite.
    """
    scale = positive.diagonal().mean()
    for jitter in JITTERS:
        root, failed = torch.linalg.cholesky_ex(
            positive + jitter * scale * torch.eye(len(positive))
        )
        if not failed:
            return root
    return torch.linalg.cholesky(positive)


@dataclass(frozen=True)
class Metric:
    """What a change of a token embedding does to keys and values, every matrix counting alike.

    Attributes:
        matrix: ``mean_m W^T W / E_m``, (width, width) float64 on the CPU.
        energies: ``E_m = tr(W M W^T)`` by name, of the matrices that stand for all: at most 24,
            spread over the names.
    """

    matrix: Tensor
    energies: Mapping[str, float]

    @classmethod
    def of(cls, matrices: Mapping[str, Tensor], moment: Tensor) -> Metric:
        """Summed in float32, since it only ranks directions."""
        chosen, flat = _standing_for_all(matrices), moment.float().flatten()
        total, sizes = torch.zeros(len(flat)), {}
        for name in chosen:
            weight = matrices[name].float()
            gram = (weight.T @ weight).cpu().flatten()
            sizes[name] = float(gram @ flat)
            total.add_(gram, alpha=1 / (sizes[name] * len(chosen)))
        return cls(total.unflatten(0, (-1, len(moment))).double(), sizes)


def _standing_for_all(matrices: Mapping[str, Tensor]) -> list[str]:
    names = sorted(matrices)
    # Keys and values take turns in the names: an even step would leave one of them out.
    return names[:: -(-len(names) // METRIC_MATRICES) | 1]
