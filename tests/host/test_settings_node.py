"""Erasure Settings: the expert values by one wire, and those that old graphs give directly."""

from __future__ import annotations

import asyncio
import inspect
import json
from types import SimpleNamespace

import pytest
from concept_surgery.erase_core import SettingsError
from concept_surgery.nodes.refusals import note_graph, sent_values, told_once
from concept_surgery.nodes.settings import EXPERT, ErasureSettings, expert_values
from concept_surgery.nodes.train import TrainErasure, widgets_of

from tools import graphs
from tools.host import ComfyHost, GraphFailed, GraphRejected

from .test_graph import CHECKPOINT, SMALL, TEMPLATES

VALUES = {"captions": SMALL["captions"], "templates": TEMPLATES, "form": "hard", "rank": 3}


def graph_with(settings: dict | None = None, **direct) -> graphs.Graph:
    """A trainer with its report, with expert values by wire, directly, or both."""
    values = {"erase": "cat => dog", **direct}
    graph = graphs.loader(CHECKPOINT) | graphs.show("shown", ("train", 2))
    if settings is None:
        return graph | graphs.train(**values)
    wire = ("settings", 0)
    return graph | graphs.erasure_settings(**settings) | graphs.train(**values, settings=wire)


def refused(server: ComfyHost, graph: graphs.Graph) -> list[tuple[str, str, str]]:
    """Node, input and words of every error that the host answers a graph with."""
    with pytest.raises(GraphRejected) as rejected:
        server.queue(graph)
    return [
        (node, error["extra_info"]["input_name"], error["message"] + error["details"])
        for node, of_one in rejected.value.node_errors.items()
        for error in of_one["errors"]
    ]


def test_train_shows_what_a_person_decides_and_settings_the_rest():
    train, expert = TrainErasure.INPUT_TYPES(), ErasureSettings.INPUT_TYPES()
    names = [*train["required"], *train["optional"]]
    assert names == (
        "model clip erase replace_with keep negative_prompts kind preset training_seed "
        "settings model_type stored_result".split()
    )
    # As they once stood on the trainer: web/old_workflows.js reads saved values by their order.
    names = "form layers templates steps rank learning_rate eta protection drift_weight "
    names += "keep_weight null_score stop_below batch trajectories resolution captions"
    names += " keep_room"  # which never did, and comes behind
    assert [*expert["optional"]] == list(EXPERT) == names.split()
    assert not expert.get("required")


def test_by_wire_they_do_what_they_did_on_the_node_itself(server):
    instant = {"training_seed": 31, "preset": "instant"}
    server.run(graph_with(**instant, **VALUES), timeout=120)
    only = {**instant, "stored_result": "use only"}
    entry = server.run(graph_with(VALUES, **only))
    assert "Taken from the store" in entry["outputs"]["shown"]["text"][0]
    other = {**VALUES, "rank": 4}  # other values are other results, in either place
    for graph in (graph_with(other, **only), graph_with(**other, **only)):
        with pytest.raises(GraphFailed, match="Nothing is stored"):
            server.run(graph)


def test_left_alone_it_changes_nothing():
    defaults = {one.id: one.default for one in ErasureSettings.define_schema().inputs}
    for wired in ({}, expert_values(defaults)):
        assert widgets_of({"erase": "cat"}, wired) == {"erase": "cat", **wired}
        assert ErasureSettings.execute(**wired).args == (wired,)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("resolution", 100, "multiple of 8"),
        ("templates", "a photo", "has no {}"),
        ("templates", {"a": 1}, "must be text, not {'a': 1}"),
        ("form", "firm", "Unknown form"),
        ("layers", 5, "must be text, not 5"),
        ("null_score", "lost", "Unknown null score"),
        ("steps", 99_999, "99999"),
        ("steps", "many", "many"),
        ("learning_rate", -0.5, "learning rate must be between"),
        ("trajectories", 1, "at least 2 trajectories"),
    ],
)
def test_a_wrong_value_is_told_once_at_its_input_there(server, name, value, words):
    ((node, given, text),) = refused(server, graph_with({name: value}))
    assert (node, given) == ("settings", name) and words in text


def test_a_wrong_concept_is_told_first_and_then_a_wrong_value_there(server):
    ((node, given, _),) = refused(server, graph_with({"resolution": 100}, erase=""))
    assert (node, given) == ("train", "erase")
    ((node, given, _),) = refused(server, graph_with({"resolution": 100, "steps": 99_999}))
    assert node == "settings"


def test_values_from_both_places_are_refused(server):
    ((node, name, text),) = refused(server, graph_with({"steps": 4}, rank=8))
    assert (node, name) == ("train", "settings") and "rank came with this node" in text
    with pytest.raises(SettingsError, match="must come from Erasure Settings"):
        widgets_of({"erase": "cat"}, {"erase": "dog"})


@pytest.mark.parametrize("name", ["erase", "replace_with", "keep", "negative_prompts"])
@pytest.mark.parametrize("value", [5, True, {"text": "cat"}, {"__value__": ["cat", "dog", "owl"]}])
def test_what_is_no_text_is_refused_though_the_host_makes_text_of_it(server, name, value):
    if name != "replace_with" and "__value__" in str(value):
        pytest.skip("A list of texts is as good as lines of them.")
    ((node, given, text),) = refused(server, graph_with(**{name: value}))
    assert (node, given) == ("train", name) and "must be text, not" in text


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "Nothing to erase"),
        ("cat =>", "names nothing after the arrow"),
        ("=> dog", "can't be read"),
        ("cat => dog => owl", "can't be read"),
    ],
)
def test_what_was_typed_wrong_is_one_sentence_at_erase(server, text, words):
    ((node, given, said),) = refused(server, graph_with(erase=text))
    assert (node, given) == ("train", "erase") and words in said


def test_the_host_can_repeat_nothing_where_its_answer_is_not_put_right():
    """It repeats an error for each input that a node names; ours names one."""
    named = inspect.getfullargspec(TrainErasure.validate_inputs)
    assert named.args == ["cls", "erase"] and named.varkw is None


def test_where_the_host_refuses_a_choice_itself_ours_is_left_out():
    failed = {"type": "custom_validation_failed", "message": "m"}
    text = TrainErasure.validate_inputs(preset="quick")
    ours = {**failed, "details": f"erase - {text}", "extra_info": {"input_name": "erase"}}
    theirs = {"type": "value_not_in_list", "details": "", "extra_info": {"input_name": "preset"}}
    for errors in ([theirs, ours], [ours, theirs]):
        cleaned = told_once(answer_of(errors))
        assert answer_of([theirs]) == cleaned
    assert b'"input_name": "preset"' in told_once(answer_of([ours]))


def answer_of(errors: list[dict]) -> bytes:
    return json.dumps({"node_errors": {"4": {"errors": errors}}}).encode()


def test_a_graph_is_remembered_for_its_own_answer_alone():
    node = SimpleNamespace(hidden=SimpleNamespace(unique_id="1"))

    async def answered(asked) -> dict:
        assert note_graph(asked) is asked
        await asyncio.sleep(0)
        return sent_values(node)

    async def both():
        asked = {"prompt": graphs.train("1", erase={"__value__": 5})}, {"prompt": 5}
        return await asyncio.gather(*[asyncio.create_task(answered(one)) for one in asked])

    one, other = asyncio.run(both())
    assert one["erase"] == 5 and one["keep"] == "" and "model" not in one
    assert other == sent_values(node) == {}


def test_a_value_that_a_link_brings_is_refused_before_the_training():
    with pytest.raises(SettingsError, match="multiple of 8"):
        ErasureSettings.execute(resolution=100)
