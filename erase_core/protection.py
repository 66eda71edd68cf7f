"""How strongly ordinary language is protected: as strongly as still lets the concepts move."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from .closed_form import ClosedForm, EditRegression

RIDGES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
# What a ridge may cost: keys and values must go this share of the way that the weakest ridge lets
# them go. All tokens count alike there, while the model attends to the few that matter; on three
# concepts and random weights 0.93 of it came out as 0.96 to 0.97 of the attainable guidance.
SHARE_OF_ATTAINABLE = 0.93
# How far the guidance of the concept that moves least should go, where it is measured.
AIM = 0.92
# A weaker ridge must gain this much, and harm (ClosedForm.harm) no more than this for each concept.
# Some concepts never get far, such as a style that nothing replaces: with any harm allowed, they
# drew the ridge down to where other styles were lost, and were no more gone.
LEAST_GAIN, MOST_HARM = 0.01, 0.01
# A concept of which less than this moves is not erased; better to say so than to hand it on. Until
# then the harm doesn't count.
LEAST_MOVED = 0.5

Moves = Callable[[ClosedForm], Iterator[int]]


@dataclass(frozen=True)
class Choice:
    """A closed form and how it was chosen.

    Attributes:
        solution: the closed form.
        ridge: the ridge that it was solved with.
        moved: how far each concept goes, on predictions where something was sampled, else on keys
            and values.
    """

    solution: ClosedForm
    ridge: float
    moved: list[float]


def strongest_that_moves(
    regression: EditRegression, rank: int, moves: Moves | None
) -> Iterator[int]:
    """The closed form with the strongest ridge that still moves every concept far enough.

    A generator: yields images evaluated, returns a :class:`Choice`. Keys and values decide first,
    at no cost; where something is sampled, weaker ridges are tried as long as the guidance of the
    concept that moves least is short of the aim and gains, and as long as they do little harm.

    Args:
        moves: a generator function that returns how far each concept goes, on the model's
            predictions; None where nothing is sampled.
    """
    solve = cache(lambda ridge: regression.solve(ridge, rank))
    attainable = solve(RIDGES[-1]).moved
    # The weaker the ridge, the more moves: the first that is enough is found by bisection.
    weakest = len(RIDGES) - 1
    first = bisect_left(
        RIDGES, True, hi=weakest, key=lambda ridge: _enough(solve(ridge), attainable)
    )
    best = None
    for ridge in RIDGES[first:]:
        solution = solve(ridge)
        if moves is None:
            return Choice(solution, ridge, solution.moved)
        if best is not None and min(best.moved) >= LEAST_MOVED and _harms(solution):
            break
        moved = yield from moves(solution)
        if best is not None and min(moved) < min(best.moved) + LEAST_GAIN:
            break
        best = Choice(solution, ridge, moved)
        if min(moved) >= AIM:
            break
    return best


def _harms(solution: ClosedForm) -> bool:
    return solution.harm > MOST_HARM * len(solution.columns)


def _enough(solution: ClosedForm, attainable: Sequence[float]) -> bool:
    return all(
        moved >= SHARE_OF_ATTAINABLE * most
        for moved, most in zip(solution.moved, attainable, strict=True)
    )
