"""Exact set, basis, closed form and alignment against numpy and by property."""

import numpy as np
import pytest
import scipy.linalg
import torch
from concept_surgery.erase_core.method.alignment import (
    STREAM_IDS,
    align_tokens,
    content_length,
    word_span,
)
from concept_surgery.erase_core.method.closed_form import (
    FLOOR,
    MOST_COLUMNS,
    EditRegression,
    Metric,
    TokenTargets,
)
from concept_surgery.erase_core.method.subspace import (
    KEEP_FLOOR,
    SubspaceError,
    exact_set,
    extend_basis,
    leakage,
    remove_span,
)
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.run.ridge import Ridge
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
@given(st.integers(0, 30), st.integers(0, 10_000))
def test_what_is_left_beside_a_basis_is_orthogonal_to_it(taken, seed):
    basis = extend_basis(torch.zeros(WIDTH, 0, dtype=torch.float64), rows(taken + 1, seed))
    some = rows(7, seed + 1).double() + 1e6 * basis[:, 0]
    left = remove_span(some, basis)
    assert leakage(basis, left) < 1e-12
    inside = scipy.linalg.orth(basis.numpy())
    expected = some.numpy() - some.numpy() @ inside @ inside.T
    np.testing.assert_allclose(left, expected, atol=1e-7)


def test_a_prompt_that_does_not_fit_is_approximate_and_the_rest_still_tried():
    keep = [("too wide", rows(WIDTH - 8, 1)), ("narrow", rows(2, 2))]
    found = exact_set([rows(30, 0)], [rows(2, 3)], keep)
    assert [prompt.exact for prompt in found.kept] == [False, True]
    assert found.kept[0].share_left < KEEP_FLOOR <= found.kept[1].share_left == found.share_left


def test_a_prompt_is_kept_exact_only_if_every_concept_has_room_beside_it():
    narrow = rows(1, 5).repeat(4, 1)
    found = exact_set([rows(30, 0), narrow], [rows(2, 3)], [("its own", narrow[:1])])
    assert not found.kept[0].exact and found.kept[0].share_left < 1e-9


def test_no_room_is_refused():
    with pytest.raises(SubspaceError, match="negative prompts"):
        exact_set([rows(10, 0)], [rows(WIDTH - 1, 1)], [])


def test_no_difference_is_refused():
    with pytest.raises(SubspaceError, match="same embeddings"):
        exact_set([torch.zeros(4, WIDTH)], [], [])


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(SubspaceError, match="contain NaN"):
        exact_set([torch.full((4, WIDTH), float("nan"))], [rows(2, 0)], [])


class Regression:
    """A small problem, and the same one in plain numpy from the definition."""

    def __init__(self, seed: int, concepts: int, exact: int, ridge: float) -> None:
        self.weights = {f"m{i}": rows(20 + i, seed + 50 + i) for i in range(3)}
        self.edits = [
            TokenTargets(rows(40, seed + 2 * i + 100), rows(40, seed + 2 * i + 101))
            for i in range(concepts)
        ]
        self.exact = rows(exact, seed + 1)
        self.basis = extend_basis(torch.zeros(WIDTH, 0, dtype=torch.float64), self.exact)
        tokens = rows(300, seed + 2).double()
        self.moment, self.ridge = tokens.T @ tokens / 300, ridge
        self.problem = EditRegression(self.edits, self.basis, self.moment, self.weights)
        moment = self.moment.numpy()
        self.gram = sum(
            w.T @ w / np.trace(w @ moment @ w.T)
            for w in (weight.double().numpy() for weight in self.weights.values())
        ) / len(self.weights)

    def inner(self) -> np.ndarray:
        sources = [edit.source.double().numpy() for edit in self.edits]
        return sum(c.T @ c / len(c) for c in sources) + self.ridge * self.moment.numpy()

    def free(self) -> np.ndarray:
        return scipy.linalg.null_space(self.exact.double().numpy())

    def whole(self, concept: int) -> np.ndarray:
        """M of the unrestricted solution ``dW = W M``: normal equations in the free space."""
        edit, free = self.edits[concept], self.free()
        source, change = edit.source.double().numpy(), edit.change.numpy()
        cross = change.T @ source / len(source) @ free
        return scipy.linalg.solve(free.T @ self.inner() @ free, cross.T, assume_a="pos").T @ free.T

    def distance(self, matrix: np.ndarray) -> float:
        """``tr(G D inner D^T)`` of a difference D of two M."""
        return float(np.trace(self.gram @ matrix @ self.inner() @ matrix.T))


REGRESSIONS = st.builds(
    Regression,
    st.integers(0, 5000),
    st.integers(1, 3),
    st.integers(1, 8),
    st.sampled_from((0.1, 3.0)),
)


@settings(max_examples=15, deadline=None)
@given(REGRESSIONS)
def test_at_full_rank_the_closed_form_is_the_ridge_regression(case):
    found = case.problem.solve(case.ridge, WIDTH)
    expected = sum(case.whole(i) for i in range(len(case.edits)))
    np.testing.assert_allclose(
        (found.mixing @ found.basis.T).numpy(), expected, rtol=1e-3, atol=1e-4
    )
    assert leakage(found.basis, case.exact) < 1e-12


@settings(max_examples=15, deadline=None)
@given(REGRESSIONS, st.integers(1, 8))
def test_at_a_low_rank_it_is_the_best_of_that_rank(case, rank):
    """Eckart and Young: what the best of a rank misses are the singular values beyond it."""
    found = case.problem.solve(case.ridge, rank)
    free = case.free()
    inner = scipy.linalg.sqrtm(free.T @ case.inner() @ free).real
    gram = scipy.linalg.sqrtm(case.gram).real
    for concept, (start, end) in enumerate(found.columns):
        assert end - start == rank
        own = (found.mixing[:, start:end] @ found.basis[:, start:end].T).numpy()
        whole = case.whole(concept)
        sizes = scipy.linalg.svdvals(gram @ whole @ free @ inner)
        missed = case.distance(whole - own)
        assert missed == pytest.approx(
            (sizes[rank:] ** 2).sum(), rel=1e-2, abs=1e-5 * (sizes**2).sum()
        )


@pytest.mark.parametrize("ridge", [0.0, 0.03, 30.0])
@pytest.mark.parametrize("rank", [2, 12])
def test_the_search_for_directions_ends_at_the_dense_optimum(ridge, rank):
    """A wide problem whose singular values fall slowly, and more directions than are searched."""
    width, count = 256, 200
    generator = torch.Generator().manual_seed(7)
    spread = torch.arange(1, width + 1) ** -0.2
    source, target, tokens, weight, exact = (
        torch.randn(n, width, generator=generator) * spread for n in (count, count, 900, 300, 20)
    )
    moment = tokens.double().T @ tokens.double() / len(tokens)
    basis = extend_basis(torch.zeros(width, 0, dtype=torch.float64), exact)
    edit = TokenTargets(source, target)
    found = EditRegression([edit], basis, moment, {"w": weight}).solve(ridge, rank)
    seen = source.double().numpy()
    inner = seen.T @ seen / count + max(ridge, FLOOR) * moment.numpy()
    free, w = scipy.linalg.null_space(exact.double().numpy()), weight.double().numpy()
    root = scipy.linalg.cholesky(free.T @ inner @ free, lower=True)
    cross = edit.change.numpy().T @ seen / count
    whitened = w @ cross @ scipy.linalg.solve_triangular(root, free.T, lower=True).T
    sizes = scipy.linalg.svdvals(whitened) ** 2

    def missed(matrix: np.ndarray) -> float:
        """What is minimised, less what doesn't depend on the solution."""
        return np.trace(w @ matrix @ inner @ matrix.T @ w.T - 2 * w @ cross @ matrix.T @ w.T)

    reached = -missed((found.mixing @ found.basis.T).numpy())
    assert sizes[:rank].sum() * 0.999 <= reached <= sizes[:rank].sum() * 1.000001
    assert sizes[:rank].sum() < 0.9 * sizes.sum()
    assert found.basis.shape == (width, rank) and leakage(found.basis, exact) < 1e-12
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(rank), atol=1e-10)


@pytest.mark.parametrize("decay", [0.2, 1.0, 2.0])
def test_the_basis_is_orthogonal_to_rounding_whatever_the_embeddings_share(decay):
    """All tokens share a part that is far larger than what tells them apart, as in CLIP."""
    width = 256
    generator = torch.Generator().manual_seed(7)
    spread = torch.arange(1, width + 1) ** -decay
    shared = 20 * torch.randn(1, width, generator=generator)
    source, target, tokens, exact = (
        torch.randn(n, width, generator=generator) * spread + shared for n in (200, 200, 900, 20)
    )
    basis = extend_basis(torch.zeros(width, 0, dtype=torch.float64), exact)
    moment = tokens.double().T @ tokens.double() / len(tokens)
    weights = {"w": torch.randn(300, width, generator=generator)}
    problem = EditRegression([TokenTargets(source, target)], basis, moment, weights)
    for ridge in (0.0, 0.03, 30.0):
        found = problem.solve(ridge, 12)
        assert leakage(found.basis, exact) < 1e-15
        identity = np.eye(found.basis.shape[1])
        np.testing.assert_allclose(found.basis.T @ found.basis, identity, atol=1e-12)


def test_an_edit_of_one_direction_takes_one_column():
    case = Regression(5, 1, 4, 1.0)
    edit = TokenTargets(rows(1, 8).repeat(40, 1), rows(1, 9).repeat(40, 1))
    found = EditRegression([edit], case.basis, case.moment, case.weights).solve(1.0, 8)
    assert found.basis.shape == (WIDTH, 1) and leakage(found.basis, case.exact) < 1e-12
    assert 0.5 < found.moved[0] <= 1


def test_an_edit_that_the_exact_set_hides_moves_nothing():
    case = Regression(5, 1, 4, 1.0)
    edit = TokenTargets(case.exact, rows(4, 9))
    found = EditRegression([edit], case.basis, case.moment, case.weights).solve(1.0, 8)
    assert abs(found.moved[0]) < 1e-6 and found.harm < 1e-6
    assert leakage(found.basis, case.exact) < 1e-12


def test_keys_and_values_both_count_in_the_metric_of_many_matrices():
    """Names alternate between the two; those that stand for all must not be of one kind."""
    names = [f"m{i:02}_attn2_to_{kind}" for i in range(25) for kind in "kv"]
    key, value = torch.zeros(2, WIDTH), torch.zeros(2, WIDTH)
    key[:, 0] = value[:, 1] = 1.0
    matrices = {name: key if name.endswith("k") else value for name in names}
    found = Metric.of(matrices, torch.eye(WIDTH, dtype=torch.float64))
    assert 0.4 < found.matrix[0, 0] < 0.6 and 0.4 < found.matrix[1, 1] < 0.6
    kinds = [name[-1] for name in found.energies]
    assert 0.4 < kinds.count("k") / len(kinds) < 0.6
    assert set(found.energies.values()) == {2.0}


@settings(max_examples=15, deadline=None)
@given(REGRESSIONS)
def test_what_moved_and_what_it_harms_are_as_defined(case):
    found = case.problem.solve(case.ridge, 5)
    factors = found.factors(case.weights)
    for edit, moved in zip(case.edits, found.moved, strict=True):
        left = before = 0.0
        for name, weight in case.weights.items():
            w, delta = weight.double(), factors[name].double() @ found.basis.T
            scale = 1 / float(torch.trace(w @ case.moment @ w.T))
            left += scale * float(
                (edit.change @ w.T - edit.source.double() @ delta.T).square().sum()
            )
            before += scale * float((edit.change @ w.T).square().sum())
        assert moved == pytest.approx(1 - left / before, abs=1e-4)
    harms = [
        float(torch.trace(d @ case.moment @ d.T) / torch.trace(w @ case.moment @ w.T))
        for w, d in (
            (w.double(), factors[name].double() @ found.basis.T) for name, w in case.weights.items()
        )
    ]
    assert found.harm == pytest.approx(sum(harms) / len(harms), rel=1e-3)


def test_a_stronger_ridge_moves_and_harms_less():
    problem = Regression(3, 1, 4, 1.0).problem
    found = [problem.solve(ridge, WIDTH) for ridge in (0.01, 0.1, 1.0, 10.0)]
    harms = [solution.harm for solution in found]
    moved = [min(solution.moved) for solution in found]
    assert harms == sorted(harms, reverse=True) and moved == sorted(moved, reverse=True)
    assert harms[0] > 2 * harms[-1]


def test_many_concepts_share_the_columns_there_are():
    case = Regression(1, 3, 4, 1.0)
    problem = EditRegression(case.edits * 100, case.basis, case.moment, case.weights)
    found = problem.solve(1.0, 16)
    assert found.basis.shape[1] == 300 * (MOST_COLUMNS // 300) <= MOST_COLUMNS


def test_ridge_is_the_relative_change_of_ordinary_keys():
    tokens, weight = rows(200, 1).double(), rows(20, 2)
    basis = torch.linalg.qr(rows(6, 3).T).Q
    factor = torch.randn(20, 6, generator=torch.Generator().manual_seed(4))
    names = ("x_attn2_to_k", "x_attn2_to_v")
    edit = LowRankEdit.shared(basis, dict.fromkeys(names, factor))
    ridge = Ridge(2.0, dict.fromkeys(names, weight), tokens.T @ tokens / 200)(edit)
    change = tokens.numpy() @ basis.double().numpy() @ factor.double().numpy().T
    before = tokens.numpy() @ weight.double().numpy().T
    assert float(ridge) == pytest.approx(2 * (change**2).sum() / (before**2).sum(), rel=1e-5)


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
    assert align_tokens(erased, alternative, [START, *[END] * 5]) == expected


def test_the_tokens_of_each_encoder_are_aligned_among_themselves():
    """What is left out becomes the end of its own encoder's prompt, not of the other's."""
    raised = [STREAM_IDS + token for token in (7, 3, 2, 0, 0)], [STREAM_IDS + 7, STREAM_IDS + 2]
    erased = [START, 5, 6, END, END, *raised[0]]
    alternative = [START, 6, END, END, *raised[1], *[STREAM_IDS] * 3]
    null = [START, *[END] * 3, STREAM_IDS + 2, *[STREAM_IDS] * 4]
    # The end token of the second encoder is 2, and its padding 0: what goes becomes the end.
    assert align_tokens(erased, alternative, null) == [0, 2, 1, 2, 3, 4, 5, 5, 6, 7]


# Three words of which the middle one goes, in each tokenizer's surroundings: the null prompt, what
# closes a prompt, and what stands in front.
SURROUNDINGS = {
    "CLIP-L": ([START, END, END, END, END], [END] * 4, [START]),
    "CLIP-G": ([START, END, 0, 0, 0], [END, 0, 0, 0], [START]),
    "T5": ([END, 0, 0, 0, 0], [END, 0, 0, 0, 0], []),
    "no padding": ([END], [END], []),
    "no end": ([START], [], [START]),
    "padding alone": ([0, 0, 0, 0], [0, 0, 0, 0], []),
}


@pytest.mark.parametrize("layout", SURROUNDINGS)
def test_what_is_left_out_becomes_the_end_whatever_the_padding(layout):
    null, closing, front = SURROUNDINGS[layout]
    window = len(null) if len(null) > 1 else 99

    def prompt(*words):
        return [*front, *words, *closing][: max(window, len(front) + len(words) + bool(closing))]

    erased, alternative, begin = prompt(5, 6), prompt(5), len(front)
    assert (
        content_length(erased, null) == begin + 2 and content_length(alternative, null) == begin + 1
    )
    roles = align_tokens(erased, alternative, null)
    end = min(begin + 1, len(alternative) - 1)  # without an end token the last word stands for it
    assert roles[: begin + 2] == [*range(begin + 1), end]
    rest = [min(end + i, len(alternative) - 1) for i in range(len(erased) - begin - 2)]
    assert roles[begin + 2 :] == rest
    # Taken out whole, the null prompt is what is left.
    gone = align_tokens(prompt(6), null, null)
    assert gone[begin] == min(begin, len(null) - 1)


@pytest.mark.parametrize("layout", ["CLIP-L", "CLIP-G", "T5"])
def test_a_prompt_that_fills_its_window_keeps_its_last_word(layout):
    null, closing, front = SURROUNDINGS[layout]
    for count in range(1, len(null) - len(front)):
        ids = [*front, *range(5, 5 + count), *closing][: len(null)]
        assert word_span(ids, null) == (len(front), len(front) + count)
        assert content_length(ids, null) == len(front) + count


def test_a_moment_of_few_captions_that_was_rounded_still_gives_a_solution():
    """Wide embeddings with a large shared part: rounding makes the empty directions negative."""
    width, generator = 400, torch.Generator().manual_seed(0)
    shared = 30 * torch.randn(1, width, generator=generator)
    captions, source, target, null = (
        torch.randn(n, width, generator=generator) + shared for n in (150, 40, 40, 5)
    )
    moment = (captions.double().T @ captions.double() / len(captions)).float()
    assert torch.linalg.eigvalsh(moment.double())[0] < -FLOOR * moment.diagonal().mean()
    exact = exact_set([target - source], [null], []).basis
    weights = {"k": torch.randn(30, width, generator=generator)}
    regression = EditRegression([TokenTargets(source, target)], exact, moment, weights)
    solution = regression.solve(0.03, 16)
    assert solution.moved[0] > 0.5 and leakage(solution.basis, null) < 1e-12
