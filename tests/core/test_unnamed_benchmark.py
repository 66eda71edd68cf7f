"""What of ``benchmarks/unnamed`` needs no model: its cases, questions, work, results and tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.settings.prompts import with_article

from benchmarks.emoji.words import OBJECT_NAMES
from benchmarks.emoji.words import STYLE_NAMES as EMOJI_STYLES
from benchmarks.erasure.cases import TUNED
from benchmarks.erasure.methods.base import last_subject_token
from benchmarks.erasure.results import Cache, digest
from benchmarks.flow.words import THING_NAMES as FLOW_THINGS
from benchmarks.icons.words import STYLE_NAMES as ICON_STYLES
from benchmarks.icons.words import THING_NAMES
from benchmarks.unnamed import agreement, exactness, report, run
from benchmarks.unnamed.cases import BROKEN, CASES, FLOW, FLOW_TRIED, TEN, Case
from benchmarks.unnamed.methods import (
    INSTANT,
    METHODS,
    PeersDenoiser,
    PhrasedCase,
    noted,
    together,
)
from benchmarks.unnamed.protocol import (
    Untouched,
    key_value_changes,
    measure_ten,
    outside_words,
    unnamed_things,
)
from benchmarks.unnamed.worlds import Drawn, Sampler, asked, noises

from .toy import ToyDenoiser

NAMES = {"emoji": (OBJECT_NAMES, EMOJI_STYLES), "icons": (THING_NAMES, ICON_STYLES)}


class PaperWorld:
    """A world that draws what the prompt names, and of an edit nothing at all."""

    name, identity, drawing = "paper", "0", "paper"
    things, styles = ("cat", "hot dog", "dog", "sun"), ("ink", "flat")

    def __init__(self) -> None:
        self.drawn = 0

    def encode(self, texts) -> torch.Tensor:
        return torch.ones(len(texts), 3, 2)

    def matrices(self) -> dict[str, torch.Tensor]:
        return {"m": torch.eye(2)}

    def draw(self, texts, seeds, edit=None) -> Drawn:
        self.drawn += len(texts)
        named = [[n for n in self.things if n in text] for text in texts]
        things = ["nothing" if edit else max(names, key=len) for names in named]
        styles = [next((s for s in self.styles if s in text), "ink") for text in texts]
        return Drawn(np.zeros((len(texts), 4, 4, 3), np.uint8), things, styles)


def test_the_flow_models_cases_are_of_its_things_and_none_was_tried_before():
    for case in (*FLOW, *FLOW_TRIED):
        known = ICON_STYLES if case.kind == "style" else FLOW_THINGS
        assert case.parts[0] in known and case.parts[1] in ("", *known), case
    assert len({case.text for case in FLOW}) == len(FLOW) == 28
    tried = {case.parts[0] for case in FLOW_TRIED}
    assert tried.isdisjoint(case.parts[0] for case in FLOW)


@pytest.mark.parametrize("world", CASES)
class TestCases:
    def test_counts(self, world):
        groups = [case.group for case in CASES[world]]
        assert {g: groups.count(g) for g in groups} == {
            "removals": 12,
            "replacements": 12,
            "styles": 4,
        }
        assert len({case.text for case in CASES[world]}) == len(groups)
        styles = [case for case in CASES[world] if case.kind == "style"]
        assert sum(bool(case.parts[1]) for case in styles) == 3

    def test_half_of_the_replacements_are_of_another_shape(self, world):
        pairs = [case.parts for case in CASES[world] if case.group == "replacements"]
        shapes = [[_shape(name) for name in pair] for pair in pairs]
        assert sum(one != other for one, other in shapes) == 6

    def test_what_is_judged_is_known(self, world):
        things, styles = NAMES[world]
        for case in CASES[world]:
            assert case.parts[0] in (styles if case.kind == "style" else things), case
        assert set(TEN[world]) <= set(things) and len(set(TEN[world])) == 10
        assert set(BROKEN[world]) <= set(CASES[world])

    def test_no_setting_was_chosen_on_them(self, world):
        tuned = {name for case in TUNED for name in case.erased}
        assert tuned.isdisjoint(case.parts[0] for case in CASES[world])


def _shape(name: str) -> tuple[int, str]:
    return len(name.split()), with_article(name).removesuffix(name)


def test_icons_have_names_of_two_words():
    removed = [case.text for case in CASES["icons"] if case.group == "removals"]
    assert {"hot dog", "scissors", "hourglass"} <= set(removed)
    assert sum(" " in name for name in removed) == 3


def test_a_part_of_a_name_is_named():
    assert unnamed_things(PaperWorld(), Case("hot dog")) == ["cat", "sun"]
    assert unnamed_things(PaperWorld(), Case("cat => sun")) == ["hot dog", "dog"]
    assert set(outside_words(PaperWorld(), Case("x"))) <= set(PaperWorld.things)


def test_questions_turn_through_phrases_and_styles():
    texts = asked("cat", "a cat", ("ink", "flat"), 6)
    assert len({text for text, _ in texts}) == 6
    assert [style for _, style in texts] == ["", "ink", "", "flat", "", "ink"]
    assert all("cat" in text and style in text for text, style in texts)


def test_noise_is_its_seeds():
    one, two = noises((2,), [1, 2]), noises((2,), [2, 1])
    assert torch.equal(one, two.flip(0))


def test_key_value_changes_by_hand():
    edit = LowRankEdit({"a": torch.tensor([[1.0], [0.0]])}, {"a": torch.tensor([[0.0], [0.5]])})
    matrices = {"a": torch.eye(2), "b": torch.eye(2)}
    rows = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert key_value_changes(matrices, edit, rows).tolist() == [0.25, 0.0]


def test_edits_together_are_their_sum():
    generator = torch.Generator().manual_seed(0)
    edits = [
        LowRankEdit.shared(
            torch.randn(3, rank, generator=generator),
            {name: torch.randn(4, rank, generator=generator) for name in names},
        )
        for rank, names in ((2, "ab"), (1, "b"))
    ]
    sum_ = together(edits)
    for name in "ab":
        parts = [e.factors[name] @ e.bases[name].T for e in edits if name in e.factors]
        assert torch.allclose(sum_.factors[name] @ sum_.bases[name].T, sum(parts), atol=1e-6)


def test_untouched_pictures_are_drawn_once(tmp_path):
    world = PaperWorld()
    first = Untouched(world, tmp_path)(["a cat", "the sun", "a cat"], [0, 1, 0])
    again = Untouched(world, tmp_path)(["the sun", "a cat"], [1, 0])
    assert world.drawn == 2
    assert [row[1] for row in first] == ["cat", "sun", "cat"]
    assert [row[1] for row in again] == ["sun", "cat"]
    assert np.array_equal(first[1][0], again[0][0])


def test_several_removals_are_judged_one_by_one():
    world = PaperWorld()
    edit = LowRankEdit({"m": torch.zeros(2, 1)}, {"m": torch.zeros(2, 1)})
    found = measure_ten(world, Case("cat\nsun"), edit, Untouched(world, None))
    assert found["gone"] == 1.0 and set(found["gone_each"]) == {"cat", "sun"}
    assert found["kept_harshest"] == 0.0 and set(found["harshest"]) == {"hot dog", "dog"}


class TestSampler:
    def sampler(self) -> tuple[Sampler, torch.Tensor]:
        weight = torch.ones(1, 1)

        def predict(x, number, prompts):
            return x * 0 + (prompts.mean((1, 2)) * weight).view(-1, 1, 1, 1)

        return Sampler({"w": weight}, [2.0, 1.0, 0.0], predict, torch.device("cpu")), weight

    def test_follows_the_guided_prediction(self):
        sampler, weight = self.sampler()
        noise, prompts = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 2.0]).view(2, 1, 1)
        way = sampler.way(noise, prompts, torch.zeros(1, 1))
        assert [x.flatten().tolist() for x in way] == [[0, 0], [-4, -8], [-8, -16]]
        edit = LowRankEdit({"w": torch.ones(1, 1)}, {"w": torch.ones(1, 1)})
        assert sampler.way(noise, prompts, torch.zeros(1, 1), edit)[-1].flatten().tolist() == [
            -16,
            -32,
        ]
        assert float(weight) == 1.0

    def test_guidance_is_the_difference(self):
        sampler, _ = self.sampler()
        prompts, null = torch.tensor([3.0]).view(1, 1, 1), torch.ones(1, 1)
        found = sampler.guidance(torch.zeros(1, 1, 1, 1, 1), [0], prompts, null, None)
        assert float(found) == 2.0


class PaddedDenoiser:
    """Words, an end (1) and padding (0), none in front."""

    def token_ids(self, prompts):
        rows = [[10 + len(word) for word in text.split()] for text in prompts]
        return [(row + [1] + [0] * 14)[:14] for row in rows]

    def encode(self, prompts, together=False):
        return [type("E", (), {"tokens": torch.arange(14.0)[:, None]}) for _ in prompts]


class TestPeers:
    def test_the_last_word_is_found_whatever_pads(self):
        padded = PeersDenoiser(PaddedDenoiser())
        assert float(last_subject_token(padded, "a hot dog")) == 2.0
        assert float(last_subject_token(padded, "cat")) == 0.0
        assert float(last_subject_token(padded, "")) == 0.0

    def test_clip_stays_as_it_is(self):
        toy = ToyDenoiser()
        texts = ["", "cat", "a photo of a cat"]
        assert PeersDenoiser(toy).token_ids(texts) == [list(ids) for ids in toy.token_ids(texts)]

    def test_they_are_told_what_ours_is(self):
        case = PhrasedCase.of(Case("hot dog"), PaddedDenoiser())
        assert case.concepts[0].text == "hot dog" and case.keep == ("",)
        for concept in case.concepts:
            assert "dog" not in concept.alternative
            assert len(concept.text.split()) == len(concept.alternative.split())
        case = PhrasedCase.of(Case("ant => top hat"), PaddedDenoiser())
        assert case.concepts[1].alternative == "a photo of a top hat"

    def test_each_has_settings_that_a_result_can_keep(self):
        for method in METHODS.values():
            assert json.loads(json.dumps(dict(method.settings)))
            assert bool(method.engine) == method.name.startswith("ours/")


def test_what_a_result_keeps_of_a_record():
    record = {
        "measures": {"unnamed_drift": 0.1, "unnamed_of": "guidance", "moved_held_out": None},
        "others": {"change": 0.2},
        "concepts": [{"keys_and_values_moved": 0.9}],
        "protection": 1.0,
        "training": "none",
        "warnings": ["one"],
    }
    found = noted(record)
    assert (found["others_change"], found["unnamed_drift"], found["warnings"]) == (0.2, 0.1, 1)
    assert found["moved"] is None


class TestWork:
    def test_every_job_has_a_key_of_its_own(self):
        jobs = run.all_jobs([*CASES], [*METHODS])
        assert len({digest(job.of) for job in jobs}) == len(jobs)
        assert len(jobs) == 2 * (28 * len(METHODS) + 3 * 3 + 2)
        assert jobs[0].of["engine"] and not re.search("engine", json.dumps(jobs[-1].case.text))

    def test_ours_come_first(self):
        names = [job.method.name for job in run.all_jobs([*CASES], [*METHODS])]
        assert all(name.startswith("ours/") for name in names[: 2 * 2 * 28])
        assert names[-1] == "rece"

    def test_cases_can_be_chosen(self):
        jobs = run.all_jobs(["icons"], ["ours/instant", "uce-phrased"], ["scissors"])
        assert [job.method.name for job in jobs] == ["ours/instant", "uce-phrased"]

    def test_shares_are_all_of_the_work(self):
        items = list(range(23))
        parts = [run.share(items, number, 4) for number in range(4)]
        assert sorted(sum(parts, [])) == items
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    def test_parts_are_merged_once(self, tmp_path):
        results, parts = tmp_path / "all.jsonl", [tmp_path / f"{n}.jsonl" for n in range(3)]
        Cache(results).add({"n": 0}, {"gone": 1})
        for part, number in zip(parts[:2], (0, 1), strict=True):
            Cache(part).add({"n": number}, {"gone": 1})
        with parts[1].open("a") as file:
            file.write('{"key": "half a li')
        assert run.merge(results, parts) == 2
        assert run.merge(results, parts) == 2
        assert [line["of"]["n"] for line in Cache(results)] == [0, 1]
        assert parts[1].read_text().endswith("half a li")  # somebody may still be writing it

    def test_what_is_there_is_not_measured_again(self, tmp_path, monkeypatch):
        def run_job(self, job):
            ran.append(job.case.text)
            if job.case.text == "b":
                raise RuntimeError
            return {"gone": 1.0}

        ran: list[str] = []
        monkeypatch.setattr(run.Bench, "run", run_job)
        jobs = [run.Job("icons", Case(text), INSTANT) for text in "abc"]
        run.work(jobs, tmp_path / "part.jsonl", until=2e9)
        run.work(jobs, tmp_path / "part.jsonl", until=2e9)
        run.work(jobs, tmp_path / "other.jsonl", until=0)
        assert ran == ["a", "b", "c", "b"]
        assert len(Cache(tmp_path / "part.jsonl")) == 2


def _line(case: str, method: str, gone: float, kept: float, **more) -> dict:
    kind = "style" if case.startswith("ink") else "object"
    of = {"world": "icons", "case": case, "kind": kind, "method": method}
    figures = {"gone": gone, "kept_harshest": kept, "kept_rest": 1.0, "kv_outside": 0.1}
    return {"of": of, **figures, "kv_null": 0.0, "forward_equivalents": 9, "replaced": None} | more


LINES = [
    _line("cat", "ours/balanced", 0.0, 0.0),
    _line(
        "cat",
        "ours/balanced",
        1.0,
        0.5,
        notes={"unnamed_drift": 0.2, "unnamed_of": "guidance", "guidance_60": 0.1},
    ),
    _line("ant => bee", "ours/balanced", 1.0, 1.0, replaced=0.5),
    _line("ink => flat", "ours/balanced", 0.5, 1.0),
    _line("cat", "uce-phrased", 1.0, 1.0),
    {**_line("ant => bee", "uce-phrased", 0, 0), "refused": "No."},
    _line("cat", "broken: rate 10", 1.0, 0.0, notes={"others_change": 0.1}),
    _line("cat\nsun", "ours/instant", 1.0, 0.9, gone_each={"cat": 1.0, "sun": 0.5}),
]


class TestReport:
    def test_means_over_erasures(self):
        found = report.summarise(LINES)["icons"]
        row = found["groups"]["all"]["ours/balanced"]
        assert row["runs"] == 3 and row["replaced"] == 0.5  # the first line gave way to the second
        assert (row["kept_worst"], row["worst_case"]) == (0.5, "cat")
        assert row["H"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
        assert found["groups"]["all"]["uce-phrased"]["refused"] == 1
        assert found["groups"]["styles"]["ours/balanced"]["runs"] == 1
        assert not any("broken" in method for method in found["groups"]["all"])

    def test_honesty(self):
        found = report.summarise(LINES)["icons"]["honesty"]
        assert found["guidance"]["ours/balanced"]["median"] == pytest.approx(2.0)
        assert found["guidance"]["ours/balanced"]["within"] == 0.0
        assert found["keys and values"]["broken: rate 10"]["within"] == 1.0

    def test_against_the_best_peer(self):
        found = report.summarise(LINES)["icons"]["against the best peer"]
        assert found == {"cat": {"ours": pytest.approx(2 / 3), "best": "uce-phrased", "peer": 1.0}}

    def test_text_has_every_table(self, tmp_path: Path):
        text = report.text_of(report.summarise(LINES))
        for title in ("The icons", "Removals", "Styles", "Ten removals together", "best peer"):
            assert title in text
        assert "'sun': 0.50 gone" in text
        rows = [line for line in text.splitlines() if line.startswith("| ours/balanced")]
        assert len({row.count("|") for row in rows}) == 1


def test_the_reports_verdict_is_the_judges_in_19_of_20_erasures_of_each_model():
    """Weak and ruined ones among them, as they are stored."""
    judged = [*agreement.stored(), *agreement.weak_and_ruined()]
    for world in CASES:
        own = [one for one in judged if one.world == world]
        assert len(own) >= 75 and sum(one.agrees for one in own) >= 0.95 * len(own)
        # None is called better than it is by more than one word, and no ruin goes unsaid.
        order = ["gone", "traces", "not gone"]
        assert not [one for one in own if one.seen[1] == "ruined" != one.said[1]]
        for said, seen in ((one.said[0], one.seen[0]) for one in own if one.said[0]):
            assert order.index(seen) - order.index(said) < 2
    words = {one.seen for one in judged}
    assert {("not gone", "kept"), ("traces", "kept"), ("gone", "kept"), ("gone", "harmed")} <= words
    assert "ruined" in {kept for _, kept in words}
    assert agreement.TABLE.read_text("utf-8") == agreement.table(judged)


def test_a_verdict_that_says_another_word_disagrees():
    said = agreement.Judged("emoji", "cat", ("gone", "kept"), ("traces", "kept"))
    assert not said.agrees and "says gone, kept; is traces, kept" in agreement.table([said])
    assert agreement.Judged("emoji", "cat", ("", "ruined"), ("gone", "ruined")).agrees
    assert not agreement.Judged("emoji", "cat", ("", "ruined"), ("gone", "harmed")).agrees


def test_less_room_keeps_more_exactly_on_both_models_and_costs_other_words():
    lines = [*Cache(exactness.LINES)]
    assert exactness.TABLE.read_text("utf-8") == exactness.table(lines)
    assert all(one["exact"] == one["called_exact"] and one["worst_exact"] <= 1e-5 for one in lines)
    for world in exactness.CASES:
        at = {
            room: [
                one for one in lines if one["of"]["world"] == world and one["of"]["room"] == room
            ]
            for room in (0.1, 0.25)
        }
        exact = {room: sum(one["exact"] for one in group) for room, group in at.items()}
        others = {room: sum(one["others"] for one in group) for room, group in at.items()}
        assert exact[0.1] >= 2 * exact[0.25] and others[0.1] > others[0.25]
