"""Suggest Names over the real HTTP API."""

from __future__ import annotations

import os
import time

import pytest
from concept_surgery.erase_core.settings.texts import parse_concepts

from tools import graphs
from tools.host import GraphRejected

from .test_front_end import APART, TAG

# CLIP-L reads ninety words in some seventeen seconds of one core.
LONG = pytest.mark.skipif(not os.environ.get("HOST_CRASHES"), reason="set HOST_CRASHES=1")


def asked(erase: str) -> graphs.Graph:
    graph = graphs.loader("one-level.safetensors")
    graph |= graphs.node(
        "s", "ConceptSurgerySuggest", clip=("loader", 1), erase=erase, kind="object"
    )
    return graph | graphs.show("names", ("s", 0)) | graphs.show("neighbours", ("s", 1))


@pytest.mark.parametrize("erase", ["", "\n"])
def test_what_cannot_be_read_is_refused_at_its_input(server, erase):
    with pytest.raises(GraphRejected) as refused:
        server.queue(asked(erase))
    (problem,) = refused.value.node_errors["s"]["errors"]
    assert problem["extra_info"]["input_name"] == "erase"


@LONG
def test_the_lines_come_back_with_names_and_what_was_read_is_read_once(server):
    """The encoder's weights are random: what is near means nothing, but it must be the same."""
    said, took, texts = [], [], []

    def note(event):
        if event["type"] == "progress_text":
            texts.append(event["data"]["text"])

    for _ in range(2):
        server.free()
        began = time.monotonic()
        outputs = server.run(asked(f"cat => dog\nowl {TAG}"), on_progress=note)["outputs"]
        took.append(time.monotonic() - began)
        said.append([outputs[name]["text"][0] for name in ("names", "neighbours")])
    assert said[0] == said[1] and took[1] < 0.5 * took[0], took
    names, neighbours = (text.replace(APART, "") for text in said[0])
    first, second = parse_concepts(names)
    assert (first.text, first.alternative, second.text) == ("cat", "dog", f"owl {TAG}")
    near = neighbours.splitlines()
    assert near and not {"cat", "owl"} & set(near)
    read = [text for text in texts if text.startswith("Reading words, 0 of")]
    assert len(read) == 2  # of the first time alone, one for each concept
