"""What else an erasure changes: the keys and values of words that nobody named.

A word's change is that of its keys and values relative to themselves,
``sqrt(mean_m |dW_m C|^2 / E_m) / sqrt(mean_m |W_m C|^2 / E_m)`` over the matrices m, each by the
size that ordinary language has in it, ``E_m = tr(W_m M W_m^T)``. It needs no prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.low_rank import LowRankEdit
from .closed_form import ClosedForm, Metric
from .language import Language, Words

NEAREST, MOST_CHANGED = 8, 8


@dataclass(frozen=True)
class WordChanges:
    """How far words change.

    Attributes:
        texts: the words.
        changes: relative change of each one's keys and values, (n,).
    """

    texts: tuple[str, ...]
    changes: Tensor

    @property
    def mean(self) -> float:
        """Over all words; 0 of none."""
        return float(self.changes.mean()) if len(self.changes) else 0.0

    def worst(self, count: int) -> list[str]:
        """The words that change most, each with its change in words."""
        chosen = self.changes.topk(min(count, len(self.changes))).indices.tolist()
        return [f"{self.texts[i]} {float(self.changes[i]):.0%}" for i in chosen]

    def entries(self, chosen: Iterable[int]) -> list[dict[str, Any]]:
        """Some of the words with their changes, plain JSON values."""
        return [{"text": self.texts[i], "drift": float(self.changes[i])} for i in chosen]


NO_WORDS = WordChanges((), torch.zeros(0))


class Others:
    """Words that nobody named: those that the ridge doesn't protect, and those that it does.

    Args:
        spoken: what is erased and what takes its place.
        language: what was read.
        metric: of the matrices that read tokens.
    """

    def __init__(self, spoken: Sequence[str], language: Language, metric: Metric) -> None:
        self.witnesses = language.witnesses.without(spoken)
        self.vocabulary = language.vocabulary.without(spoken)
        self._energies, self._metric = metric.energies, metric.matrix.float()

    def of_witnesses(self, solution: ClosedForm) -> WordChanges:
        """Of a closed form, ``dW = W A R^T``: the matrices' common metric does for all."""
        words, mixing = self.witnesses, solution.mixing.float()
        inner = mixing.T @ self._metric @ mixing
        squared = self._squared(words.rows @ solution.basis.float(), inner, words)
        return WordChanges(words.texts, (squared / self._sizes(words)).sqrt())

    def of_edit(self, edit: LowRankEdit, words: Words) -> WordChanges:
        """Of any edit whose readers of tokens share one R, or of one with an R each."""
        names = [name for name in self._energies if name in edit.factors]
        bases = {id(edit.bases[name]): edit.bases[name].cpu().float() for name in names}
        squared = torch.zeros(len(words.texts))
        for key, basis in bases.items():
            inner = torch.zeros(basis.shape[1], basis.shape[1])
            for name in names:
                if id(edit.bases[name]) == key:
                    factor = edit.factors[name].float()
                    inner += (factor.T @ factor).cpu() / (self._energies[name] * len(names))
            squared += self._squared(words.rows @ basis, inner, words)
        return WordChanges(words.texts, (squared / self._sizes(words)).sqrt())

    def report(self, edit: LowRankEdit, concepts: Sequence[Tensor]) -> dict[str, Any]:
        """What else an edit changes, plain JSON values: held-out words first, then the map.

        Args:
            concepts: rows of each concept's last token and of its prompt's end, (2, width).
        """
        held_out = self.of_edit(edit, self.witnesses.telling())
        changes, rows = self.of_edit(edit, self.vocabulary), self.vocabulary.rows
        nearest = likeness(rows, concepts).topk(min(NEAREST, len(rows))).indices
        most = changes.changes.topk(min(MOST_CHANGED, len(rows))).indices
        by_change = held_out.changes.argsort(descending=True)
        return {
            "change": held_out.mean,
            "words": held_out.entries(by_change.tolist()),
            "nearest": changes.entries(nearest.tolist()),
            "most_changed": changes.entries(most.tolist()),
        }

    def _sizes(self, words: Words) -> Tensor:
        return self._squared(words.rows, self._metric, words).clamp(min=1e-12)

    @staticmethod
    def _squared(rows: Tensor, inner: Tensor, words: Words) -> Tensor:
        """``sum_r count_r row_r inner row_r^T`` of each word, (n,)."""
        return (((rows @ inner) * rows).sum(-1) * words.counts).sum(1).clamp(min=0)


def likeness(rows: Tensor, concepts: Sequence[Tensor]) -> Tensor:
    """How near words (n, 2, width) are to the nearest of the concepts, (n,)."""
    found = torch.full((len(rows),), -1.0)
    if not len(rows):
        return found
    middle = rows.mean(0)
    for concept in concepts:
        ways = torch.cosine_similarity(rows - middle, (concept.float() - middle)[None], dim=-1)
        found = torch.maximum(found, ways.mean(1))
    return found


def key_value_drift(edit: LowRankEdit, matrices: Mapping[str, Tensor], tokens: Tensor) -> float:
    """Largest relative change of a prompt's keys or values, ``max_m |C dW^T| / |C W^T|``.

    Args:
        matrices: W by name, (out, width), of those that read tokens.
        tokens: token embeddings C of the prompt, (tokens, width).
    """
    changes = []
    for name, matrix in matrices.items():
        before = tokens @ matrix.float().cpu().T
        change = (tokens @ edit.bases[name].cpu()) @ edit.factors[name].cpu().T
        changes.append(float(change.norm() / before.norm().clamp(min=1e-12)))
    return max(changes)


def together(edits: Sequence[tuple[LowRankEdit, float]]) -> LowRankEdit:
    """The edit that does what several do together, each times its strength.

    ``sum_i s_i B_i R_i^T`` is one product: R and ``s B`` side by side, (width, sum of ranks) and
    (out, sum of ranks), float32 on the CPU. Matrices whose R are the same tensors share one again.
    """
    names = dict.fromkeys(name for edit, _ in edits for name in edit.factors)
    bases: dict[str, Tensor] = {}
    factors: dict[str, Tensor] = {}
    joined: dict[tuple[int, ...], Tensor] = {}
    for name in names:
        parts = [(edit, strength) for edit, strength in edits if name in edit.factors]
        key = tuple(id(edit.bases[name]) for edit, _ in parts)
        if key not in joined:
            joined[key] = torch.cat([edit.bases[name].float().cpu() for edit, _ in parts], dim=1)
        bases[name] = joined[key]
        scaled = [strength * edit.factors[name].float().cpu() for edit, strength in parts]
        factors[name] = torch.cat(scaled, dim=1)
    return LowRankEdit(bases, factors)
