"""What nodes and inputs are called in each language, and what they are found by."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from concept_surgery.nodes.extension import ConceptSurgeryExtension
from concept_surgery.nodes.words import SEARCH_WORDS

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh", "ja")
# Front end 1.32 takes these for placeholders, plurals and links.
SPECIAL = re.compile(r"[{}|@]")
OTHER_LETTERS = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff\u4e00-\u9fff]"}
SAME_EVERYWHERE = {"CLIP", "VAE", "CFG"}


def schemas() -> dict[str, dict]:
    """Every node as a language file is to have it, in English."""
    nodes = {}
    for node in asyncio.run(ConceptSurgeryExtension().get_node_list()):
        schema = node.define_schema()
        nodes[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {one.id: named(one.display_name, one.tooltip) for one in schema.inputs},
            "outputs": {
                str(number): named(one.display_name, None)  # what it holds is on the help page
                for number, one in enumerate(schema.outputs)
            },
        }
    return nodes


def named(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def read(language: str) -> dict[str, dict]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))


def texts(node: dict) -> list[str]:
    slots = [*node["inputs"].values(), *node["outputs"].values()]
    return [node["display_name"], node["description"], *(t for one in slots for t in one.values())]


def shape(value):
    return {key: shape(one) for key, one in value.items()} if isinstance(value, dict) else ""


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_and_input_has_an_entry_and_none_is_stale(language):
    assert shape(read(language)) == shape(schemas())
    for node in read(language).values():
        assert all(text.strip() == text and text for text in texts(node))
        assert not [text for text in texts(node) if SPECIAL.search(text)]


def test_english_says_what_the_nodes_say():
    assert read("en") == schemas()


@pytest.mark.parametrize("language", OTHER_LETTERS)
def test_the_others_are_translated(language):
    said = [text for node in read(language).values() for text in texts(node)]
    letters = OTHER_LETTERS[language]
    assert {text for text in said if not re.search(letters, text)} <= SAME_EVERYWHERE
    english = read("en")
    for name, node in read(language).items():
        # A choice or a number that one of them names, the other names, too.
        for slot, one in node["inputs"].items():
            given = english[name]["inputs"][slot].get("tooltip", "")
            choices = re.findall(r"\b(\w+(?: \w+)?): ", given)
            known = [c for c in choices if c in ("merge", "exact", "hard", "soft", "auto")]
            assert all(choice in one["tooltip"] for choice in known), (name, slot)


def test_the_host_hands_them_out(server):
    given = server.get("/i18n")
    for language in LANGUAGES:
        nodes = given[language]["nodeDefs"]
        assert {name: nodes[name] for name in read(language)} == read(language)


def test_every_input_has_a_label_and_every_node_search_words(server):
    for name, schema in schemas().items():
        info = server.object_info(name)
        for group in ("required", "optional"):
            for slot, spec in info["input"].get(group, {}).items():
                assert spec[1]["display_name"] == schema["inputs"][slot]["name"]
        assert len(SEARCH_WORDS[name]) >= 2
    wanted = "erase remove forget delete unlearn censor LECO ESD UCE".split()
    assert set(wanted) <= set(SEARCH_WORDS["ConceptSurgeryTrain"])


def test_the_front_end_has_the_same_search_words():
    script = (ROOT / "web" / "search.js").read_text("utf-8")
    table = script[script.index("= {") + 2 : script.index("};") + 1]
    table = re.sub(r"^  (\w+):", r'"\1":', table, flags=re.MULTILINE)
    found = json.loads(re.sub(r",(\s*[\]}])", r"\1", table))
    assert {name: tuple(words) for name, words in found.items()} == SEARCH_WORDS
