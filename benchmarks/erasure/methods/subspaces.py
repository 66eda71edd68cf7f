"""Ours with another R or without an exact set, to compare with ours as it is.

Everything else, the ridge and the best B for what R sees among it, is as it always is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from concept_surgery.erase_core.method import ways
from concept_surgery.erase_core.method.closed_form import EditRegression
from concept_surgery.erase_core.method.subspace import ExactSet, KeptPrompt
from concept_surgery.erase_core.model.denoiser import Denoiser
from torch import Tensor

from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods import ours
from benchmarks.erasure.methods.base import Method, Outcome

NOTHING_EXACT = "nothing exact"


def edit_directions(change: Tensor, source: Tensor, protected: Tensor) -> Tensor:
    """Directions in which the concept's tokens change, the leading ones first."""
    return torch.linalg.svd(change, full_matrices=False).Vh.T


def concept_directions(change: Tensor, source: Tensor, protected: Tensor) -> Tensor:
    """Directions that the concept's own tokens have, the leading ones first."""
    return torch.linalg.svd(source, full_matrices=False).Vh.T


def quietest_directions(change: Tensor, source: Tensor, protected: Tensor) -> Tensor:
    """Most change of the concept for what ordinary language has of them, those first.

    Generalised eigenvectors, largest first: ``change^T change r = size * protected r``.
    """
    root = torch.linalg.cholesky(protected)
    whitened = torch.linalg.solve_triangular(root, change.T, upper=False)
    leading = torch.linalg.svd(whitened, full_matrices=False).U
    return torch.linalg.solve_triangular(root.T, leading, upper=True)


# From rows (n, width) of a concept and what stays (width, width), all beside the exact set, to
# columns of R, the first ones most wanted.
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
RULES: Mapping[str, Rule] = {
    "edit directions": edit_directions,
    "concept's tokens": concept_directions,
    "generalised eigenvectors": quietest_directions,
}


def variants(base: Method) -> list[Method]:
    """A method of ours, then with R by each of the rules, then with nothing exact."""
    return [base, *(_changed(base, subspace) for subspace in (*RULES, NOTHING_EXACT))]


def _changed(base: Method, subspace: str) -> Method:
    changed = base.with_settings(f"{base.name.split('/')[1]}, {subspace}", subspace=subspace)
    return dataclasses.replace(changed, train=train, files=(*base.files, "subspaces.py"))


def train(denoiser: Denoiser, case: Case, seed: int, settings: Mapping[str, Any]) -> Outcome:
    """Run the engine with the R that ``settings["subspace"]`` names, or with nothing exact."""
    asked = {name: value for name, value in settings.items() if name != "subspace"}
    subspace = settings["subspace"]
    replaced = (
        patch.object(ways, "exact_set", _nothing_exact)
        if subspace == NOTHING_EXACT
        else patch.object(EditRegression, "_search", _searching(RULES[subspace]))
    )
    with replaced:
        return ours.train(denoiser, case, seed, asked)


def _nothing_exact(
    edits: Sequence[Tensor],
    required: Sequence[Tensor],
    keep: Sequence[tuple[str, Tensor]],
    room: float,
) -> ExactSet:
    """Keep prompts go to the ridge; the null prompt is held by what captions share with it."""
    nothing = torch.zeros(edits[0].shape[1], 0, dtype=torch.float64)
    return ExactSet(nothing, [1.0] * len(edits), [KeptPrompt(text, False, 1.0) for text, _ in keep])


def _searching(rule: Rule) -> Callable[[EditRegression, Tensor, int], Tensor]:
    """Columns of R in place of a space to search, (concepts, width, rank)."""

    def search(regression: EditRegression, inner: Tensor, rank: int) -> Tensor:
        beside, exact = regression._beside_exact, regression._exact
        # Regular where R can't see, so that it has a Cholesky factor.
        protected = regression._protected + exact @ exact.T
        found = [
            rule(beside(edit.change), beside(edit.source.double()), protected)[:, :rank]
            for edit in regression._edits
        ]
        return torch.stack([torch.linalg.qr(beside(columns.T).T).Q for columns in found])

    return search
