"""The benchmark of ``benchmarks/erasure``: its measures, its cache, its lists, the closed forms."""

import json

import numpy as np
import pytest
import torch
from concept_surgery.erase_core.denoiser import Encoded
from concept_surgery.erase_core.measure import CountedDenoiser
from concept_surgery.erase_core.prompts import prompt_pairs
from concept_surgery.erase_core.settings import EraseSettings

from benchmarks.emoji.words import LEFT_OUT_PAIRS, OBJECT_NAMES, STYLE_NAMES
from benchmarks.erasure import ablations, metrics, recovery, report
from benchmarks.erasure.cases import MOST_KEPT, OTHERS, REPORTED, TUNED, Case, Question
from benchmarks.erasure.instead import text_instead
from benchmarks.erasure.methods import esd, ileco, leco, ours, speed, uce
from benchmarks.erasure.methods.base import (
    Lora,
    Method,
    last_subject_token,
    predict_eps,
    whole_matrices,
)
from benchmarks.erasure.methods.phrased import PhrasedCase, phrased
from benchmarks.erasure.plot import plot
from benchmarks.erasure.results import Cache, digest
from benchmarks.erasure.tuned import GRIDS, choose, variants

from .toy import ToyDenoiser

EVERY = (*TUNED, *REPORTED)


def _settings(case: Case) -> EraseSettings:
    return EraseSettings(case.text, keep=case.keep, kind=case.kind)


def test_what_is_tuned_on_is_never_reported() -> None:
    tuned, reported = (
        {word for case in cases for word in case.erased} for cases in (TUNED, REPORTED)
    )
    assert not tuned & reported
    objects = [
        {word for case in cases if case.kind == "object" for word in _words(case)}
        for cases in (TUNED, REPORTED)
    ]
    assert not objects[0] & objects[1]
    assert len(TUNED) == 6 and len(REPORTED) >= 10


def _words(case: Case) -> set[str]:
    return {w for c in case.concepts for w in (c.text, c.alternative) if w}


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_a_case_asks_for_what_the_run_never_saw(case: Case) -> None:
    trained = {
        text for pair in prompt_pairs(_settings(case)) for text in (pair.erased, pair.alternative)
    }
    asked = [question for question in case.questions if question.group != "kept"]
    assert not trained & {question.text for question in asked}
    assert not set(case.keep) & {question.text for question in asked}
    assert len(case.keep) <= MOST_KEPT
    assert _words(case) <= {*OBJECT_NAMES, *STYLE_NAMES}
    said = set(" ".join([*trained, *case.keep]).replace(",", " ").split())
    for question in asked:
        if question.concept is None:
            assert question.name not in said
        if question.group == OTHERS and case.kind == "style":
            assert question.style not in said
        if question.group == "left out":
            assert (question.name, question.style) in LEFT_OUT_PAIRS
    concepts = {question.concept for question in asked if question.group == "erased"}
    assert concepts == set(range(len(case.concepts)))


def test_precision_of_a_hand_made_manifold() -> None:
    real = np.array([[0.0], [1.0], [3.0], [10.0]])
    assert metrics.neighbourhood_radii(real, 1).tolist() == [1, 1, 2, 7]
    assert metrics.neighbourhood_radii(real, 2).tolist() == [3, 2, 3, 9]
    radii = metrics.neighbourhood_radii(real[:3], 1)
    asked = np.array([[-0.9], [-1.1], [4.9], [5.1], [0.5]])
    assert metrics.inside_manifold(asked, real[:3], radii).tolist() == [
        True,
        False,
        True,
        False,
        True,
    ]


def _verdicts(**values):
    count = len(values["name"])
    rows = {
        "style": [None] * count,
        "gone": [None] * count,
        "replaced": [None] * count,
        "intact": [True] * count,
        "change": [0.1] * count,
        "distance": [2.0] * count,
        "distance_before": [1.0] * count,
    }
    rows |= values
    before = {f"{k}_before": v for k, v in rows.items() if k in ("name", "style", "gone", "intact")}
    return {**before, **rows} | {k: v for k, v in values.items() if k.endswith("_before")}


def test_measures_of_a_hand_made_run() -> None:
    yes, no = True, False
    groups = {
        "erased": _verdicts(
            name=[no, no, yes, no],
            name_before=[yes, yes, yes, yes],
            style=[yes, None, no, yes],
            style_before=[yes, None, yes, yes],
            gone=[yes, yes, no, yes],
            gone_before=[no, no, no, no],
            replaced=[yes, no, no, yes],
            intact=[yes, yes, yes, no],
        ),
        "others": _verdicts(
            name=[yes, no, yes, no],
            name_before=[yes, yes, yes, no],
            style=[None, yes, no, yes],
            style_before=[None, yes, yes, no],
            change=[0.0, 0.1, 0.2, 0.3],
        ),
        "left out": _verdicts(
            name=[yes, yes], name_before=[yes, yes], style=[yes, no], style_before=[yes, yes]
        ),
    }
    found = metrics.measures(groups, "object")
    assert found["UA"] == 0.75 and found["UA_intact"] == 0.5 and found["intact"] == 0.75
    assert found["UA_before"] == 0 and found["replaced"] == 0.5
    assert found["IRA"] == pytest.approx(2 / 3)  # 2 of 4 right, 3 of 4 before
    assert found["CRA"] == pytest.approx(1.0)  # 2 of 3 right, 2 of 3 before
    assert found["crossing"] == pytest.approx(2 / 3)
    assert found["others_change"] == pytest.approx(0.15)
    assert found["left_out_right"] == 0.5 and found["left_out_distance"] == 2
    assert found["H"] == pytest.approx(3 / (1 / 0.5 + 3 / 2 + 1))
    groups["erased"]["replaced"] = [None] * 4
    assert metrics.measures(groups, "object")["crossing"] is None
    style = metrics.measures(groups, "style")
    assert style["IRA"] == found["CRA"] and style["CRA"] == found["IRA"]


def test_verdicts_survive_a_line() -> None:
    rows = _verdicts(name=[True, False], style=[None, True], change=[0.1, 0.25])
    assert metrics.unpacked(json.loads(json.dumps(metrics.packed(rows)))) == rows
    line = {
        "of": {"kind": "object"},
        "groups": {g: metrics.packed(rows) for g in ("erased", "others")},
    }
    for group in line["groups"].values():
        group |= {"gone": "10", "gone_before": "00"}
    assert metrics.measured(line)["measures"]["UA"] == 0.5
    line |= {"cost": {"seconds": 2.0, "bare_step_seconds": 0.5, "bare_steps": 4.0}}
    line |= {"notes": {metrics.SHARED: 3.0}}
    cost = metrics.measured(line)["cost"]
    assert (cost["seconds"], cost["bare_steps"]) == (5.0, 10.0)
    assert line["cost"]["seconds"] == 2.0


def test_harmonic_mean_lets_nothing_make_up_for_a_loss() -> None:
    assert metrics.harmonic_mean([1.0, 0.0, 1.0]) == 0
    assert metrics.harmonic_mean([0.5, 2.0]) == pytest.approx(2 / 3)


def test_bootstrap_draws_erasures_not_pictures() -> None:
    """Many runs of one erasure say nothing about others: the interval spans both erasures."""
    value, low, high = metrics.bootstrap([[0.0] * 50, [1.0] * 50])
    assert (value, low, high) == (0.5, 0.0, 1.0)
    assert metrics.bootstrap([[0.4], [0.4], [0.4]]) == pytest.approx((0.4, 0.4, 0.4))
    with pytest.raises(ValueError, match="at least one"):
        metrics.bootstrap([[]])


def test_integrity_is_of_all_erasures_together() -> None:
    """Not the mean of 2 and 0.5: an erasure with few intact pictures before counts as few."""
    pairs = [[(0.2, 0.1)], [(0.4, 0.8), (0.4, 0.8)]]
    value, low, high = metrics.bootstrap(pairs, metrics.ratio_of_means)
    assert value == pytest.approx(0.6 / 0.9) and (low, high) == pytest.approx((0.5, 2.0))
    lines = [_line("cat", "a", 0, intact=0.2, intact_before=0.1), _line("dog", "a", 0, H=1.0)]
    assert report.summarise(lines)["a"]["integrity"][0] == pytest.approx(2)


def test_the_cache_resumes_and_tells_settings_apart(tmp_path) -> None:
    path = tmp_path / "lines.jsonl"
    of = {"model": "m", "settings": {"rate": 1, "steps": 2}, "seed": 0}
    Cache(path).add(of, {"measures": {"UA": 1.0}})
    again = Cache(path)
    assert len(again) == 1
    assert (
        again.get({"seed": 0, "settings": {"steps": 2, "rate": 1}, "model": "m"})["measures"]["UA"]
        == 1
    )
    assert again.get({**of, "seed": 1}) is None
    assert again.get({**of, "settings": {"rate": 2, "steps": 2}}) is None


def test_the_cache_takes_up_after_a_line_that_was_cut_off(tmp_path) -> None:
    path = tmp_path / "lines.jsonl"
    Cache(path).add({"model": "m", "seed": 0}, {})
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    cache = Cache(path)
    assert len(cache) == 1
    cache.add({"model": "n", "seed": 1}, {})
    assert len(Cache(path)) == 2
    assert Cache(path).keep_only("n") == 1
    assert [line["of"]["model"] for line in Cache(path)] == ["n"]


def test_the_cache_refuses_a_line_that_was_edited(tmp_path) -> None:
    path = tmp_path / "lines.jsonl"
    line = Cache(path).add({"model": "m", "settings": {"rate": 1}}, {})
    line["of"]["settings"]["rate"] = 2
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="edited"):
        Cache(path)
    assert digest(line["of"]) != line["key"]


def _line(case: str, method: str, seed: int, model: str = "m", **measures) -> dict:
    of = {"model": model, "case": case, "method": method, "seed": seed}
    cost = {"forward_equivalents": 10, "bare_steps": 5.0, "seconds": 1.0}
    return {"of": of, "measures": measures, "cost": cost, "null_drift": {"200": 0.1, "800": 0.3}}


def test_the_summary_takes_the_newest_lines_of_one_model() -> None:
    lines = [
        _line("cat", "a", 0, model="old", H=0.0),
        _line("cat", "a", 0, H=0.1),
        _line("cat", "a", 0, H=0.5),  # the same run again, with newer code
        _line("dog", "a", 0, H=1.0),
        _line("dog", "a", 1, H=0.8),
        _line("cat", "b", 0, H=0.25, replaced=None),
    ]
    model = report.newest_model(lines)
    lines = report.newest_lines(lines, model)
    assert len(lines) == 4
    summary = report.summarise(lines)
    assert summary["a"]["H"][0] == pytest.approx(0.7)  # of 0.5 and the dog's mean, 0.9
    assert summary["a"]["runs"] == 3 and summary["a"]["erasures"] == 2
    assert summary["a"]["null_drift"] == 0.3 and "replaced" not in summary["b"]
    # Only the cat, at seed 0, was run with both.
    assert report.compare(lines, "a", "b", "H") == pytest.approx((0.25, 0.25, 0.25))
    rows = report.table(summary).splitlines()
    assert len(rows) == 4 and rows[2].startswith("| a | ") and "0.70 ±" in rows[2]
    assert "0.25 |" in rows[3] and "±" not in rows[3]  # one erasure has no interval


def test_the_plot_shows_the_methods_that_have_all_it_needs(tmp_path) -> None:
    whole = {"UA_intact": [0.8, 0.7, 0.9], "IRA": [1.0, 0.99, 1.01], "H": [0.9, 0.8, 0.95]}
    summary = {"ours/a": {**whole, "seconds": 25.0}, "b": {"UA_intact": [0.5, 0.4, 0.6]}}
    plot(summary, tmp_path / "both.svg")
    drawing = (tmp_path / "both.svg").read_text()
    assert "ours/a" in drawing and ">b<" not in drawing
    plot(summary, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawing
    better = {**whole, "H": [0.95, 0.9, 1.0], "seconds": 2.0}
    plot({"c": {**whole, "seconds": 1.0}, "c-tuned": better}, tmp_path / "best.svg")
    drawing = (tmp_path / "best.svg").read_text()
    assert ">c-tuned<" in drawing and ">c<" not in drawing
    plot({"b": summary["b"]}, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_uce_solves_its_normal_equations() -> None:
    """The gradient of the stated objective is zero, for a matrix W, at W' = W M."""
    torch.manual_seed(0)
    rows = [torch.randn(n, 12, dtype=torch.float64) for n in (2, 2, 3)]
    weight = torch.randn(5, 12, dtype=torch.float64)
    new = (weight @ uce.solve(*rows, scale=0.7, ridge=0.5)).requires_grad_()
    sources, targets, kept = rows
    loss = 0.7 * (sources @ new.T - targets @ weight.T).square().sum()
    loss = loss + (kept @ (new - weight).T).square().sum() + 0.5 * (new - weight).square().sum()
    loss.backward()
    assert new.grad.abs().max() < 1e-10
    assert (new - weight).norm() > 0.1


def test_uce_edits_through_the_denoiser_as_solved() -> None:
    denoiser, case = ToyDenoiser(), Case("cat => dog", "object")
    edit = uce.train(denoiser, case, 0, uce.PUBLISHED).edit
    (cat,), (dog,) = denoiser.encode(["cat"]), denoiser.encode(["dog"])
    assert last_subject_token(denoiser, "cat").tolist() == cat.tokens[1].double().tolist()
    for name, weight in denoiser.matrices().items():
        new = weight + edit.factors[name] @ edit.bases[name].T
        before, after = ((w @ cat.tokens[1] - weight @ dog.tokens[1]).norm() for w in (weight, new))
        assert after < 0.05 * before


def test_speed_stays_in_the_null_space_and_solves_its_regression() -> None:
    torch.manual_seed(1)
    width = 16
    retained = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, width, dtype=torch.float64)
    sources, invariant = (torch.randn(n, width, dtype=torch.float64) for n in (2, 3))
    change = torch.randn(2, 5, dtype=torch.float64)
    space = speed.null_space(retained, 1e-9)
    assert space.shape == (width, 10)
    found = speed.solve(sources, change, space, invariant)
    assert (found @ retained.T).abs().max() < 1e-10
    assert (found @ invariant.T).abs().max() < 1e-10
    assert found.norm() > 0.1

    def loss(edit):
        return (sources @ edit.T - change).square().sum() / 2 + edit.square().sum()

    # Any other edit that meets the constraints is worse.
    free = torch.linalg.svd(torch.cat([retained, invariant])).Vh[9:]
    for seed in range(5):
        step = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert loss(found + 1e-3 * step @ free) > loss(found)


def _gap(denoiser: ToyDenoiser, case: Case, edit, eta: float | None) -> float:
    """Distance of the concept's prediction from what a method wants of it; eta of ESD, or None."""
    null, cat, dog = denoiser.encode(["", "cat", "dog"])
    x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(9)) * 5
    sigma = torch.full((6,), 5.0)
    with torch.no_grad():
        plain, towards, instead, now = (
            predict_eps(denoiser, x, sigma, [prompt] * 6, change)
            for prompt, change in ((null, None), (cat, None), (dog, None), (cat, edit))
        )
    wanted = instead if eta is None else plain - eta * (towards - plain)
    return float((now - wanted).norm())


TRAINED = (
    (esd, {**esd.PUBLISHED, "steps": 60, "rate": 3e-4, "sampling_steps": 4}, 1.0),
    (leco, {**leco.PUBLISHED, "steps": 80, "rate": 2e-2, "sampling_steps": 4}, 1.0),
    (ileco, {**ileco.PUBLISHED, "steps": 80, "rate": 2e-2}, None),
)


@pytest.mark.parametrize("peer, settings, eta", TRAINED, ids=("esd", "leco", "ileco"))
def test_a_trained_peer_goes_where_its_equation_points(peer, settings, eta) -> None:
    denoiser, case = ToyDenoiser("cross-attention"), Case("cat => dog", "object")
    edit = peer.train(denoiser, case, 0, settings).edit
    assert set(edit.factors) == set(denoiser.matrices())
    assert _gap(denoiser, case, edit, eta) < 0.6 * _gap(denoiser, case, None, eta)
    again = peer.train(denoiser, case, 0, {**settings, "steps": 3}).edit
    other = peer.train(denoiser, case, 0, {**settings, "steps": 3}).edit
    assert all(torch.equal(again.factors[n], other.factors[n]) for n in again.factors)


def test_esd_takes_the_states_of_another_rate_and_counts_them() -> None:
    settings, case = {**TRAINED[0][1], "steps": 3}, Case("cat => dog", "object")

    def runs() -> list[tuple[torch.Tensor, int, bool]]:
        found = []
        for rate in (3e-4, 1e-3):
            denoiser = CountedDenoiser(ToyDenoiser("cross-attention"))
            outcome = esd.train(denoiser, case, 0, {**settings, "rate": rate})
            change, noted = outcome.edit.factors["toy_attn2_to_v"], metrics.SHARED in outcome.notes
            found.append((change, denoiser.forward_equivalents, noted))
        return found

    alone = runs()
    with esd.states_kept():
        shared = runs()
    after = runs()
    assert alone[0][1] == alone[1][1] > 0
    for one, two, three in zip(alone, shared, after, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[0], three[0])
        assert one[1] == two[1] == three[1]
    assert not torch.equal(alone[0][0], alone[1][0])
    assert [noted for *_, noted in shared] == [False, True]  # whose time another run spent
    assert not any(noted for *_, noted in (*alone, *after))


def test_speed_and_ours_run_on_the_same_denoiser(monkeypatch) -> None:
    monkeypatch.setattr(ours, "_language", dict)
    monkeypatch.setattr(speed, "WORDS", 40)
    denoiser, case = ToyDenoiser(), Case("cat => dog", "object")
    found = speed.train(denoiser, case, 0, {**speed.PUBLISHED, "threshold": 1e-6}).edit
    assert set(found.factors) == {"toy_attn2_to_v"}
    (null,) = denoiser.encode([""])
    change = found.factors["toy_attn2_to_v"] @ found.bases["toy_attn2_to_v"].T
    assert change.any() and (change @ null.tokens[0]).abs().max() < 1e-5
    outcome = ours.train(denoiser, case, 0, {"preset": "instant", "captions": 24})
    assert outcome.edit.factors["toy_attn2_to_k"].any()


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_a_phrased_case_tells_a_peer_what_ours_is_told(case: Case) -> None:
    told, pairs = PhrasedCase.of(case), prompt_pairs(_settings(case))
    assert [(c.text, c.alternative) for c in told.concepts] == [
        (pair.erased, pair.alternative) for pair in pairs
    ]
    assert set(case.erased) <= set(told.erased)
    assert told.keep == case.keep


def test_a_phrased_peer_learns_the_phrasings() -> None:
    case, denoiser = Case("cat => dog", "object"), ToyDenoiser()
    pairs = [pair for pair in prompt_pairs(_settings(case)) if pair.erased != pair.alternative]
    erased, aims = (
        torch.stack([last_subject_token(denoiser, text).float() for text in texts])
        for texts in zip(*[(pair.erased, pair.alternative) for pair in pairs], strict=True)
    )

    def left(method: Method) -> float:
        edit, total = method.train(denoiser, case, 0, method.settings).edit, 0.0
        for name, weight in denoiser.matrices().items():
            new = weight + edit.factors[name] @ edit.bases[name].T
            total += float((erased @ new.T - aims @ weight.T).square().sum())
        return total

    assert left(phrased(uce.UCE)) < 0.5 * left(uce.UCE)


def test_every_start_changes_nothing() -> None:
    matrices = ToyDenoiser("cross-attention").matrices()
    edits = (
        whole_matrices(matrices),
        Lora(matrices, 4, 1.0, torch.Generator().manual_seed(0)).edit(),
    )
    for edit in edits:
        for name, weight in matrices.items():
            change = edit.factors[name] @ edit.bases[name].T
            assert change.shape == weight.shape and not change.any()


def test_every_variant_of_ours_can_be_asked_for() -> None:
    methods = [m for factor in ablations.FACTORS for m in ablations.variants(factor)]
    methods += [m for name in GRIDS if name.startswith("ours") for m in variants(name)]
    for method in methods:
        settings = ours.asked(TUNED[0], 0, method.settings)
        assert settings.layers == method.layers  # what the denoiser is opened with
    named = [method.name for method in methods if method is not ablations.BASE]
    assert len(set(named)) == len(named)


def test_inversion_trains_one_row_and_fits_better() -> None:
    denoiser = ToyDenoiser()
    tokens = denoiser.encode(["a picture of thing"])[0].tokens
    clean = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    found, losses = recovery.invert(denoiser, None, clean, tokens, 4, seed=0, steps=150, rate=0.1)
    assert (found != tokens).any(1).nonzero().flatten().tolist() == [4]
    assert len(losses) == 150
    noise = torch.randn(60, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    sigma = torch.linspace(0.2, 9, 60)
    x = clean.repeat(20, 1, 1, 1) + sigma.view(-1, 1, 1, 1) * noise
    with torch.no_grad():
        before, after = (
            (predict_eps(denoiser, x, sigma, [Encoded(rows)] * 60) - noise).square().mean()
            for rows in (tokens, found)
        )
    assert after < 0.99 * before


def test_the_choice_is_the_best_mean_and_the_first_of_equals() -> None:
    assert choose({"a": [0.2, 0.4], "b": [0.9, 0.0], "c": [0.45, 0.45]}) == "b"
    assert choose({"a": [0.5], "b": [0.5]}) == "a"


@pytest.mark.parametrize(
    "concept, kind, asked, expected",
    [
        ("cat => owl", "object", "a clay drawing of a cat", "a clay drawing of an owl"),
        ("apple", "object", "look at the apple over there", "look at the over there"),
        ("apple", "object", "an apple on a white background", "on a white background"),
        ("ink => flat", "style", "a dog, simple, ink style", "a dog, simple, flat style"),
        ("ink", "style", "an image of a dog in the ink style", "an image of a dog"),
        ("ink", "style", "an ink style picture showing a dog", "a picture showing a dog"),
    ],
)
def test_what_an_erased_prompt_should_come_out_as(concept, kind, asked, expected) -> None:
    question = Question("erased", asked, "cat", None, concept=0)
    assert text_instead(question, Case(concept, kind)) == expected


def test_only_runs_that_every_method_has_compare() -> None:
    runs = [("cat", "ours"), ("cat", "uce"), ("dog", "ours")]
    lines = [{"of": {"case": case, "method": method, "seed": 0}} for case, method in runs]
    assert report.common_lines(lines) == lines[:2]
