"""How strongly ordinary language is protected: as strongly as still lets the concepts move.

The ridge is chosen on words that it doesn't protect. Those it protects would call any ridge good.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from .closed_form import ClosedForm, EditRegression
from .collateral import NO_WORDS, Others, WordChanges
from .guidance import Movement

RIDGES = (
    *(300.0, 170.0, 100.0, 55.0, 30.0, 17.0, 10.0, 5.5, 3.0, 1.7, 1.0, 0.55, 0.3, 0.17),
    *(0.1, 0.03),
)
# What a ridge may cost: keys and values must go this share of the way that the weakest ridge lets
# them go. All tokens count alike there, while the model attends to the few that matter; on three
# concepts and random weights 0.93 of it came out as 0.96 to 0.97 of the attainable guidance.
SHARE_OF_ATTAINABLE = 0.93
# Where words that nobody named would change by more than the first number, the second will do:
# less of the concept is better than a model of which little else is left.
LESS_WILL_DO = ((0.12, 0.9), (0.2, 0.8))
# How far the guidance of the concept that moves least should go, where it is measured.
AIM = 0.92
# A weaker ridge must gain this much, and words that nobody named may then change no more than
# CHANGE_FOR_MORE. Some concepts never get far, such as a style that nothing replaces: with any
# harm allowed, they drew the ridge down to where other styles were lost, and were no more gone.
LEAST_GAIN, CHANGE_FOR_MORE = 0.01, 0.15
# How many ridges are tried on predictions, at most; those weaker than the first at twice the step.
MOST_TRIES, STEP = 3, 2
# A concept of which less than this moves is not erased; better to say so than to hand it on. Until
# then the others don't count.
LEAST_MOVED = 0.5

# Words that nobody named change by so much: their pictures begin to suffer, and a model of which
# little is left.
HARM, RUIN = 0.2, 0.6

Moves = Callable[[ClosedForm], Movement]


@dataclass(frozen=True)
class RidgeChoice:
    """A ridge, the closed form that it gives, and why it was chosen.

    Attributes:
        solution: the closed form.
        ridge: the ridge that it was solved with.
        moved: how far each concept goes, on predictions where something was sampled, else on keys
            and values.
        movement: that in full, where it is of predictions.
        others: how far words change that nothing protected when it was chosen.
    """

    solution: ClosedForm
    ridge: float
    moved: list[float]
    movement: Movement | None
    others: WordChanges


def strongest_that_moves(
    regression: EditRegression,
    rank: int,
    moves: Moves | None,
    others: Others | None = None,
    ridges: Sequence[float] = RIDGES,
) -> RidgeChoice:
    """The strongest ridge that still moves every concept far enough.

    Keys and values decide first,
    at no cost; where something is sampled, weaker ridges are tried as long as the guidance of the
    concept that moves least is short of the aim and gains, and as long as they do little harm.

    Args:
        moves: how far a closed form moves the model's predictions; None where nothing is sampled.
        others: words that the ridge doesn't protect; None where they aren't known.
        ridges: what to choose from, the strongest first.
    """
    solve = cache(lambda ridge: regression.solve(ridge, rank))

    def changes(solution: ClosedForm) -> WordChanges:
        return others.of_witnesses(solution) if others else NO_WORDS

    best: RidgeChoice | None = None
    first = _by_keys_and_values(ridges, solve, changes)
    for ridge in ridges[first::STEP][:MOST_TRIES]:
        solution = solve(ridge)
        changed = changes(solution)
        if moves is None:
            return RidgeChoice(solution, ridge, solution.moved, None, changed)
        # By keys and values: of a concept with few held-out states the guidance says little.
        if best is not None and min(best.solution.moved) >= LEAST_MOVED:
            if changed.mean > CHANGE_FOR_MORE:
                break
        movement = moves(solution)
        moved = movement.concepts
        if best is not None and min(moved) < min(best.moved) + LEAST_GAIN:
            break
        best = RidgeChoice(solution, ridge, moved, movement, changed)
        if min(moved) >= AIM:
            break
    assert best is not None  # there is a ridge, and the first that is tried becomes it
    return best


def _by_keys_and_values(
    ridges: Sequence[float],
    solve: Callable[[float], ClosedForm],
    changes: Callable[[ClosedForm], WordChanges],
) -> int:
    """Which ridge is enough for keys and values and, if that may be, spares the others."""
    attainable = solve(ridges[-1]).moved

    def first_with(share: float, most: int) -> int:
        # The weaker the ridge, the more moves: the first that is enough is found by bisection.
        enough = lambda ridge: _enough(solve(ridge), attainable, share)  # noqa: E731
        return bisect_left(ridges, True, hi=most, key=enough)

    first = first_with(SHARE_OF_ATTAINABLE, len(ridges) - 1)
    while first > 0:
        change = changes(solve(ridges[first])).mean
        least = [share for limit, share in LESS_WILL_DO if change > limit]
        if not least or not _enough(solve(ridges[first - 1]), attainable, least[-1]):
            break
        first -= 1
    return first


def _enough(solution: ClosedForm, attainable: Sequence[float], share: float) -> bool:
    return all(
        moved >= share * most for moved, most in zip(solution.moved, attainable, strict=True)
    )
