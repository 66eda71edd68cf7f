"""OCE, CURE and RECE of ``benchmarks/erasure``: their equations, and the edits they give."""

from __future__ import annotations

import pytest
import torch

from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods import METHODS, cure, oce, rece, uce
from benchmarks.erasure.methods.base import Method, last_subject_token

from .toy import ToyDenoiser

KEY, VALUE = "toy_attn2_to_k", "toy_attn2_to_v"
CASES = (
    Case("cat => dog", "object"),
    Case("cat", "object"),
    Case("bee\nmoon", "object"),
    Case("ink => flat\nclay", "style"),
    Case("cat => dog", "object", keeps=False),
)


@pytest.fixture
def few_captions(monkeypatch) -> list[str]:
    captions = ["a bear on a bed", "two lemons", "the old town at night in the rain"]
    monkeypatch.setattr(oce, "plain_captions", lambda: captions)
    return captions


def _changed(edit, name: str) -> torch.Tensor:
    """A matrix of the toy denoiser (out, width) with the edit, in float64."""
    weight = ToyDenoiser().matrices()[name].double()
    if name not in edit.factors:
        return weight
    return weight + edit.factors[name].double() @ edit.bases[name].double().T


def _random_rotation(size: int, generator: torch.Generator) -> torch.Tensor:
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    turn[:, 0] *= torch.linalg.det(turn).sign()
    return turn


@pytest.mark.parametrize("sign", (1, -1))
def test_oce_turns_by_the_best_of_all_rotations(sign: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    matrix[0] *= sign * torch.linalg.det(matrix).sign()
    found = oce.rotation(matrix)
    assert torch.allclose(found @ found.T, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert torch.linalg.det(found) > 0
    sizes = torch.linalg.svdvals(matrix)
    best = float((found * matrix).sum())
    assert best == pytest.approx(float(sizes[:-1].sum() + sign * sizes[-1]))
    for _ in range(200):
        skew = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        near = torch.matrix_exp(0.03 * (skew - skew.T)) @ found
        for other in (near, _random_rotation(5, generator)):
            assert float((other * matrix).sum()) < best


def test_oce_wants_what_its_equation_says() -> None:
    torch.manual_seed(1)
    weight, moment = torch.randn(7, 9, dtype=torch.float64), torch.randn(9, 9, dtype=torch.float64)
    sources, targets, preserved = (torch.randn(n, 9, dtype=torch.float64) for n in (2, 2, 3))
    moment = moment @ moment.T
    scales = {"erase": 20.0, "preserve": 0.3, "language": 0.5, "ridge": 1.5}
    expected = 0.5 * weight @ moment @ weight.T + 1.5 * weight @ weight.T
    for row in preserved:
        expected += 0.3 * torch.outer(weight @ row, weight @ row)
    erased, instead = (weight @ rows.T for rows in (sources, targets))
    erased, instead = (columns @ torch.linalg.pinv(columns) for columns in (erased, instead))
    expected -= 20.0 * erased @ (torch.eye(7, dtype=torch.float64) - instead)
    found = oce.wanted(weight, sources, targets, preserved, moment, scales)
    assert torch.allclose(found, expected, atol=1e-10)
    # Nothing turns where nothing is erased, nor where the alternative says the same.
    for other in ({**scales, "erase": 0.0}, scales):
        still = oce.rotation(oce.wanted(weight, sources, sources, preserved, moment, other))
        assert torch.allclose(still, torch.eye(7, dtype=torch.float64), atol=1e-9)


def test_oce_counts_an_alternative_once() -> None:
    row = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    twice = torch.cat([row, 3 * row])
    assert torch.allclose(oce.span(twice), oce.span(row))
    assert float(oce.span(twice).trace()) == pytest.approx(1)


def test_oce_takes_captions_without_their_padding(few_captions) -> None:
    denoiser = ToyDenoiser()
    rows = []
    for caption in few_captions:
        tokens = denoiser.encode([caption])[0].tokens
        rows.append(tokens[: len(caption.split()) + 2].double())  # with start and end
    rows = torch.cat(rows)
    found = oce.language_moment(denoiser, few_captions)
    assert torch.allclose(found, rows.T @ rows / len(rows))


def test_oce_turns_the_values_alone_and_takes_the_concept_away(few_captions) -> None:
    denoiser, case = ToyDenoiser(), CASES[0]
    edit = oce.train(denoiser, case, 0, {**oce.PUBLISHED, "phrasings": False}).edit
    assert set(edit.factors) == {VALUE}
    before, after = denoiser.matrices()[VALUE].double(), _changed(edit, VALUE)
    # Lengths and angles of the values of all tokens are what they were.
    assert torch.allclose(after.T @ after, before.T @ before, atol=1e-5)
    cat, bear = (last_subject_token(denoiser, text) for text in ("cat", "bear"))
    same = [
        float(torch.nn.functional.cosine_similarity(before @ row, after @ row, dim=0))
        for row in (cat, bear)
    ]
    assert same[0] < 0 < 0.5 < same[1]


def test_cure_weighs_the_directions_by_their_energy() -> None:
    rows = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    energy = rows.T @ rows / rows.square().sum()
    one = torch.eye(10, dtype=torch.float64)
    for alpha in (1.0, 2.0, 5.0):
        # The same function of the matrix instead of its eigenvalues.
        expected = alpha * energy @ torch.linalg.inv((alpha - 1) * energy + one)
        assert torch.allclose(cure.projector(rows, alpha), expected, atol=1e-12)


def test_cure_removes_exactly_the_directions_as_alpha_grows() -> None:
    generator = torch.Generator().manual_seed(4)
    forgotten, retained = (
        torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (3, 2)
    )
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    others = torch.linalg.svd(forgotten).Vh[3:]  # orthogonal to all that is forgotten
    left = weight - weight @ cure.eraser(forgotten, forgotten[:0], 1e13)
    assert (left @ forgotten.T).abs().max() < 1e-9
    assert torch.allclose(left @ others.T, weight @ others.T, atol=1e-9)
    left = weight - weight @ cure.eraser(forgotten, retained, 1e13)
    assert torch.allclose(left @ retained.T, weight @ retained.T, atol=1e-9)
    weak, strong = (
        (weight - weight @ cure.eraser(forgotten, retained, alpha)) @ forgotten.T
        for alpha in (1.0, 1e13)
    )
    assert strong.norm() < weak.norm() < (weight @ forgotten.T).norm()


@pytest.mark.parametrize("tokens", ("all", "subject"))
def test_cure_takes_the_tokens_that_it_is_told_to(tokens: str) -> None:
    denoiser, settings = ToyDenoiser(), {**cure.PUBLISHED, "tokens": tokens, "alpha": 1e12}
    start, bee = last_subject_token(denoiser, ""), last_subject_token(denoiser, "bee")
    before = denoiser.matrices()[KEY].double()
    edit = cure.train(denoiser, Case("cat\nbee", "object", keeps=False), 0, settings).edit
    erased, rest = (
        (_changed(edit, KEY) @ row).norm() / (before @ row).norm() for row in (bee, start)
    )
    assert erased < 1e-4 and (rest < 1e-4 if tokens == "all" else rest > 0.5)
    case = Case("cat\nbee", "object")
    edit = cure.train(denoiser, case, 0, settings).edit
    keep = torch.stack([last_subject_token(denoiser, text) for text in case.keep])
    assert torch.allclose(_changed(edit, KEY) @ keep.T, before @ keep.T, atol=1e-4)


@pytest.mark.parametrize("retained", ("none", "keep", "alternatives"))
def test_cure_retains_what_it_is_told_to(retained: str) -> None:
    denoiser, case = ToyDenoiser(), CASES[0]
    settings = {"tokens": "subject", "alpha": 1e12, "retained": retained}
    edit = cure.train(denoiser, case, 0, settings).edit
    before, after = denoiser.matrices()[VALUE].double(), _changed(edit, VALUE)
    kept, dog = (last_subject_token(denoiser, text) for text in (case.keep[0], "dog"))
    moved = [float((after @ row - before @ row).norm() / before.norm()) for row in (kept, dog)]
    assert (moved[0] < 1e-4) == (retained != "none")
    assert (moved[1] < 1e-4) == (retained == "alternatives")


def test_rece_revives_at_the_lowest_of_its_objective() -> None:
    torch.manual_seed(5)
    weights = torch.randn(3, 4, 8, dtype=torch.float64)
    mixing = torch.eye(8, dtype=torch.float64) + 0.3 * torch.randn(8, 8, dtype=torch.float64)
    rows = torch.randn(2, 8, dtype=torch.float64)
    gram = sum(weight.T @ weight for weight in weights)

    def objective(derived: torch.Tensor) -> torch.Tensor:
        seen = sum(((derived @ mixing.T - rows) @ weight.T).square().sum() for weight in weights)
        return seen + 0.1 * derived.square().sum()

    found = rece.revived(rows, gram, mixing, 0.1).requires_grad_()
    lowest = objective(found)
    lowest.backward()
    assert found.grad.abs().max() < 1e-9
    for _ in range(20):
        assert objective(found.detach() + 1e-3 * torch.randn_like(rows)) > lowest
    assert lowest < 0.5 * objective(rows)


def _by_hand(denoiser: ToyDenoiser, case: Case, rounds: int) -> dict[str, torch.Tensor]:
    """RECE's matrices after some rounds, one matrix after the other and term by term."""
    start = uce.train(denoiser, case, 0, uce.PUBLISHED).edit
    now = {name: _changed(start, name) for name in (KEY, VALUE)}
    first = {name: weight.double() for name, weight in denoiser.matrices().items()}
    one = torch.eye(first[KEY].shape[1], dtype=torch.float64)
    cat, dog, *kept = (
        prompt.tokens.double() for prompt in denoiser.encode(["cat", "dog", "", *case.keep])
    )
    for _ in range(rounds):
        inner = 0.1 * one + sum(weight.T @ weight for weight in now.values())
        crossed = sum(now[name].T @ first[name] for name in now)
        derived = [torch.linalg.inv(inner) @ crossed @ row for row in cat]
        pairs = [(1.0, c, a) for c, a in zip(derived, dog, strict=True)]
        pairs += [(0.1, row, row) for rows in kept for row in rows]
        right = 0.1 * one + sum(scale * torch.outer(c, c) for scale, c, _ in pairs)
        for name, weight in now.items():
            left = 0.1 * weight
            for scale, c, a in pairs:
                left = left + scale * torch.outer(weight @ a, c)
            now[name] = left @ torch.linalg.inv(right)
    return now


@pytest.mark.parametrize("rounds", (0, 1, 2))
def test_rece_does_its_rounds(rounds: int) -> None:
    denoiser, case = ToyDenoiser(), CASES[0]
    edit = rece.train(denoiser, case, 0, {**rece.PUBLISHED, "rounds": rounds}).edit
    for name, expected in _by_hand(denoiser, case, rounds).items():
        assert torch.allclose(_changed(edit, name), expected, atol=1e-4)


def test_rece_erases_what_revived_the_concept() -> None:
    denoiser, case = ToyDenoiser(), CASES[0]
    plain, hardened = (
        rece.train(denoiser, case, 0, {**rece.PUBLISHED, "rounds": rounds}).edit
        for rounds in (0, 1)
    )
    weights = [weight.double() for weight in denoiser.matrices().values()]
    cat, dog = (last_subject_token(denoiser, text) for text in ("cat", "dog"))
    mixing = torch.eye(len(cat), dtype=torch.float64) + plain.bases[KEY].double().T
    gram = sum(weight.T @ weight for weight in weights)
    derived = rece.revived(cat[None], gram, mixing, 0.1)[0]

    def apart(edit, aim: torch.Tensor) -> float:
        """How far the edited matrices see the derived embedding from where W sees the aim."""
        return sum(
            float((_changed(edit, name) @ derived - weight.double() @ aim).norm())
            for name, weight in denoiser.matrices().items()
        )

    assert apart(plain, cat) < 0.3 * apart(plain, dog)  # it does revive
    assert apart(hardened, dog) < 0.3 * apart(hardened, cat)


ADDED = {
    "oce": (oce, {VALUE}),
    "cure": (cure, {KEY, VALUE}),
    "rece": (rece, {KEY, VALUE}),
}


# RECE starts from UCE, which wants keep prompts.
RUNS = [
    (f"{name}{told}", case)
    for name in ADDED
    for told in ("", "-phrased")
    for case in CASES
    if case.keeps or name != "rece"
]


@pytest.mark.parametrize("name, case", RUNS, ids=[f"{n}-{c.name}-{c.keeps}" for n, c in RUNS])
def test_every_case_gives_a_finite_edit_of_the_right_matrices(
    name: str, case: Case, few_captions
) -> None:
    method, (_, matrices) = METHODS[name], ADDED[name.removesuffix("-phrased")]
    denoiser = ToyDenoiser()
    edit = method.train(denoiser, case, 0, method.settings).edit
    again = method.train(denoiser, case, 0, method.settings).edit
    assert set(edit.factors) == set(edit.bases) == matrices
    for matrix in matrices:
        change = edit.factors[matrix] @ edit.bases[matrix].T
        assert change.shape == denoiser.matrices()[matrix].shape
        assert change.isfinite().all() and change.any()
        assert torch.equal(change, again.factors[matrix] @ again.bases[matrix].T)


@pytest.mark.parametrize("name", ADDED)
def test_every_setting_of_a_grid_is_one_of_the_method(name: str, few_captions) -> None:
    module, _ = ADDED[name]
    grids = {name: module.GRID, f"{name}-phrased": module.PHRASED_GRID}
    for method, grid in [(METHODS[name], grid) for name, grid in grids.items()]:
        found = [_settings(method, values) for values in grid]
        assert method.settings in found and len(grid) == len({str(values) for values in found})
        for settings in found:
            assert settings.keys() == method.settings.keys()
            assert method.train(ToyDenoiser(), CASES[0], 0, settings).edit.factors


def _settings(method: Method, values: dict) -> dict:
    return dict(method.with_settings("another", **values).settings)
