"""What protects the prompts that nobody named while an edit trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..model.low_rank import LowRankEdit


class Ridge:
    """Ridge on ordinary language: ``mean_m tr(B S B^T) / tr(W M W^T)`` with ``S = R^T M R``.

    ``M`` is the second moment of the token embeddings of plain captions, so the term is the mean
    square change of keys and values for ordinary tokens, relative to their own mean square. It is
    what keeps the prompts nobody named. The same for what pooled vectors become.

    Args:
        weight: how much it counts in the loss.
        matrices: W by name, (out, size), as far as they read what M is of.
        moment: M, (size, size); what a matrix reads behind that isn't protected.
        device: where edits are.
    """

    def __init__(
        self,
        weight: float,
        matrices: Mapping[str, Tensor],
        moment: Tensor,
        device: torch.device | str = "cpu",
    ) -> None:
        self._weight = weight
        self._scale = {name: 1 / _energy(w, moment) for name, w in matrices.items()}
        self._moment = moment.float().to(device)
        self.device = device

    def __call__(self, edit: LowRankEdit) -> Tensor:
        inner: dict[int, Tensor] = {}
        terms = []
        for name, scale in self._scale.items():
            factor, basis = edit.factors[name], edit.bases[name]
            if id(basis) not in inner:
                read = basis[: len(self._moment)]
                inner[id(basis)] = read.T @ self._moment @ read
            terms.append(((factor @ inner[id(basis)]) * factor).sum() * scale)
        return self._weight * torch.stack(terms).mean()

    def change(self, value: Tensor) -> float | None:
        """Root mean square change of keys and values, relative, from what a call has given.

        None where it doesn't count.
        """
        return float(value.detach().clamp(min=0) / self._weight) ** 0.5 if self._weight else None


def drift_of(ridges: Sequence[Ridge], edit: LowRankEdit) -> float | None:
    """How far an edit moves the keys and values of ordinary language; None if nobody knows."""
    with torch.no_grad():
        found = [ridge.change(ridge(edit.to(ridge.device))) for ridge in ridges]
    return max((change for change in found if change is not None), default=None)


def _energy(weight: Tensor, moment: Tensor) -> float:
    weight = weight.float()
    return float(((weight @ moment.float().to(weight.device)) * weight).sum())
