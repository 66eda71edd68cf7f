"""The benchmark of ``benchmarks/erasure``: its measures, its cache, its lists."""

import json

import numpy as np
import pytest
from concept_surgery.erase_core.settings.prompts import prompt_pairs
from concept_surgery.erase_core.settings.settings import EraseSettings

from benchmarks.emoji.words import LEFT_OUT_PAIRS, OBJECT_NAMES, STYLE_NAMES
from benchmarks.erasure import ablation_tables, ablations, metrics, report
from benchmarks.erasure.cases import MOST_KEPT, OTHERS, REPORTED, TUNED, Case, Question
from benchmarks.erasure.instead import text_instead
from benchmarks.erasure.methods import Method, ours
from benchmarks.erasure.plot import plot
from benchmarks.erasure.results import Cache, code_digest, digest
from benchmarks.erasure.tuned import choose

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


def test_comments_and_imports_decide_no_result_but_everything_else_does(tmp_path) -> None:
    def of(text: str, name: str = "method.py") -> str:
        path = tmp_path / name
        path.write_text(text)
        return code_digest([path])

    plain = of("RATE = 1\n\ndef train():\n    return RATE\n")
    assert of("# Why.\nRATE = 1\ndef train():\n\n    # Because.\n    return RATE\n") == plain
    moved = "from a.b import (\n    c,\n)\nimport d\nRATE = 1\ndef train():\n    return RATE\n"
    assert of(moved) == plain
    others = [
        "RATE = 2\ndef train():\n    return RATE\n",
        "RATE = 1  # why\ndef train():\n    return RATE\n",
    ]
    assert plain not in [of(text) for text in others]
    text = 'TEXT = """\n# {}\n"""\n'  # a string has no comments
    assert of(text.format("one")) != of(text.format("two"))
    assert of("a cat\n", "captions.txt") != of("# a dog\na cat\n", "captions.txt")


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
    heads, _, *rows = report.table(summary, {"b": 1.25}).splitlines()
    assert len(rows) == 2 and rows[0].startswith("| a | ") and "0.70 ±" in rows[0]
    assert "0.25 |" in rows[1] and "±" not in rows[1]  # one erasure has no interval
    memory = heads.split(" | ").index("memory")
    assert [row.split(" | ")[memory] for row in rows] == [report.UNKNOWN, "1.25"]


def test_the_seeds_table_tells_what_is_missing_and_compares_common_runs() -> None:
    best = report.BEST
    lines = [
        _line("cat", best, 0, H=0.9),
        _line("dog", best, 0, H=0.7),
        _line("cat", best, 1, H=0.8),
        _line("cat", "uce", 0, H=0.5),
        _line("dog", "new", 2, H=1.0),
        _line("cat", "same", 0, H=0.9001),
    ]
    _, _, *rows = (row.split(" | ") for row in report.seeds_table(lines).splitlines())
    found = {row[0].strip("| "): [cell.strip(" |") for cell in row[1:]] for row in rows}
    assert found[best] == ["0.80", "0.80 (of 1)", report.UNKNOWN, ""]
    assert found["uce"] == ["0.50", report.UNKNOWN, report.UNKNOWN, "0.40 (0.40 to 0.40)"]
    assert found["new"][-1] == report.UNKNOWN
    assert found["same"][-1] == "0.00 (0.00 to 0.00)"


def _ablation(case: str, method: Method, gone: str, keep: bool = True, model: str = "m") -> dict:
    flags = {"name": "11", "style": "11", "gone": gone, "intact": "11", "replaced": "--"}
    group = {**flags, **{f"{name}_before": value for name, value in flags.items()}}
    group |= {"change": [0.1, 0.1], "distance": [1, 1], "distance_before": [1, 1]}
    of = {"model": model, "case": case, "method": method.name, "keep": [1] * keep, "kind": "object"}
    return {
        "of": of,
        "groups": {"erased": group, "others": {**group, "gone": "--"}},
        "notes": {"protection": 3.0 if gone == "11" else 0.3, "moved": None},
        "null_drift": {"200": 1e-7, "800": 2e-7},
        "cost": {"forward_equivalents": 1200},
    }


def test_ablation_tables_compare_on_the_erasures_that_all_values_have() -> None:
    base, two, four, *_ = ablations.variants("rank", ours.INSTANT)
    lines = [
        _ablation("cat", base, "10", model="old"),
        *(_ablation("cat", m, gone) for m, gone in ((base, "11"), (two, "10"), (four, "11"))),
        *(_ablation("dog", m, "00") for m in (base, two)),
        _ablation("bee", base, "00", keep=False),
    ]
    text = ablation_tables.tables(ablation_tables.runs_of(lines, "m"))
    instant, balanced = text.split("## ")[1:3]
    rows = [row.split(" | ") for row in instant.splitlines() if row.startswith("| ")][2:]
    assert [row[1] for row in rows] == [ablation_tables.AS_IT_IS, "rank 2", "rank 4"]
    assert [row[2] for row in rows] == ["1.00", "0.50", "1.00"]  # the cat alone
    assert [row[-1] for row in rows] == ["1 |"] * 3
    assert [row[-2] for row in rows] == ["3", "0.3", "3"]  # the ridges
    assert rows[0][-3] == "2e-07" and rows[0][8] == report.UNKNOWN
    assert balanced.count("\n| ") == 2  # no lines, no rows


def test_the_memory_is_known_of_what_was_measured(tmp_path) -> None:
    assert report.known_memory(tmp_path / "none.json") == {}
    assert {"ours/balanced", "uce"} <= set(report.known_memory())
    assert all(1 < ratio < 2 for ratio in report.known_memory().values())


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
