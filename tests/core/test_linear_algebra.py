"""Exact set, basis, closed form and alignment against numpy and by property."""

import numpy as np
import pytest
import torch
from concept_surgery.erase_core.closed_form import align_tokens, closed_form_factors
from concept_surgery.erase_core.subspace import (
    KEEP_FLOOR,
    SubspaceError,
    edit_subspace,
    extend_basis,
    leakage,
)
from concept_surgery.erase_core.trainer import Ridge
from hypothesis import given, settings
from hypothesis import strategies as st

WIDTH = 48


def rows(count, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator) * scale


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10_000))
def test_basis_spans_what_it_was_given(first, second, seed):
    one, other = rows(first, seed), rows(second, seed + 1, 1e-4)
    basis = extend_basis(extend_basis(torch.zeros(WIDTH, 0, dtype=torch.float64), one), other)
    stacked = np.concatenate([one.numpy(), other.numpy()]).astype(np.float64)
    assert basis.shape[1] == np.linalg.matrix_rank(stacked)
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)
    projected = stacked @ basis.numpy() @ basis.numpy().T
    np.testing.assert_allclose(projected, stacked, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 3), st.integers(0, 10_000))
def test_basis_of_the_edit_never_sees_exact_prompts(rank, kept, seed):
    keep = [(f"prompt {i}", rows(5, seed + 10 + i)) for i in range(kept)]
    null = rows(6, seed + 1)
    found = edit_subspace(rows(30, seed), [null], keep, rank)
    assert leakage(found.basis, null) < 1e-12
    for (_, tokens), prompt in zip(keep, found.kept, strict=True):
        assert prompt.exact == (prompt.share_left >= KEEP_FLOOR)
        assert (leakage(found.basis, tokens) < 1e-12) == prompt.exact


def test_a_prompt_that_does_not_fit_is_approximate_and_the_rest_still_tried():
    edits = rows(30, 0)
    keep = [("too wide", rows(WIDTH - 8, 1)), ("narrow", rows(2, 2))]
    found = edit_subspace(edits, [rows(2, 3)], keep, 4)
    assert [prompt.exact for prompt in found.kept] == [False, True]
    assert found.kept[0].share_left < KEEP_FLOOR


def test_no_room_is_refused():
    with pytest.raises(SubspaceError, match="negative prompts"):
        edit_subspace(rows(10, 0), [rows(WIDTH - 1, 1)], [], 4)


def test_no_difference_is_refused():
    with pytest.raises(SubspaceError, match="same embeddings"):
        edit_subspace(torch.zeros(4, WIDTH), [], [], 4)


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(SubspaceError, match="contain NaN"):
        edit_subspace(torch.full((4, WIDTH), float("nan")), [rows(2, 0)], [], 4)


def test_closed_form_solves_the_ridge_regression():
    weight, erased, other = rows(20, 1).contiguous(), rows(60, 2), rows(60, 3)
    basis = torch.linalg.qr(rows(6, 4).T.double()).Q
    moment = rows(100, 5).double().T @ rows(100, 5).double() / 100
    found = closed_form_factors({"m": weight}, basis, [erased], [other], moment, 0.3)["m"]
    z = erased.double().numpy() @ basis.numpy()
    y = (other - erased).double().numpy() @ weight.double().numpy().T
    ridge = 0.3 * basis.numpy().T @ moment.numpy() @ basis.numpy()
    expected = np.linalg.solve(z.T @ z / 60 + ridge, z.T @ y / 60).T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_ridge_is_the_relative_change_of_ordinary_keys():
    tokens, weight = rows(200, 1).double(), rows(20, 2)
    basis = torch.linalg.qr(rows(6, 3).T.double()).Q
    factor = torch.randn(20, 6, generator=torch.Generator().manual_seed(4))
    ridge = Ridge({"m": weight}, basis, tokens.T @ tokens / 200)({"m": factor})
    change = tokens.numpy() @ basis.numpy() @ factor.double().numpy().T
    before = tokens.numpy() @ weight.double().numpy().T
    assert float(ridge) == pytest.approx((change**2).sum() / (before**2).sum(), rel=1e-5)


START, END = 1, 2


@pytest.mark.parametrize(
    "erased, alternative, expected",
    [
        ([START, 5, 6, END, END, END], [START, 5, 7, END, END, END], [0, 1, 2, 3, 4, 5]),
        ([START, 5, 6, END, END, END], [START, 8, 9, 6, END, END], [0, 2, 3, 4, 5, 5]),
        ([START, 5, 6, END, END, END], [START, 6, END, END, END, END], [0, 2, 1, 2, 3, 4]),
        ([START, 5, END, END], [START, END, END, END], [0, 1, 1, 2]),
    ],
)
def test_tokens_are_aligned_by_role(erased, alternative, expected):
    assert align_tokens(erased, alternative) == expected
