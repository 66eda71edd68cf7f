"""Whether a concept comes out as what shall take its place already, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..settings.settings import Concept, EraseSettings
from .closed_form import Metric, TokenTargets
from .language import Words
from .subspace import SubspaceError

# Of the squared distance that keys and values usually have, for how far the tokens are apart. On a
# small model that draws, ten pairs from "cat => tree" to "gray => grey" had .68 to 1.3 of it; with
# an erasure at full strength on the model .03 to .14, and at half strength .28 to .5. On a second
# model, which the limit wasn't chosen on: .71 to 1.1 over 28 erasures, .05 to .08 and .27 to .38.
NOTHING_LEFT = 0.15
# Where the model tells some ordinary words as little apart, that says nothing.
OF_THE_LEAST = 0.5
FEWEST_WORDS = 4
NOTHING = "nothing in particular"


def refuse_already_erased(
    settings: EraseSettings, edits: Sequence[TokenTargets], metric: Metric, words: Words
) -> None:
    """End a run on a model that does already what is asked for.

    Args:
        edits: of each concept.
        metric: of keys and values.
        words: ordinary ones, to know what is usual on this model.

    Raises:
        SubspaceError: keys and values of a concept are hardly apart from those of its target.
    """
    gains = usual_gains(metric, words)
    if len(gains) < FEWEST_WORDS:
        return
    limit = min(NOTHING_LEFT, OF_THE_LEAST * float(gains.min()))
    found = [
        (c, told_apart(edit, metric, words))
        for c, edit in zip(settings.concepts, edits, strict=True)
    ]
    erased = [(concept, share) for concept, share in found if share < limit]
    if erased:
        raise SubspaceError(_already(erased))


def told_apart(edit: TokenTargets, metric: Metric, words: Words) -> float:
    """How far apart the model holds a concept and its target, 1 for as far as is usual.

    Squared distance of keys and values over that of the tokens, in shares of what it is between
    ordinary words. It doesn't depend on how much the two have in common.
    """
    change = edit.change
    return float(
        _squared(change, metric.matrix).sum() / change.square().sum() / _usual(metric, words)
    )


def usual_gains(metric: Metric, words: Words) -> Tensor:
    """The same for each ordinary word and what all words have in common, (n,)."""
    squared, plain = _away(metric, words)
    return squared / plain.clamp(min=1e-12) / _usual(metric, words)


def _usual(metric: Metric, words: Words) -> float:
    squared, plain = _away(metric, words)
    return float(squared.sum() / plain.sum().clamp(min=1e-12))


def _away(metric: Metric, words: Words) -> tuple[Tensor, Tensor]:
    """Squared distances of words from their mean: of keys and values, and of tokens."""
    away = (words.rows - words.rows.mean(0)).double()
    squared, plain = _squared(away, metric.matrix), away.square().sum(-1)
    return (squared * words.counts).sum(1), (plain * words.counts).sum(1)


def _squared(rows: Tensor, matrix: Tensor) -> Tensor:
    return ((rows @ matrix) * rows).sum(-1)


def _already(erased: Sequence[tuple[Concept, float]]) -> str:
    ends = ", ".join(
        f"{one.text!r} already comes out as {repr(one.alternative) if one.alternative else NOTHING}"
        for one, _ in erased
    )
    apart = ", ".join(f"{share**0.5:.0%}" for _, share in erased)
    return (
        f"On this model {ends}: keys and values differ by only {apart} of what they would for "
        "words that are as far apart. So there is nothing to move. An erasure is on the model "
        "already, or was when its checkpoint was saved. Connect the MODEL of the loader or another "
        "checkpoint, or take the concept out of the list."
    )
