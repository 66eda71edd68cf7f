"""What stands between percent signs in a file name."""

from __future__ import annotations

import time

import pytest
from concept_surgery.nodes import names
from concept_surgery.nodes.names import filled, is_open

from tools import graphs

NOW = time.struct_time((2026, 3, 5, 7, 8, 9, 3, 64, 0))


@pytest.fixture(autouse=True)
def now(monkeypatch):
    monkeypatch.setattr(names.time, "localtime", lambda: NOW)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("no_ink", "no_ink"),
        ("%date%/cat", "2026-03-05/cat"),
        ("%date:yyyy-MM-dd%/cat", "2026-03-05/cat"),
        ("%date:yy/M/d%", "26/3/5"),
        ("a_%date:hhmmss%_b", "a_070809_b"),
        ("%year%-%month%-%day% %hour%%minute%%second%", "2026-03-05 070809"),
        ("100%_%year%", "100%_2026"),
        ("%unknown% %", "%unknown% %"),
        ("50% of %KSampler.seed%", "50% of %KSampler.seed%"),
    ],
)
def test_dates_stand_for_now_and_what_means_nothing_stays(typed, meant):
    assert filled(typed) == meant


def test_a_widget_of_another_node_is_named_by_kind_or_title():
    graph = graphs.loader("x.safetensors") | graphs.picture("after", "cat", seed=7)
    graph["after-sampler"]["_meta"] = {"title": "Draw it"}
    graph["after-positive"]["inputs"]["text"] = "../a/b"
    graph["odd"] = {"class_type": "Odd"}
    assert filled("s_%KSampler.seed%", graph) == filled("s_%Draw it.seed%", graph) == "s_7"
    assert filled("%CLIPTextEncode.text%", graph) == ".._a_b"
    for absent in ("%KSampler.model%", "%KSampler.nothing%", "%Odd.seed%", "%a.b.c%"):
        assert filled(absent, graph) == absent
        assert is_open(absent)
    assert not is_open("100% of %year%")


@pytest.mark.parametrize(
    ("concept", "name"),
    [
        ("cat", "no_cat"),
        ("cat, dog", "no_cat_ dog"),
        ("../../etc", "no_etc"),
        ("<script>", "no_script"),
        ("...", "no_concept"),
        ("猫", "no_猫"),
        ("x" * 500, "no_" + "x" * 60),
        ("%year%", "no_year"),
    ],
)
def test_what_is_erased_can_be_part_of_the_name(concept, name):
    assert filled("no_%concept%", None, concept) == name
    assert is_open(filled("no_%concept%"))
