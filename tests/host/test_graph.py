"""The graph a user builds, over the host's HTTP API."""

from __future__ import annotations

import io
import itertools
import json
import re
import time

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tools import graphs
from tools.environment import ROOT
from tools.host import ComfyHost, GraphFailed, GraphRejected

CHECKPOINT = "one-level.safetensors"
SMALL = {"steps": 4, "trajectories": 4, "resolution": 32, "captions": 24}

# Two phrases instead of the twelve of the kind: encoding them is most of so small a training.
TEMPLATES = "a photo of a {} => a photo\na {} in a garden => a garden"


def training(**values):
    settings = {"erase": "cat", "replace_with": "dog", "templates": TEMPLATES, **SMALL, **values}
    return graphs.loader(CHECKPOINT) | graphs.train(**settings)


def pixels(server: ComfyHost, entry, name: str) -> bytes:
    (record,) = entry["outputs"][name]["images"]
    return Image.open(io.BytesIO(server.image(record))).convert("RGB").tobytes()


def shot(name: str, model, text: str = "a photo of a cat"):
    return graphs.picture(name, text, model=model)


def test_the_nodes_are_there_with_tooltips_and_help(server):
    for name, title in {
        "ConceptSurgeryTrain": "Train Concept Erasure",
        "ConceptSurgerySettings": "Erasure Settings",
        "ConceptSurgerySuggest": "Suggest Names",
        "ConceptSurgeryApply": "Apply Erased UNet",
        "ConceptSurgeryCompare": "Compare Erasure",
        "ConceptSurgeryReport": "Erasure Report",
        "ConceptSurgeryJoin": "Join Erasures",
        "ConceptSurgeryTakeOut": "Take Concepts Out",
        "ConceptSurgerySave": "Save Erasure",
        "ConceptSurgeryLoad": "Load Erasure",
    }.items():
        info = server.object_info(name)
        assert info["display_name"] == title and info["description"]
    required = server.object_info("ConceptSurgeryTrain")["input"]["required"]
    assert all(len(spec) > 1 and spec[1].get("tooltip") for spec in required.values())


def test_train_apply_save_and_the_stock_loader_agree(server):
    graph = training(keep="a photo of a tiger", templates="")  # the phrases of the kind
    graph |= graphs.save(filename="cat_gone") | graphs.show("report", ("train", 2))
    graph |= graphs.apply() | graphs.apply("off", strength=0.0)
    graph |= shot("before", ("loader", 0)) | shot("after", ("apply", 0)) | shot("none", ("off", 0))
    graph |= graphs.node("curve", "LossGraphNode", loss=("train", 1), filename_prefix="loss")
    events = []
    entry = server.run(graph, timeout=240, on_progress=events.append)
    before, after = pixels(server, entry, "before"), pixels(server, entry, "after")
    assert after != before
    assert pixels(server, entry, "none") == before
    assert "Guidance moved" in "".join(entry["outputs"]["report"]["text"])
    assert entry["outputs"]["curve"]["images"]
    assert any(event.get("type") == "progress" for event in events)

    stock = graphs.loader(CHECKPOINT) | graphs.node(
        "lora",
        "LoraLoaderModelOnly",
        model=("loader", 0),
        lora_name="cat_gone.safetensors",
        strength_model=1.0,
    )
    stock |= shot("stock", ("lora", 0))
    stock |= graphs.load(filename="cat_gone.safetensors")
    stock |= graphs.apply(erasure=("load", 0)) | shot("loaded", ("apply", 0))
    again = server.run(stock)
    assert pixels(server, again, "stock") == after
    assert pixels(server, again, "loaded") == after


def test_beside_the_weights_the_picture_is_the_merged_one(server):
    graph = training(training_seed=3) | shot("before", ("loader", 0))
    for name, values in {
        "merged": {},
        "beside": {"mode": "exact"},
        "off": {"mode": "exact", "strength": 0.0},
    }.items():
        graph |= graphs.apply(f"apply-{name}", **values) | shot(name, (f"apply-{name}", 0))
    entry = server.run(graph, timeout=240)
    shots = {name: pixels(server, entry, name) for name in ("before", "merged", "beside", "off")}
    assert shots["off"] == shots["before"] and shots["beside"] != shots["before"]
    pairs = list(zip(shots["beside"], shots["merged"], strict=True))
    assert max(abs(one - other) for one, other in pairs) <= 2


def test_a_concept_that_is_taken_out_is_drawn_again(server):
    instant = {"preset": "instant", "steps": -1, "trajectories": -1}
    graph = training(erase="cat\npizza => bread", **instant) | graphs.take_out(concepts="Pizza")
    graph |= graphs.show("report", ("take", 1)) | graphs.save(erasure=("take", 0))
    cat, pizza = "a photo of a cat", "a photo of a pizza"
    graph |= graphs.apply("whole") | graphs.apply("smaller", erasure=("take", 0))
    for name, model in {"none": "loader", "all": "whole", "less": "smaller"}.items():
        graph |= shot(f"cat-{name}", (model, 0), cat) | shot(f"pizza-{name}", (model, 0), pizza)
    entry = server.run(graph)
    shots = {name: pixels(server, entry, name) for name in entry["outputs"] if "-" in name}
    assert change(shots["pizza-less"], shots["pizza-none"]) < 0.5 * change(
        shots["pizza-all"], shots["pizza-none"]
    )
    assert change(shots["cat-less"], shots["cat-none"]) > 0.5 * change(
        shots["cat-all"], shots["cat-none"]
    )
    assert "Taken out again: pizza." in "".join(entry["outputs"]["report"]["text"])

    wrong = {name: graph[name] for name in ("loader", "train", "take")} | graphs.apply("whole")
    twice = wrong | graphs.apply("smaller", model=("whole", 0), erasure=("take", 0))
    with pytest.raises(GraphFailed, match="'cat' in common .* already on this model"):
        server.run(twice | shot("never", ("smaller", 0)))
    for concepts, words in {
        "bird": "not among what",
        "pizza\ncat": "Nothing would be left",
    }.items():
        with pytest.raises(GraphFailed, match=words):
            server.run(
                wrong | graphs.take_out(concepts=concepts) | graphs.save(erasure=("take", 0))
            )
    with pytest.raises(GraphRejected, match="No concept is named"):
        server.run(wrong | graphs.take_out(concepts=" ") | graphs.save(erasure=("take", 0)))


def change(one: bytes, other: bytes) -> float:
    """Root mean square of the difference of two pictures' pixels."""
    squares = [(a - b) ** 2 for a, b in zip(one, other, strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


def test_the_soft_form_moves_what_it_keeps_less_than_what_it_erases(server):
    kept = "a photo of a tiger"
    graph = training(form="soft", keep=kept, training_seed=4)
    graph |= graphs.apply() | graphs.show("report", ("train", 2))
    for name, text in {"erased": "a photo of a cat", "kept": kept}.items():
        graph |= shot(f"{name}-before", ("loader", 0), text)
        graph |= shot(f"{name}-after", ("apply", 0), text)
    entry = server.run(graph)
    report = "".join(entry["outputs"]["report"]["text"])
    erased = figure(report, "Change of the erased prompts: {} of the prediction.")
    assert figure(report, "Guidance moved {} of the way on held-out states") >= 0.9
    assert 0 < figure(report, "Null prompt: held by a penalty, drift {};") <= 0.1 * erased
    assert 0 < figure(report, f"Kept {kept!r}: approximate, drift {{}}.") <= 0.1 * erased
    assert figure(report, "{} steps,") == SMALL["steps"]
    shots = {name: pixels(server, entry, name) for name in entry["outputs"] if "-" in name}
    moved = {
        name: change(shots[f"{name}-after"], shots[f"{name}-before"]) for name in ("erased", "kept")
    }
    assert 0 < moved["kept"] <= 0.1 * moved["erased"]


def figure(report: str, line: str) -> float:
    """The number that stands in a report at the braces of a line."""
    before, after = map(re.escape, line.split("{}"))
    number, percent = re.search(rf"{before}([-+.\de]+)(%?){after}", report).groups()
    return float(number) / (100 if percent else 1)


def test_the_saved_file_says_what_it_is(server):
    entry = server.run(training() | graphs.save(filename="described"))
    path = entry["outputs"]["save"]["text"][0].removeprefix("Saved described.safetensors in ")
    with safe_open(f"{path}/described.safetensors", framework="pt") as file:
        info = file.metadata()
    record = json.loads(info["concept_surgery"])
    assert record["base"]["name"] == CHECKPOINT
    assert record["concepts"][0]["text"] == "cat" and record["steps_done"] == 4
    assert info["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert info["ss_base_model_version"] == "sd_v1"

    older = {key: value for key, value in record.items() if key != "form"} | {"version": "0.1.0"}
    tensors = load_file(f"{path}/described.safetensors")
    save_file(tensors, f"{path}/older.safetensors", {"concept_surgery": json.dumps(older)})
    graph = graphs.load(filename="older.safetensors") | graphs.show("report", ("load", 1))
    with pytest.raises(GraphFailed, match="older.safetensors was written by version 0.1.0 .* form"):
        server.run(graph)


def test_queueing_twice_trains_once(server):
    graph = training(training_seed=5) | graphs.show("report", ("train", 2))
    server.run(graph)
    entry = server.run(graph)
    cached = [data for kind, data in entry["status"]["messages"] if kind == "execution_cached"]
    assert "train" in cached[0]["nodes"]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"erase": ""}, "concept is empty"),
        ({"replace_with": "Cat"}, "the same"),
        ({"keep": "a photo of a cat"}, "Both can't hold"),
        ({"layers": "attention"}, "Choose the soft form"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(server, values, words):
    with pytest.raises(GraphRejected, match=words):
        server.run(training(**values) | graphs.save())


def test_a_bad_file_name_is_refused_before_anything_runs(server):
    with pytest.raises(GraphRejected, match="without folders"):
        server.run(training() | graphs.save(filename="../cat"))


def test_applying_twice_is_an_error_at_the_node(server):
    graph = training() | graphs.apply() | graphs.apply("again", model=("apply", 0))
    with pytest.raises(GraphFailed, match="already on this model"):
        server.run(graph | shot("never", ("again", 0)))


def test_cancel_comes_within_a_step_and_the_model_is_as_before(server):
    plain = graphs.loader(CHECKPOINT) | shot("plain", ("loader", 0))
    before = pixels(server, server.run(plain), "plain")
    graph = training(steps=5000, training_seed=9) | graphs.show("report", ("train", 2))
    started = []

    def watch(event):
        text = str(event)
        if "Training" in text and not started:
            started.append(time.monotonic())
            server.interrupt()

    with pytest.raises(GraphFailed) as failure:
        server.run(graph, timeout=120, on_progress=watch)
    assert failure.value.interrupted and time.monotonic() - started[0] < 3
    changed = graphs.loader(CHECKPOINT) | graphs.picture("plain", "a photo of a cat", steps=9)
    server.run(changed)  # so that the next picture is drawn, not taken from the cache
    assert pixels(server, server.run(plain), "plain") == before


def test_example_workflows_fit_the_nodes(server):
    """Every node of every example exists, and holds one value a widget, in the host's order."""
    examples = sorted((ROOT / "example_workflows").glob("*.json"))
    assert examples
    for path in examples:
        workflow = json.loads(path.read_text("utf-8"))
        nodes = {node["id"]: node for node in workflow["nodes"]}
        for node in nodes.values():
            if node["type"] == "MarkdownNote":  # the front end's own
                continue
            info = server.object_info(node["type"])["input"]
            specs = {**info.get("required", {}), **info.get("optional", {})}
            sockets = {entry["name"] for entry in node["inputs"]}
            widgets = [name for name in specs if name not in sockets]
            extra = widgets.count("seed")  # the front end adds what to do after a run
            assert len(node["widgets_values"]) == len(widgets) + extra, (path.name, node["type"])
            assert sockets <= set(specs)
        for link, source, output, target, slot, kind in workflow["links"]:
            assert link in nodes[source]["outputs"][output]["links"]
            assert nodes[source]["outputs"][output]["type"] == kind
            assert nodes[target]["inputs"][slot]["link"] == link
            assert nodes[target]["inputs"][slot]["type"] in (kind, "*")
        assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])
        assert workflow["last_node_id"] == max(nodes)
        for one, other in itertools.combinations(nodes.values(), 2):
            assert apart(one, other), (path.name, one["type"], other["type"])


def apart(one, other) -> bool:
    """Whether two nodes of a workflow leave space for each other and their titles of 30 pixels."""
    left, top, right, bottom = zip(*map(edges, (one, other)), strict=True)
    return max(left) > min(right) or max(top) - 30 > min(bottom)


def edges(node) -> tuple[float, float, float, float]:
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top, left + width, top + height
