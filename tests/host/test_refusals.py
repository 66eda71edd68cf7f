"""What can't work is refused before anything runs, once, at its own input, and seen."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from concept_surgery.erase_core import SettingsError
from concept_surgery.nodes.messages import upstream_file
from concept_surgery.nodes.refusals import install, refusal, told_once
from concept_surgery.nodes.take_out import TakeConceptsOut
from concept_surgery.nodes.train import TrainErasure, settings_from_widgets

from tools import graphs
from tools.host import ComfyHost, GraphRejected

CHECKPOINT = "one-level.safetensors"


def errors_of(server: ComfyHost, **values) -> list[dict]:
    """What the host answers about a Train node with such values."""
    graph = graphs.loader(CHECKPOINT) | graphs.train(**{"erase": "cat => dog", **values})
    graph |= graphs.node("shown", "PreviewAny", source=("train", 2))
    with pytest.raises(GraphRejected) as rejected:
        server.queue(graph)
    return rejected.value.node_errors["train"]["errors"]


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("erase", "cat => dog => owl", "can't be read"),
        ("erase", None, "Nothing to erase"),
        ("replace_with", "dog\nowl", "has 2 lines"),
        ("keep", "a photo of a cat", "also a prompt for the concept 'cat'"),
        ("negative_prompts", "Cat", "also a prompt for the concept 'cat'"),
        ("kind", "artist", "Unknown kind 'artist'"),
        ("preset", "quick", "Unknown preset 'quick'"),
        ("model_type", "distiled", "Unknown model type 'distiled'"),
        ("templates", "a photo", "has no {}"),
        ("form", "firm", "Unknown form"),
        ("layers", "all", "Unknown layers"),
        ("null_score", "lost", "Unknown null score"),
        ("trajectories", 1, "at least 2 trajectories"),
        ("resolution", 100, "multiple of 8"),
        ("stored_result", "never", "Unknown stored result"),
        ("steps", 99_999, "99999"),
        ("rank", 999, "999"),
        ("training_seed", -1, "-1"),
    ],
)
def test_a_wrong_value_is_told_once_at_its_input(server, name, value, words):
    (error,) = errors_of(server, **{name: value})
    assert error["extra_info"]["input_name"] == name
    assert words in error["message"] + error["details"]


def test_an_unknown_mode_is_refused_before_the_training(server):
    graph = graphs.loader(CHECKPOINT) | graphs.train(erase="cat") | graphs.apply(mode="exacter")
    graph |= graphs.picture("shot", "a cat", model=("apply", 0))
    with pytest.raises(GraphRejected) as rejected:
        server.queue(graph)
    (error,) = rejected.value.node_errors["apply"]["errors"]
    assert error["extra_info"]["input_name"] == "mode" and "exacter" in error["details"]


@pytest.mark.parametrize("name, value", [("filename", "../out"), ("names", "peft")])
def test_what_save_cannot_do_is_refused_before_the_training(server, name, value):
    graph = graphs.loader(CHECKPOINT) | graphs.train(erase="cat") | graphs.save()
    graph["save"]["inputs"] |= {"names": "kohya", name: value}
    with pytest.raises(GraphRejected) as rejected:
        server.queue(graph)
    (error,) = rejected.value.node_errors["save"]["errors"]
    assert error["extra_info"]["input_name"] == name and value in error["details"]


def test_two_wrong_nodes_are_both_told_once(server):
    graph = graphs.loader(CHECKPOINT) | graphs.train("one", erase="", keep="a tree")
    graph |= graphs.train("two", erase="cat", keep="cat")
    for name in ("one", "two"):
        graph |= graphs.node(f"shown-{name}", "PreviewAny", source=(name, 2))
    with pytest.raises(GraphRejected) as rejected:
        server.queue(graph)
    found = {
        name: [error["extra_info"]["input_name"] for error in node["errors"]]
        for name, node in rejected.value.node_errors.items()
        if node["errors"]
    }
    assert found == {"one": ["erase"], "two": ["keep"]}


def texts_under(server: ComfyHost, name: str, graph: graphs.Graph) -> list[str]:
    """What a node shows while a graph runs to its end."""
    texts = []

    def note(event):
        if event["type"] == "progress_text" and event["data"]["node"] == name:
            texts.append(event["data"]["text"])

    server.wait(server.queue(graph), 60, note)
    return texts


WRONG_KEEP = graphs.train("wrong", erase="cat", keep="close-up of a cat, soft light")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (WRONG_KEEP, "'close-up of a cat, soft light' stands under keep"),
        (graphs.save("wrong", filename="NUL"), "is a device on Windows"),
        (graphs.take_out("wrong", concepts="# none"), "No concept is named"),
    ],
)
def test_an_error_is_seen_where_another_branch_runs(server, wrong, words):
    """The front end shows no dialog then; the node itself says it."""
    graph = graphs.loader(CHECKPOINT) | graphs.train(erase="cat") | wrong
    if wrong["wrong"]["class_type"] != "ConceptSurgerySave":
        graph |= graphs.node("shown", "PreviewAny", source=("wrong", 1))
    graph |= graphs.node("other", "PreviewAny", source="runs")
    (text,) = texts_under(server, "wrong", graph)
    assert words in text


def test_what_comes_after_a_refusal_takes_its_place(server, finished):
    finished.save(server.models("loras") / "refused-before.safetensors")
    graph = graphs.load(filename="refused-before.safetensors")
    graph |= graphs.save("kept", filename="kept after all", erasure=("load", 0))
    before, after = texts_under(server, "kept", graph)
    assert before.startswith("Will be saved as kept after all.safetensors in ")
    assert after.startswith("Saved kept after all.safetensors in ")


def test_a_concept_that_a_link_brings_is_checked_when_it_comes():
    assert TrainErasure.validate_inputs(keep="cat", preset="instant") is True
    with pytest.raises(SettingsError, match="must be text, not 5"):
        settings_from_widgets({"erase": 5})
    with pytest.raises(SettingsError, match="Nothing to erase"):
        settings_from_widgets({"erase": None})
    assert "Unknown stored result" in TrainErasure.validate_inputs(stored_result="ever")
    assert "No concept is named" in TakeConceptsOut.validate_inputs("None")


def test_the_name_of_a_model_is_one_that_files_can_hold():
    graph = graphs.loader("a\udc00.safetensors") | graphs.train(erase="cat")
    assert upstream_file(graph, "train", "model") == "a\ufffd.safetensors"


def test_answers_about_other_things_stay_as_they_are():
    text = refusal(SettingsError("Wrong.", "keep"), None)
    failed = {"type": "custom_validation_failed", "message": "m"}

    def error(name, words):
        return {**failed, "details": f"{name} - {words}", "extra_info": {"input_name": name}}

    ours = [error("erase", text), error("keep", text), error("kind", text)]
    theirs = [error("image", "Invalid image"), error("mask", "Invalid image")]
    other = {"type": "required_input_missing", "details": "clip", "extra_info": {}}
    answer = {"error": {}, "node_errors": {"4": {"errors": [*theirs, *ours, other]}}}
    cleaned = json.loads(told_once(json.dumps(answer).encode()))
    assert cleaned["node_errors"]["4"]["errors"] == [*theirs, ours[1], other]
    for answer in (b"", b"custom_validation_failed", b'["custom_validation_failed"]', b"{}"):
        assert told_once(answer) == answer
    missing = {"node_errors": {"4": {"errors": [ours[0], ours[2]]}}}
    cleaned = json.loads(told_once(json.dumps(missing).encode()))
    assert cleaned["node_errors"]["4"]["errors"] == [ours[0]]


@pytest.mark.parametrize("compressed", [False, True])
def test_the_answer_is_whole_also_where_the_host_compresses_it(compressed):
    text = refusal(SettingsError("Wrong.", "keep"), None)
    errors = [
        {"type": "custom_validation_failed", "details": f"{name} - {text}"}
        | {"extra_info": {"input_name": name}}
        for name in ("erase", "keep")
    ]

    async def answer(request: web.Request) -> web.Response:
        response = web.json_response({"node_errors": {"4": {"errors": errors}}}, status=400)
        if compressed:
            response.enable_compression(web.ContentCoding.gzip)
        return response

    async def asked() -> dict:
        app = web.Application()
        app.router.add_post("/api/prompt", answer)
        install(SimpleNamespace(app=app))
        async with TestClient(TestServer(app)) as client:
            async with client.post("/api/prompt") as response:
                return await response.json()

    found = asyncio.run(asked())
    assert found["node_errors"]["4"]["errors"] == [errors[1]]
