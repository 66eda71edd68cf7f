"""The report for people: the verdict's words, what Markdown and programs get, and the chart."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from concept_surgery.erase_core import (
    Erasure,
    SettingsError,
    erase,
    preset_settings,
    report_markdown,
    report_numbers,
    report_text,
    verdict,
)
from concept_surgery.erase_core.artefact.chart import MARGIN, WIDTH, neighbour_chart
from concept_surgery.erase_core.artefact.markdown import escaped
from concept_surgery.erase_core.artefact.verdict import EXACT, GONE_FROM, grade, percent, way_gone
from concept_surgery.erase_core.method.subspace import KEEP_FLOOR, exact_set
from hypothesis import given
from hypothesis import strategies as st

from .toy import ToyDenoiser

OLD_FILES = sorted((Path(__file__).parent / "old_files").glob("*.safetensors"))
HOSTILE = (
    "<script>alert(1)</script>",
    "a | b",
    "`code` ```",
    "[x](javascript:alert(1))",
    "![p](http://elsewhere.example/p.png)",
    "<https://elsewhere.example>",
    "www.elsewhere.example me@elsewhere.example",
    "one\ntwo\r\n\n# three\n- four\u2028five",
    "**bold** _thin_ ~~gone~~ \\",
    "&lt;b&gt; &#60;",
    "1. first",
    "# title",
    "- item",
    "--- | ---",
    "> quoted",
    "$x^2$ {y}",
)


@pytest.fixture(scope="module")
def record() -> dict:
    """Of an erasure of the newest old file, with the figures of a usual one."""
    found = copy.deepcopy(dict(Erasure.load(OLD_FILES[-1]).record))
    concept = found["concepts"][0]
    found["concepts"] = [{**concept, "text": "cat", "alternative": "dog", "moved": 0.994}]
    found["measures"]["kept"] = [
        {"text": "tiger", "exact": True, "drift": 2e-7, "share_left": 0.5},
        {
            "text": "lemon",
            "exact": False,
            "drift": 0.003,
            "share_left": 0.12,
            "share_first": None,
            "share_without_negatives": 0.4,
        },
    ]
    found["measures"]["negative_prompts"] = [{"text": "blurry", "drift": 1e-7}]
    found["settings"] |= {"negative_prompts": ["blurry"], "keep": ["tiger", "lemon"]}
    near = [("kitten", 0.75), ("lynx", 0.12), ("tiger", 0.5), ("cat", 0.9), ("Kitten", 0.75)]
    words = [{"text": text, "drift": drift} for text, drift in near]
    found["others"] |= {"nearest": words, "most_changed": [], "words": []}
    return found


def changed(record, **values):
    """A copy with other figures: of the first concept, or of the record's own fields."""
    found = copy.deepcopy(record)
    for name, value in values.items():
        place = found["concepts"][0] if name in found["concepts"][0] else found
        place[name] = value
    return found


def test_the_verdict_is_a_sentence_for_each_thing_in_the_users_words(record):
    assert verdict(record) == [
        "cat is gone (99 %).",
        "Kept exactly: tiger.",
        "lemon shifts a little (0.3 %): your negative prompt takes its room, shorten it or leave "
        "it out.",
        "What else changes most: kitten 75 %, lynx 12 %.",
    ]
    assert report_text(record).startswith("Verdict: good. cat is gone (99 %). Kept exactly: tiger.")
    assert report_markdown(record).startswith("**cat is gone (99 %).**\n\nKept exactly: tiger.")


def test_the_verdict_has_no_jargon(record):
    words = " ".join(verdict(record) + verdict(changed(record, moved=None, taken_out=["x"])))
    for term in ("held-out", "forward", "keys and values", "guidance", "drift", "ridge", "sigma"):
        assert term not in words


@pytest.mark.parametrize(
    "moved, others, first, became",
    [
        (0.3, 0.1, "NOT GONE: cat is still drawn (it went 30 % of the way).", "not gone"),
        (-0.5, 0.1, "NOT GONE: cat is still drawn (it went 0 % of the way).", "not gone"),
        (math.nan, 0.1, "NOT GONE: cat is still drawn (it went no figure of the way).", "not gone"),
        (0.79, 0.1, "TRACES MAY REMAIN: cat is mostly gone (79 %).", "traces"),
        (0.95, 0.3, "WITH CARE. Much that nobody named changes, too.", "harm"),
        (0.3, 0.3, "NOT GONE: cat is still drawn (it went 30 % of the way).", "not gone"),
        (0.95, 0.7, "DON'T USE IT. The model is ruined for much that nobody named.", "ruin"),
        (0.95, math.nan, "DON'T USE IT. The model is ruined for much that nobody named.", "ruin"),
    ],
)
def test_bad_outcomes_look_bad_from_the_first_word(record, moved, others, first, became):
    record = changed(record, moved=moved)
    record["others"]["change"] = others
    lines = verdict(record)
    assert lines[0] == first and grade(record) == became
    assert report_text(record).startswith(f"Verdict: {first}")
    assert report_markdown(record).startswith(f"**⚠ {first.replace('_', '')}")
    chart = neighbour_chart(record)
    assert chart.lines[0].text == first and chart.lines[0].colour != chart.lines[2].colour


def test_of_a_ruined_model_nothing_is_said_to_be_gone(record):
    record["others"]["change"], before = 0.7, record["others"]["change"]
    assert not any("is gone (" in line for line in verdict(record))
    assert report_numbers(record)["concepts"][0]["outcome"] == "can't be told"
    record["others"]["change"] = before


def test_a_style_that_nothing_replaces_may_leave_traces(record):
    style = changed(record, text="ink", kind="style", alternative="")
    assert verdict(style)[0].startswith("TRACES MAY REMAIN: ink is mostly gone (99 %). A style")
    assert verdict(changed(style, alternative="flat"))[0] == "ink is gone (99 %)."
    assert verdict(changed(style, kind="object"))[0] == "ink is gone (99 %)."


def test_the_concept_of_which_most_is_left_comes_first(record):
    two = copy.deepcopy(record)
    two["concepts"].append(
        {**two["concepts"][0], "text": "owl", "moved": 0.4, "also": ["barn owl"]}
    )
    assert verdict(two)[:2] == [
        "NOT GONE: owl or barn owl is still drawn (it went 40 % of the way).",
        "cat is gone (99 %).",
    ]


def test_exact_is_said_only_of_what_was_measured_to_be(record):
    moved = copy.deepcopy(record)
    moved["measures"]["kept"][0]["drift"] = 2e-5
    lines = verdict(moved)
    assert not any("Kept exactly" in line for line in lines)
    assert any(line.startswith("tiger shifts a little (under 0.1 %): it was to") for line in lines)
    kept = report_numbers(moved)["kept"]
    assert [one["exact"] for one in kept] == [False, False] and kept[0]["reason"]
    assert "| tiger | nearly |" in report_markdown(moved)
    moved["measures"]["negative_prompts"][0]["drift"] = 0.01
    assert "**meant to be exact, and isn't** | 1 %" in report_markdown(moved)
    assert not report_numbers(moved)["negative_prompts"][0]["exact"]


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"share_without_negatives": 0.3}, "your negative prompt takes its room"),
        ({"share_without_negatives": 0.2, "share_first": 0.3}, "move it to the top"),
        (
            {"share_without_negatives": 0.2, "share_left": 0.129},
            "Room beside kept prompts' to 0.12",
        ),
        ({"share_without_negatives": 0.2, "share_left": 0.09}, "fewer words help a little"),
    ],
)
def test_why_a_prompt_isnt_exact_is_what_would_make_it_so(record, entry, words):
    one = copy.deepcopy(record)
    one["measures"]["kept"][1] |= entry
    assert words in verdict(one)[2]
    removed = changed(one, alternative="")
    assert ("name what is drawn instead" in verdict(removed)[2]) == (
        "_first" not in str(entry) and entry["share_without_negatives"] < 0.25
    )


def test_what_would_make_a_prompt_exact_was_tried_on_it():
    def rows(count, seed):
        return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))

    null, negative = rows(4, 1), rows(20, 2)
    keep = [("a", rows(20, 3)), ("b", rows(20, 4)), ("c", rows(45, 5))]
    edit, empty = rows(200, 6), torch.zeros(64, 0, dtype=torch.float64)
    a, b, c = exact_set([edit], [null, negative], keep).kept
    assert a.exact and a.share_first is a.share_without_negatives is None
    # What is promised is what happens: each is tried again in the way that was told.
    assert b.share_first == exact_set([edit], [null, negative], keep[1:2]).kept[0].share_left
    without = exact_set([edit], [null], keep[:2])
    assert b.share_without_negatives == without.kept[1].share_left >= KEEP_FLOOR
    assert without.kept[1].exact and not c.exact and c.share_without_negatives < KEEP_FLOOR
    alone = exact_set([edit], [null], [keep[2]]).kept[0]
    assert alone.share_without_negatives is alone.share_first is None
    many = [(str(n), rows(60, 10 + n)) for n in range(10)]
    told = [one.share_without_negatives for one in exact_set([edit], [null, negative], many).kept]
    assert None not in told[:8] and told[8:] == [None, None]
    assert exact_set([edit], [null], []).basis.shape[1] > empty.shape[1]


def test_a_run_says_what_would_make_its_prompts_exact():
    keep = tuple(" ".join(f"{letter}{n}" for letter in "pqrstuvw") for n in range(3))
    negatives = ("one two three four five six", "seven eight nine ten eleven twelve")
    values = {"concepts": "cat => dog", "keep": keep, "resolution": 32, "captions": 40}
    settings = preset_settings("instant", negative_prompts=negatives, **values)
    record = erase(settings, ToyDenoiser()).record
    last = record["measures"]["kept"][-1]
    assert not last["exact"] and last["share_without_negatives"] > KEEP_FLOOR > last["share_left"]
    assert any("your negative prompts take its room" in line for line in verdict(record))
    without = erase(preset_settings("instant", **values), ToyDenoiser()).record["measures"]["kept"]
    assert without[-1]["exact"]


def test_a_stopped_run_and_what_was_taken_out_are_said(record):
    stopped = changed(
        record, training="stopped", stopped_early=True, steps_done=12, converged=False
    )
    stopped["settings"]["steps"] = 48
    said = "Stopped after 12 of 48 steps: what was learned until then is kept."
    assert said in verdict(stopped) and said not in verdict(record)
    assert report_numbers(stopped)["training"]["stopped_early"]
    assert said not in verdict(changed(stopped, converged=True, training="trained"))
    assert "owl is drawn again." in verdict(changed(record, taken_out=["owl"]))
    assert "owl and bus are drawn again." in verdict(changed(record, taken_out=["owl", "bus"]))


def test_what_was_judged_by_words_alone_says_so(record):
    alone = changed(record, moved=None, keys_and_values_moved=0.93)
    alone["measures"] |= {"moved_held_out": None, "moved_sampled": None}
    assert verdict(alone)[0] == "cat is gone (93 %)."
    assert verdict(alone)[-1].startswith("No picture was sampled")
    assert report_numbers(alone)["concepts"][0]["moved_of"] == "keys and values"
    assert report_markdown(alone)


@pytest.mark.parametrize("path", OLD_FILES, ids=lambda path: path.stem)
def test_every_record_ever_written_has_a_whole_report(path):
    erasure = Erasure.load(path)
    for record in (erasure.record, erasure.without(["pizza"]).record):
        lines = verdict(record)
        assert any("cat is gone (" in line for line in lines)
        assert "Kept exactly: a tree." in lines
        assert "## What stays" in report_markdown(record, ["a note"])
        json.dumps(report_numbers(record), allow_nan=False)
        chart = neighbour_chart(record)
        assert any(line.text == "cat" for line in chart.lines)
    assert "pizza is drawn again." in lines


def test_older_versions_that_changed_much_are_graded_by_what_they_measured():
    old = Erasure.load(OLD_FILES[0]).record
    assert old.get("others") is None and old["measures"]["unnamed_drift"] > 0.4
    assert verdict(old)[0].startswith("WITH CARE")


def test_numbers_are_json_with_a_schema(record):
    spoilt = copy.deepcopy(record)
    spoilt["measures"]["null_drift"] = math.nan
    spoilt["others"]["nearest"][0]["drift"] = math.inf
    numbers = json.loads(json.dumps(report_numbers(spoilt), allow_nan=False))
    assert numbers["schema"] == 1 and numbers["grade"] == "good"
    assert numbers["empty_prompt"] == {"exact": False, "drift": None}
    assert numbers["others"]["words"][0] == {"text": "kitten", "change": None}
    assert numbers["kept"][0] == {"text": "tiger", "exact": True, "drift": 2e-7}
    assert numbers["concepts"][0]["names"] == ["cat"]


def hostile_record(record, text):
    found = copy.deepcopy(record)
    found["concepts"][0] |= {"text": text, "alternative": text, "also": [text]}
    found["base"]["name"] = found["created"] = found["family"] = text
    found["taken_out"] = found["warnings"] = [text]
    found["ended_by"], found["converged"] = text, False
    entry = {"text": text, "drift": 0.5, "exact": False}
    found["measures"] |= {"negative_prompts": [entry], "kept": [entry], "unnamed": [entry]}
    for name in ("nearest", "most_changed", "words"):
        found["others"][name] = [{"text": f"{text}{name}", "drift": 0.5}]
    return found


def parsed(text: str) -> list:
    """The parts that Markdown finds in a text, by another reader than the host's."""
    reader = pytest.importorskip("markdown_it")
    return reader.MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(text)


def tags_of(text: str) -> dict[str, int]:
    """How many there are of each element and attribute that Markdown makes of a text."""
    found: dict[str, int] = {}
    for block in parsed(text):
        for token in (block, *(block.children or ())):
            if token.type not in ("text", "inline", "text_special", "softbreak"):
                found[token.type] = found.get(token.type, 0) + 1
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_of_a_hostile_text_takes_effect(record, text):
    markdown = report_markdown(hostile_record(record, text), [text])
    harmless = report_markdown(hostile_record(record, "word"), ["word"])
    assert tags_of(markdown) == tags_of(harmless)
    assert "<" not in markdown and not re.search(r"(?<!\\)(://|www\.|\]\()", markdown)
    for line in verdict(hostile_record(record, text)):
        assert len(line.splitlines()) == 1


@given(st.text())
def test_any_text_is_one_paragraph_of_text_in_markdown(text):
    found = parsed(f"{escaped(text)} is gone.")
    assert [token.type for token in found] == ["paragraph_open", "inline", "paragraph_close"]
    kinds = {token.type for token in found[1].children}
    assert kinds <= {"text", "text_special", "softbreak"}


def test_what_cannot_be_printed_or_turns_the_direction_is_replaced(record):
    for bad in ("\u202e", "\x1b[2J", "\x00", "\ud800", "\u2066"):
        found = hostile_record(record, f"a {bad} b")
        for text in (" ".join(verdict(found)), report_markdown(found)):
            assert bad not in text
            text.encode("utf-8")


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0 %"),
        (1e-6, "under 0.1 %"),
        (0.003, "0.3 %"),
        (0.02, "2 %"),
        (0.0996, "10 %"),
        (0.75, "75 %"),
        (3.2, "320 %"),
        (math.nan, "no figure"),
        (math.inf, "no figure"),
    ],
)
def test_shares_are_written_as_people_do(value, text):
    assert percent(value) == text


def test_nothing_is_called_whole_that_is_not():
    assert way_gone(0.9999) == "99 %" and way_gone(1.2) == "100 %" and way_gone(-1) == "0 %"
    assert way_gone(GONE_FROM) == "80 %"


def test_the_chart_stays_within_its_picture(record):
    spoilt = hostile_record(record, "x" * 500)
    spoilt["concepts"] *= 9
    spoilt["measures"]["kept"] *= 9
    spoilt["others"]["nearest"] = [
        {"text": f"w{n}", "drift": drift}
        for n, drift in enumerate([math.nan, math.inf, 5.0, -1.0, 0.0, 1e-9] * 4)
    ]
    for one in (record, spoilt):
        chart = neighbour_chart(one)
        for box in chart.boxes:
            assert MARGIN <= box.left <= box.right <= WIDTH - MARGIN
            assert 0 < box.top < box.bottom < chart.height
        for line in chart.lines:
            assert 0 <= line.left and line.left + line.width <= WIDTH
            assert line.top + line.size < chart.height
        assert chart.height < 2 * WIDTH
    figures = {line.text for line in neighbour_chart(record).lines}
    assert {"99 %", "exact", "0.3 %", "75 %", "12 %"} <= figures


def test_a_bar_is_as_long_as_its_share(record):
    boxes = {box.top: box for box in neighbour_chart(record).boxes}  # the bar is behind its groove
    lines = neighbour_chart(record).lines
    lengths = {
        line.text: boxes[line.top].right - boxes[line.top].left
        for line in lines
        if line.left == MARGIN and line.top in boxes
    }
    assert lengths["kitten"] / lengths["cat"] == pytest.approx(0.75 / 0.994, rel=0.01)
    assert lengths["lynx"] / lengths["kitten"] == pytest.approx(0.12 / 0.75, rel=0.05)


def test_less_room_beside_the_concept_keeps_more_exactly_and_warns():
    keep = tuple(" ".join(f"{letter}{n}" for letter in "pqrstuvw") for n in range(6))
    values = {"concepts": "cat => dog", "keep": keep, "resolution": 32, "captions": 40}
    usual, tight = (
        erase(preset_settings("instant", keep_room=room, **values), ToyDenoiser()).record
        for room in (None, 0.1)
    )
    count = [sum(one["exact"] for one in r["measures"]["kept"]) for r in (usual, tight)]
    assert count[1] > count[0] > 0
    assert all(one["drift"] <= EXACT for one in tight["measures"]["kept"] if one["exact"])
    assert usual["warnings"] == [] and "raise the room beside kept prompts (it is 0.1)" in (
        " ".join(tight["warnings"])
    )
    # What a report advises, where nothing cheaper helps, is enough.
    entry = next(one for one in usual["measures"]["kept"] if not one["exact"])
    entry |= {"share_first": None, "share_without_negatives": None}
    (line,) = (line for line in verdict(usual) if "Room beside kept prompts" in line)
    room = float(re.search(r"to (0\.\d+) to keep", line)[1])
    settings = preset_settings("instant", keep_room=room, **values)
    kept = erase(settings, ToyDenoiser()).record["measures"]["kept"]
    assert sum(one["exact"] for one in kept) > count[0]


def test_the_usual_room_is_no_setting_to_stored_results():
    usual = preset_settings("instant", concepts="cat")
    assert "keep_room" not in usual.as_dict()
    tight = preset_settings("instant", concepts="cat", keep_room=0.1)
    assert tight.as_dict()["keep_room"] == 0.1
    with pytest.raises(SettingsError, match="0.25 is usual"):
        preset_settings("instant", concepts="cat", keep_room=0.0)
