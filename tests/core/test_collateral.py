"""What else an erasure changes: the figures as they are defined, and what is said about them."""

import math

import pytest
import torch
from concept_surgery.erase_core import erase, preset_settings, report_text
from concept_surgery.erase_core.artefact.cautions import (
    GUIDANCE_HARM,
    GUIDANCE_RUIN,
    harm_grade,
    harm_warnings,
    unknown_warnings,
)
from concept_surgery.erase_core.method.closed_form import Metric
from concept_surgery.erase_core.method.collateral import NO_WORDS, Others, WordChanges
from concept_surgery.erase_core.method.language import Language, Words
from concept_surgery.erase_core.method.protection import HARM, RUIN
from concept_surgery.erase_core.method.reading import things
from concept_surgery.erase_core.method.subspace import SubspaceError
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.model.prompt import Encoded

from .test_linear_algebra import WIDTH, Regression, rows
from .toy import ToyDenoiser

NAMES = ("owl", "boats", "fire truck", "lamp", "cat", "cats", "catalogue")


def some_words(texts=NAMES, count=3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([1.0] * (count - 1) + [7.0])
    return Words(texts, torch.randn(len(texts), count, WIDTH, generator=generator), counts)


def others_of(case, spoken=(), witnesses=None, vocabulary=None):
    witnesses = witnesses or some_words()
    language = Language(case.moment, vocabulary or some_words(count=2), witnesses, 0.0)
    return Others(spoken, language, Metric.of(case.weights, case.moment))


def relative_change(case, edit, row_of_word, counts):
    """From the definition, matrix by matrix and token by token."""
    above = below = 0.0
    for name, weight in case.weights.items():
        w = weight.double()
        change = edit.factors[name].double() @ edit.bases[name].double().T
        energy = float(torch.trace(w @ case.moment @ w.T))
        for row, count in zip(row_of_word.double(), counts.tolist(), strict=True):
            above += count * float((change @ row).square().sum()) / energy
            below += count * float((w @ row).square().sum()) / energy
    return (above / below) ** 0.5


@pytest.mark.parametrize("bases", ["one for all", "one for each"])
def test_the_change_of_a_word_is_as_defined(bases):
    case = Regression(5, 1, 4, 1.0)
    factors = {name: 0.2 * rows(len(w), 7)[:, :6] for name, w in case.weights.items()}
    if bases == "one for all":
        edit = LowRankEdit.shared(rows(6, 9).T, factors)
    else:
        each = {name: rows(6, 9 + n).T for n, name in enumerate(factors)}
        edit = LowRankEdit(each, factors)
    words = some_words()
    found = others_of(case).of_edit(edit, words)
    expected = [relative_change(case, edit, row, words.counts) for row in words.rows]
    assert found.texts == NAMES and min(expected) > 0.1
    assert found.changes.tolist() == pytest.approx(expected, rel=1e-3)
    assert found.mean == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def test_of_a_closed_form_it_is_that_of_its_edit():
    case = Regression(5, 2, 4, 1.0)
    solution, others = case.problem.solve(1.0, 6), others_of(case)
    edit = LowRankEdit.shared(solution.basis.float(), solution.factors(case.weights))
    assert others.of_witnesses(solution).changes.tolist() == pytest.approx(
        others.of_edit(edit, others.witnesses).changes.tolist(), rel=1e-3
    )


def test_words_that_are_spoken_of_are_no_others():
    others = others_of(Regression(5, 1, 4, 1.0), ["cat", "Fire Truck", "boat"])
    left = ("owl", "lamp", "catalogue")
    assert others.witnesses.texts == others.vocabulary.texts == left
    whole = some_words()
    kept = [NAMES.index(text) for text in left]
    assert torch.equal(others.witnesses.rows, whole.rows[kept])
    assert torch.equal(others.witnesses.counts, whole.counts)


def test_the_report_has_the_worst_and_the_nearest_first():
    case = Regression(5, 1, 4, 1.0)
    texts = tuple(f"word {n}" for n in range(20))
    others = others_of(case, (), some_words(texts), some_words(texts, 2))
    edit = LowRankEdit.shared(
        rows(6, 9).T, {name: rows(len(w), 7)[:, :6] for name, w in case.weights.items()}
    )
    concept = others.vocabulary.rows[11] + 0.1 * rows(2, 3)
    found = others.report(edit, [rows(2, 4), concept])
    every = others.of_edit(edit, others.witnesses.telling())
    assert found["change"] == every.mean
    drifts = [entry["drift"] for entry in found["words"]]
    assert drifts == sorted(every.changes.tolist(), reverse=True)
    assert found["nearest"][0]["text"] == "word 11" and len(found["nearest"]) == 8
    changed = others.of_edit(edit, others.vocabulary)
    most = [f"{entry['text']} {entry['drift']:.0%}" for entry in found["most_changed"]]
    assert most == changed.worst(8)


def test_without_words_nothing_changes():
    assert NO_WORDS.mean == 0 and NO_WORDS.worst(3) == []
    case = Regression(5, 1, 4, 1.0)
    nothing = Words((), torch.zeros(0, 2, WIDTH), torch.ones(2))
    others = others_of(case, (), nothing, nothing)
    edit = LowRankEdit.shared(
        rows(6, 9).T, {name: rows(len(w), 7)[:, :6] for name, w in case.weights.items()}
    )
    expected = {"change": 0.0, "words": [], "nearest": [], "most_changed": []}
    assert others.report(edit, [rows(2, 4)]) == expected


def measured(of, drift):
    return {"unnamed_of": of, "unnamed_drift": drift, "unnamed": [{"text": "owl", "drift": drift}]}


@pytest.mark.parametrize(
    "change, of, drift, grade",
    [
        (0.01, "guidance", 0.01, ""),
        (HARM, "guidance", GUIDANCE_HARM, ""),
        (HARM + 0.01, "guidance", 0.0, "harm"),
        (0.0, "guidance", GUIDANCE_HARM + 0.01, "harm"),
        (RUIN + 0.01, "guidance", 0.0, "ruin"),
        (0.0, "guidance", GUIDANCE_RUIN + 0.01, "ruin"),
        (0.0, "keys and values", 5.0, ""),  # the same as the change, counted once
        (None, "guidance", GUIDANCE_HARM + 0.01, "harm"),  # layers that read more than the prompt
        (None, "prediction", 5.0, ""),
    ],
)
def test_what_harms_and_what_ruins(change, of, drift, grade):
    words = [{"text": text, "drift": n / 10} for n, text in enumerate(NAMES)]
    others = None if change is None else {"change": change, "words": words}
    measures = measured(of, drift)
    assert harm_grade(measures, others) == grade
    found = harm_warnings(preset_settings("balanced", concepts="cat => dog"), measures, others)
    assert len(found) == bool(grade)
    if grade:
        assert ("is ruined for" if grade == "ruin" else "suffers in") in found[0]
        worst = "catalogue 60%, cats 50%, cat 40%" if others else "owl"
        assert f"(most: {worst}" in found[0]


@pytest.mark.parametrize(
    "values, advice",
    [
        ({"concepts": "cat => dog"}, "Name a replacement that is closer to"),
        ({"concepts": "cat\npizza => pie"}, "Erase fewer concepts in one run, or name a repl"),
        ({"concepts": "cat"}, "Name a replacement that is close to the concept"),
        ({"concepts": "cat", "protection": 1.0}, "Leave the protection to the run, or raise it."),
    ],
)
def test_what_to_do_about_harm_fits_the_run(values, advice):
    measures = measured("guidance", 0.5)
    (warning,) = harm_warnings(preset_settings("balanced", **values), measures, None)
    assert advice in warning
    if "\n" not in values["concepts"]:
        assert "fewer concepts" not in warning


@pytest.mark.parametrize("of", ["guidance", "keys and values"])
def test_what_is_no_number_is_a_ruin(of):
    changed = {"change": math.nan, "words": []} if of != "guidance" else None
    assert harm_grade(measured(of, math.nan), changed) == "ruin"


def test_unknown_captions_are_told_from_half_on():
    assert unknown_warnings(0.49) == []
    assert "knows only 30% of the words" in unknown_warnings(0.7)[0]


INSTANT = {"concepts": "cat => dog", "captions": 40}


def finished(denoiser, preset="instant", **values):
    last = erase(preset_settings(preset, **{**INSTANT, **values}), denoiser)
    return last


def test_a_run_without_predictions_reports_its_witnesses():
    erasure = finished(ToyDenoiser())
    measures, others = erasure.record["measures"], erasure.record["others"]
    assert measures["unnamed_of"] == "keys and values"
    assert measures["unnamed"] == others["words"] and len(others["words"]) == 20  # half of forty
    assert measures["unnamed_drift"] == others["change"] < HARM
    assert erasure.record["warnings"] == []
    text = report_text(erasure.record)
    assert text.startswith("Verdict: good.") and "What else changes, by keys and values:" in text
    assert "of those that nothing protected: " in text


def test_a_sampled_run_measures_the_guidance_of_words_that_nobody_named():
    small = {"resolution": 32, "trajectories": 8, "sampling_steps": 4}
    record = finished(ToyDenoiser(), "balanced", **small).record
    measures = record["measures"]
    assert measures["unnamed_of"] == "guidance" and len(measures["unnamed"]) == 16
    figures = measures["unnamed_guidance"], record["others"]["change"]
    assert measures["unnamed_drift"] == max(figures)
    held_out = {entry["text"] for entry in record["others"]["words"]}
    assert all(any(word in entry["text"] for word in held_out) for entry in measures["unnamed"])
    text = report_text(record)
    assert "Words nobody named change by " in text and ": their guidance by " in text


class NarrowToy(ToyDenoiser):
    """Nearly one word to it: all that it wasn't made for. The alternative is far from it."""

    known = "a an the of photo picture drawing is there here two people and"

    def vocabulary(self):
        return things()[:40]

    def encode(self, prompts, together=False):
        row = super().token_ids
        known = {n for word in self.known.split() for n in row([word])[0]}
        cat, dog = (row([word])[0][1] for word in ("cat", "dog"))
        found = []
        for ids in row(prompts):
            alike = self._embed([n if n in known or n == dog else cat for n in ids])
            loud = torch.tensor([10.0 if n == dog else 1.0 for n in ids])[:, None]
            found.append(Encoded(loud * alike + 0.2 * self._embed(ids)))
        return found


def test_a_protection_of_the_runs_own_that_ruins_is_refused():
    with pytest.raises(SubspaceError, match=r"would change by \d+% on average .* most of all"):
        finished(NarrowToy())


@pytest.mark.parametrize("preset", ["instant", "balanced"])
def test_a_protection_of_the_users_that_ruins_is_handed_on_with_a_warning(preset):
    small = {"resolution": 32, "sampling_steps": 4} if preset == "balanced" else {}
    record = finished(NarrowToy(), preset, protection=0.0, **small).record
    assert record["others"]["change"] > RUIN
    assert "is ruined for much that nobody named" in record["warnings"][0]
    assert "Leave the protection to the run, or raise it." in record["warnings"][0]
    first, _, second = report_text(record).split("\n")[:3]
    assert first.startswith("Verdict: DON'T USE IT.") and second == record["warnings"][0]


def test_the_worst_words_are_named():
    changes = WordChanges(("a", "b"), torch.tensor([0.25, 0.5]))
    assert changes.worst(1) == ["b 50%"] and changes.mean == 0.375
