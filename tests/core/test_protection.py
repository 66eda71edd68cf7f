"""Which ridge is chosen: strong enough to spare others, weak enough for the concepts to move."""

import pytest
import torch
from concept_surgery.erase_core.method.closed_form import EditRegression, Metric
from concept_surgery.erase_core.method.collateral import Others, WordChanges
from concept_surgery.erase_core.method.language import Language, Words
from concept_surgery.erase_core.method.protection import (
    CHANGE_FOR_MORE,
    LEAST_MOVED,
    LESS_WILL_DO,
    RIDGES,
    SHARE_OF_ATTAINABLE,
    strongest_that_moves,
)
from concept_surgery.erase_core.run.measure import Movement
from hypothesis import given, settings
from hypothesis import strategies as st

from .test_linear_algebra import WIDTH, Regression, rows


def moving(*guidance):
    """Something that says how far the only concept goes, try by try, and what was tried."""
    evaluated = []

    def moves(solution):
        evaluated.append(solution)
        share = guidance[len(evaluated) - 1]
        return Movement(share, [share], share, share, share, 0.1)

    return moves, evaluated


class Changing:
    """Words that change as a function of the closed form says."""

    def __init__(self, change):
        self._change = change

    def of_witnesses(self, solution):
        return WordChanges(("owl",), torch.tensor([float(self._change(solution))]))


def strongest_with(problem, share):
    """Place of the strongest ridge that moves all concepts that share of what can be attained."""
    moved = [problem.solve(ridge, 4).moved for ridge in RIDGES]
    enough = [
        all(m >= share * most for m, most in zip(some, moved[-1], strict=True)) for some in moved
    ]
    return enough.index(True)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 4))
def test_the_ridge_chosen_is_the_strongest_that_is_enough(seed, concepts):
    problem, solved = Regression(seed, concepts, 4, 1.0).problem, []

    class Counted:
        def solve(self, ridge, rank):
            solved.append(ridge)
            return problem.solve(ridge, rank)

    choice = strongest_that_moves(Counted(), 4, None)
    assert choice.ridge == RIDGES[strongest_with(problem, SHARE_OF_ATTAINABLE)]
    assert choice.moved == choice.solution.moved and choice.movement is None
    assert len(solved) == len(set(solved)) <= 1 + len(RIDGES).bit_length()


@pytest.mark.parametrize(
    "guidance, tried, chosen, change, rank",
    [
        ([0.95], 1, 0, 0, 4),
        ([0.5, 0.7, 0.93], 3, 2, 0, 4),
        ([0.5, 0.7, 0.705], 3, 1, 0, 4),
        ([0.5, 0.7, 0.93], 3, 2, CHANGE_FOR_MORE - 0.01, WIDTH),
        ([0.4], 1, 0, CHANGE_FOR_MORE + 0.01, WIDTH),  # more would cost others too much
        # Of so low a rank keys and values never get far: whatever it costs, until they do.
        ([0.5, 0.7, 0.93], 3, 2, 1, 1),
        ([0.4, 0.55, 0.555], 3, 1, 1, 1),
    ],
)
def test_weaker_ridges_are_tried_while_the_guidance_is_short_and_others_are_spared(
    guidance, tried, chosen, change, rank
):
    moves, evaluated = moving(*guidance)
    case, others = Regression(3, 1, 4, 1.0), Changing(lambda _: change)
    problem = EditRegression(case.edits, case.basis, 0.1 * case.moment, case.weights)
    choice = strongest_that_moves(problem, rank, moves, others)
    assert len(evaluated) == tried
    assert choice.solution is evaluated[chosen] and choice.moved == [guidance[chosen]]
    assert choice.movement.concepts == choice.moved
    assert choice.others.mean == pytest.approx(change)
    harms = [solution.harm for solution in evaluated]
    assert harms == sorted(harms)
    reached = [min(solution.moved) for solution in evaluated]
    assert rank == 4 or (min(reached) >= LEAST_MOVED) == (rank == WIDTH)


def test_a_stronger_ridge_is_taken_where_others_change_too_much():
    problem = Regression(6, 1, 4, 1.0).problem
    usual = strongest_with(problem, SHARE_OF_ATTAINABLE)

    def chosen(change):
        choice = strongest_that_moves(problem, 4, None, Changing(change))
        return RIDGES.index(choice.ridge)

    before = usual
    assert chosen(lambda _: LESS_WILL_DO[0][0] - 0.01) == usual
    for limit, share in LESS_WILL_DO:  # the more they change, the less of the concept will do
        stronger = strongest_with(problem, share)
        assert chosen(lambda _, limit=limit: limit + 0.01) == stronger < before
        before = stronger
    # No stronger than it takes.
    harm = problem.solve(RIDGES[usual - 1], 4).harm
    assert before < usual - 1
    assert chosen(lambda s: 1.0 if s.harm > harm * 1.001 else 0.0) == usual - 1


def test_words_that_are_near_the_concept_call_for_a_stronger_ridge():
    """The same with words instead of a made-up figure: each is the concept and something else."""
    case = Regression(3, 1, 4, 1.0)
    metric = Metric.of(case.weights, case.moment)
    concept = case.edits[0].source

    def chosen(share):
        near = (share * concept[:8] + (1 - share) * rows(8, 77))[:, None]
        words = Words(tuple("abcdefgh"), near, torch.ones(1))
        others = Others([], Language(case.moment, words, words, 0.0), metric)
        return strongest_that_moves(case.problem, 4, None, others)

    far, near = chosen(0.0), chosen(1.0)
    assert near.others.mean > far.others.mean and near.ridge >= far.ridge
    assert near.solution.harm <= far.solution.harm


@pytest.mark.parametrize("ridge", [0.0, 30.0])
def test_the_users_own_ridge_is_taken_and_measured(ridge):
    moves, evaluated = moving(0.2)
    problem, others = Regression(3, 1, 4, 1.0).problem, Changing(lambda _: 5.0)
    choice = strongest_that_moves(problem, 4, moves, others, (ridge,))
    assert evaluated == [choice.solution]
    assert choice.ridge == ridge and choice.moved == [0.2] and choice.others.mean == 5.0
    expected = problem.solve(ridge, 4)
    torch.testing.assert_close(choice.solution.basis, expected.basis)
    assert choice.solution.basis.shape[0] == WIDTH
