"""The sheet that compares without and with an erasure: prompts, strengths, places, labels."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from concept_surgery.erase_core import SettingsError, erase, preset_settings
from concept_surgery.erase_core.artefact.sheet import (
    EMPTY,
    ERASED,
    KEPT,
    LONGEST_SIDE,
    MOST_PROMPTS,
    UNNAMED,
    Layout,
    columns_of,
    drawing_of,
    fitted,
    kind_of,
    one_line,
    rows_of,
    strengths_of,
    wrapped,
)

from .toy import ToyDenoiser

SMALL = {"resolution": 32, "captions": 40, "sampling_steps": 4}
HOW = {"negative": "", "seed": 0, "sampler_name": "euler", "scheduler": "normal"}
HOW |= {"steps": 20, "cfg": 0.0, "width": 0, "height": 0}


def drifts(*texts: str) -> list[dict]:
    return [{"text": text, "drift": 0.1, "exact": True} for text in texts]


def record(concepts=("cat",), kept=(), kind="object", **more) -> dict:
    """Of a record what a sheet reads."""
    return {
        "settings": {"kind": kind, "resolution": 512, "guidance_scale": 5.0, "templates": []},
        "concepts": [{"text": text, "alternative": "", "kind": ""} for text in concepts],
        "measures": {
            "kept": drifts(*kept),
            "negative_prompts": drifts("blurry"),
            "unnamed": drifts("a photo of a spoon", "a ship at sea"),
        },
        "others": {
            "nearest": drifts("kitten", "lynx", "puma"),
            "most_changed": drifts("whisker", "kitten", "paw"),
        },
        **more,
    }


def shown(rows) -> list[tuple[str, str]]:
    return [(row.kind, row.text) for row in rows]


def test_left_alone_a_sheet_shows_what_went_what_stayed_and_what_may_suffer():
    given = record(["cat", "owl", "umbrella", "Eiffel Tower", "fifth"], ["a", "b", "c", "d"])
    assert shown(rows_of("", given)) == [
        (ERASED, "a photo of a cat"),
        (ERASED, "a photo of an owl"),
        (ERASED, "a photo of an umbrella"),
        (ERASED, "a photo of Eiffel Tower"),
        (KEPT, "a"),
        (KEPT, "b"),
        (KEPT, "c"),
        (UNNAMED, "a photo of a kitten"),
        (UNNAMED, "a photo of a whisker"),
        (UNNAMED, "a photo of a lynx"),
        (EMPTY, ""),
    ]
    assert rows_of("# a comment\n \n", given) == rows_of(None, given) == rows_of("", given)


@pytest.mark.parametrize(
    "kind, concept, erased, unnamed",
    [
        ("style", "Van Gogh style", "a painting in Van Gogh style", "kitten"),
        ("person", "Ada Lovelace", "a photo of Ada Lovelace", "kitten"),
        ("tags", "cat_ears", "cat_ears", "kitten"),
        ("of another version", "cat", "a photo of a cat", "kitten"),
    ],
)
def test_a_concept_is_tried_in_the_plain_phrase_of_its_kind(kind, concept, erased, unnamed):
    rows = rows_of("", record([concept], kind=kind))
    assert [rows[0].text, rows[1].text] == [erased, unnamed]


def test_a_concepts_own_kind_and_own_phrases_come_first():
    given = record(["Monet", "cat"])
    given["concepts"][0]["kind"] = "style"
    assert [row.text for row in rows_of("", given)][:2] == [
        "a painting in Monet style",
        "a photo of a cat",
    ]
    given["settings"]["templates"] = ["an icon of {a} => an icon", "{}"]
    assert [row.text for row in rows_of("", given)][:3] == [
        "an icon of Monet",
        "an icon of a cat",
        "an icon of a kitten",
    ]


def test_nothing_stands_on_a_sheet_twice_and_old_records_do():
    given = record(["cat"], ["A photo of  a cat", "a boat", "a boat", "a photo of a kitten"])
    assert shown(rows_of("", given)) == [
        (ERASED, "a photo of a cat"),
        (KEPT, "a boat"),
        (KEPT, "a photo of a kitten"),
        (UNNAMED, "a photo of a whisker"),
        (UNNAMED, "a photo of a lynx"),
        (UNNAMED, "a photo of a puma"),
        (EMPTY, ""),
    ]
    old = record(others=None)
    assert [row.text for row in rows_of("", old)][1:3] == ["a photo of a spoon", "a ship at sea"]


@pytest.mark.parametrize("text", ["", " \t", "\n", "x" * 5001])
def test_a_file_may_hold_anything_as_text(text):
    given = record([text, "cat\nup"], [text], others={"nearest": drifts(text), "most_changed": []})
    assert [row.text for row in rows_of("", given)] == ["a photo of a cat up", ""]
    assert kind_of("a tree", given) == UNNAMED
    assert [row.kind for row in rows_of("", record([text], others=None))][-1] == EMPTY


def test_a_record_of_a_run_has_what_a_sheet_reads():
    values = {"concepts": "cat => dog\npizza", "keep": "a tree", **SMALL}
    made = erase(preset_settings("instant", **values), ToyDenoiser())
    rows = rows_of("", made.record)
    assert [row.kind for row in rows].count(UNNAMED) == 3
    assert shown(rows)[:3] == [
        (ERASED, "a photo of a cat"),
        (ERASED, "a photo of a pizza"),
        (KEPT, "a tree"),
    ]
    assert drawing_of(made.record, **HOW).width == 32


def test_typed_prompts_are_told_apart():
    given = record(["(a cat:1.2)", "Van Gogh"], ["a hot cat"])
    given["concepts"][1]["kind"] = "style"
    typed = (
        'two Cats, rain\na hot  CAT\na concatenation\n""\nblurry\n# no\na van gogh sky\n\na tree'
    )
    assert shown(rows_of(typed, given)) == [
        (ERASED, "two Cats, rain"),
        (KEPT, "a hot  CAT"),
        (UNNAMED, "a concatenation"),
        (EMPTY, ""),
        (KEPT, "blurry"),
        (ERASED, "a van gogh sky"),
        (UNNAMED, "a tree"),
    ]


@pytest.mark.parametrize(
    "given, words",
    [
        ("\n".join(f"a {n}" for n in range(MOST_PROMPTS + 1)), f"not {MOST_PROMPTS + 1}"),
        ("a \ud83d cat", "half of a character"),
        ("x" * 5001, "5,001 characters"),
        (5, "must be text, not 5"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused_in_words(given, words):
    with pytest.raises(SettingsError, match=words) as refused:
        rows_of(given, record())
    assert refused.value.setting == "prompts"


@pytest.mark.parametrize(
    "given, strengths",
    [
        ("0, 0.5, 1", (0, 0.5, 1)),
        ("1;0.5\n.5  0", (1, 0.5, 0)),
        ("-5,\N{MINUS SIGN}1, +1., 5e0", (-5, -1, 1, 5)),
        ("-0", (0,)),
        (",1,,", (1,)),
        ("1, 1.0, 1, 1, 1, 1, 1, 2", (1, 2)),
    ],
)
def test_strengths_are_read(given, strengths):
    found = strengths_of(given)
    assert found == strengths and math.copysign(1, found[0]) == (-1 if strengths[0] < 0 else 1)


@pytest.mark.parametrize(
    "given, words",
    [
        ("abc", "'abc' is no strength"),
        ("nan", "'nan' is no strength"),
        ("inf", "'inf' is no strength"),
        ("0, 1e9", "'1e9' is no strength.*between -5 and 5"),
        ("0, 5.01", "'5.01' is no strength"),
        ("1_0", "'1_0' is no strength"),
        ("\N{ARABIC-INDIC DIGIT ONE}", "is no strength"),
        ("x" * 5000, "'x{40}' is no strength"),
        ("", "strengths is empty"),
        (" ,; ", "strengths is empty"),
        ("1,2,3,4,5,0,-1", "At most 6 strengths.*not 7"),
        ("\ud800", "half of a character"),
        (None, "must be text, not None"),
        (0.5, "must be text, not 0.5"),
    ],
)
def test_strengths_that_cannot_be_drawn_are_refused_in_words(given, words):
    with pytest.raises(SettingsError, match=words) as refused:
        strengths_of(given)
    assert refused.value.setting == "strengths" and len(str(refused.value)) < 200


def test_the_untouched_model_is_always_on_the_sheet():
    assert columns_of((1.0, 0.0)) == (1.0, 0.0)
    assert columns_of((0.5, 1.0)) == (0.0, 0.5, 1.0)


def test_zero_leaves_size_and_guidance_to_the_record():
    found = drawing_of(record(), **HOW)
    assert (found.width, found.height, found.cfg) == (512, 512, 5.0)
    found = drawing_of(record(), **{**HOW, "height": 768, "cfg": 1.5})
    assert (found.width, found.height, found.cfg) == (512, 768, 1.5)
    assert str(found) == "seed 0, 20 steps, cfg 1.5, euler normal, 512 x 768"


@pytest.mark.parametrize(
    "name, value",
    [("width", 10**9), ("height", 8), ("steps", 0), ("cfg", 1e9), ("cfg", math.nan), ("cfg", -1)],
)
def test_what_a_link_brings_or_a_file_holds_is_checked(name, value):
    with pytest.raises(SettingsError, match=name) as refused:
        drawing_of(record(), **{**HOW, name: value})
    assert refused.value.setting == name
    held = copy.deepcopy(record())
    held["settings"] |= {"resolution": -64, "guidance_scale": math.inf}
    with pytest.raises(SettingsError, match="type a number here"):
        drawing_of(held, **HOW)


@pytest.mark.parametrize("width, height", [(64, 64), (512, 512), (512, 288), (16, 16), (8, 512)])
def test_pictures_stand_side_by_side_with_even_margins(width, height):
    layout = Layout(3, 2, width, height)
    across, down = layout.size
    taken = torch.zeros(down, across, dtype=torch.int)
    for row in range(3):
        for column in range(2):
            left, top = layout.cell(row, column)
            taken[top : top + height, left : left + width] += 1
    assert int(taken.sum()) == 6 * width * height and int(taken.max()) == 1
    columns, rows = taken.any(0).nonzero().flatten(), taken.any(1).nonzero().flatten()
    assert int(columns[0]) == 2 * layout.margin + layout.label_width
    assert across - layout.pitch[0] * 2 + layout.gap - int(columns[0]) == layout.margin
    # Two lines of header above, the line of how it was drawn below, a margin around both.
    assert int(rows[0]) == layout.margin + 2 * layout.line + layout.gap
    assert down - layout.pitch[1] * 3 - int(rows[0]) == layout.line + layout.margin
    # A kind and a line of its prompt are beside each picture, however small.
    assert layout.pitch[1] >= 2 * layout.line and layout.text >= 12


def test_pictures_come_to_their_places_and_the_rest_stays():
    pictures = [[torch.full((20, 30, 3), 0.1 * (2 * row + column)) for column in range(2)]
                for row in range(3)]  # fmt: skip
    layout = Layout.of(pictures)
    assert (layout.rows, layout.columns, layout.width, layout.height) == (3, 2, 30, 20)
    background = torch.full((layout.size[1], layout.size[0], 3), 0.9)
    sheet = layout.filled(background, pictures)
    for row in range(3):
        for column in range(2):
            left, top = layout.cell(row, column)
            assert torch.equal(sheet[top : top + 20, left : left + 30], pictures[row][column])
    assert int((sheet != 0.9).sum()) == 6 * 20 * 30 * 3 and bool((background == 0.9).all())


def test_only_large_pictures_are_made_smaller():
    small = torch.rand(64, LONGEST_SIDE, 3)
    assert fitted(small) is small
    large = torch.cat([torch.zeros(1024, 1024, 3), torch.ones(1024, 1024, 3)], 1)
    less = fitted(large)
    assert less.shape == (LONGEST_SIDE // 2, LONGEST_SIDE, 3)
    assert float(less[:, : LONGEST_SIDE // 2].max()) == 0 and float(less[:, -1].min()) == 1


def test_labels_are_one_line_of_what_can_be_printed():
    assert one_line("a\n cat\t\x00\x1b[0m 🐱") == "a cat \ufffd\ufffd[0m 🐱"
    assert one_line("\u202ecat \ud83d") == "\ufffdcat \ufffd"
    assert len(one_line("x " * 5000)) <= 401 and one_line("x" * 5000).endswith("…")
    assert one_line("") == ""


@pytest.mark.parametrize(
    "text", ["a cat in the rain at night", "x" * 50, "a " + "y" * 30, " a  b "]
)
@pytest.mark.parametrize("width", [1, 5, 11, 200])
def test_labels_are_wrapped_at_words_and_cut_with_a_mark(text, width):
    whole = wrapped(text, width, 100, len)
    assert all(0 < len(line) <= width for line in whole)
    assert "".join("".join(whole).split()) == "".join(text.split())
    for most in range(1, len(whole)):
        some = wrapped(text, width, most, len)
        assert len(some) == most and some[:-1] == whole[: most - 1] and some[-1].endswith("…")
    assert wrapped(text, width, len(whole), len) == whole


def test_words_stay_whole_where_they_fit():
    assert wrapped("a cat in the rain", 8, 5, len) == ["a cat in", "the rain"]
    assert wrapped("a cat in the rain", 8, 1, len) == ["a cat i…"]
    assert wrapped("", 8, 1, len) == []


def test_a_prompt_with_another_name_of_a_concept_is_erased_too():
    record = {
        "concepts": [{"text": "car", "also": ["automobile"]}],
        "settings": {"kind": "object"},
        "measures": {"kept": [], "negative_prompts": []},
    }
    kinds = [kind_of(text, record) for text in ("an automobile", "two cars", "a bus")]
    assert kinds == [ERASED, ERASED, UNNAMED]
