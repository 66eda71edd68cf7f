"""The nodes in the real front end: labels, search, old workflows and errors."""

from __future__ import annotations

import json
import os

import pytest

from tools import graphs
from tools.browser import Browser

from .test_front_end import TAG, browser  # noqa: F401

OLD = ["cat", "dog", "a tiger", "blurry", "object", "balanced", 7, "distilled", "auto", "auto"]
OLD += ["", -1, -1, -1.0, 0.0, -1.0, 1.0, 1.0, "frozen", -1.0, -1, -1, 0, -1, "train again"]
CHANGED = {"form": "hard", "templates": "a {}\nthe {}", "steps": 12, "stop_below": 0.25}
PLACES = {"form": 8, "templates": 10, "steps": 11, "stop_below": 19}
KEPT = dict(
    zip(
        "erase replace_with keep negative_prompts kind preset training_seed model_type "
        "stored_result".split(),
        [*OLD[:8], OLD[-1]],
        strict=True,
    )
)
RENDERERS = [False, True]


def workflow(values: list) -> dict:
    """A saved workflow with one trainer."""
    node = {"id": 2, "type": "ConceptSurgeryTrain", "pos": [600, 80], "size": [420, 640]}
    node |= {"flags": {}, "order": 0, "mode": 0, "inputs": [], "outputs": []}
    node |= {"properties": {}, "widgets_values": values}
    workflow = {"last_node_id": 2, "last_link_id": 0, "nodes": [node], "links": []}
    return workflow | {"groups": [], "config": {}, "extra": {}, "version": 0.4}


def changed_values() -> list:
    values = list(OLD)
    for name, place in PLACES.items():
        values[place] = CHANGED[name]
    return values


def opened(browser: Browser, load: str) -> dict:  # noqa: F811
    """The graph that the front end would send, after a script has loaded a workflow."""
    return json.loads(
        browser.run(
            f"""(async () => {{
                await {load}
                await new Promise((drawn) => setTimeout(drawn, 600))
                return JSON.stringify((await app.graphToPrompt()).output)
            }})()"""
        )
    )


def settings_of(sent: dict) -> dict:
    """The values of the one Erasure Settings that is wired to the trainer."""
    (node,) = (one for one in sent.values() if one["class_type"] == "ConceptSurgerySettings")
    wire = sent["2"]["inputs"]["settings"]
    assert sent[wire[0]] is node and wire[1] == 0
    return node["inputs"]


@pytest.mark.parametrize("load", ["loadGraphData", "paste"])
def test_an_old_workflow_opens_with_its_values(browser, load):  # noqa: F811
    if load == "paste":
        script = """(async () => {
            app.graph.clear()
            const node = LiteGraph.createNode("ConceptSurgeryTrain")
            node.id = 2
            node.configure({ ...SAVED, id: 2 })
            app.graph.add(node)
        })()""".replace("SAVED", json.dumps(workflow(changed_values())["nodes"][0]))
    else:
        script = f"app.loadGraphData({json.dumps(workflow(changed_values()))})"
    sent = opened(browser, script)
    assert {name: sent["2"]["inputs"][name] for name in KEPT} == KEPT
    given = settings_of(sent)
    assert {name: given[name] for name in CHANGED} == CHANGED
    assert given["rank"] == -1 and given["layers"] == "auto"


def test_one_with_nothing_changed_needs_no_other_node_and_a_new_one_stays(browser):  # noqa: F811
    for values in (OLD, [*OLD[:8], OLD[-1]]):
        sent = opened(browser, f"app.loadGraphData({json.dumps(workflow(values))})")
        assert list(sent) == ["2"]
        assert {name: sent["2"]["inputs"][name] for name in KEPT} == KEPT


def test_a_graph_in_api_format_keeps_its_expert_values(browser):  # noqa: F811
    graph = graphs.loader("one-level.safetensors", "1")
    graph |= graphs.train("2", erase="cat", model=("1", 0), clip=("1", 1), rank=3, **CHANGED)
    sent = opened(browser, f"app.loadApiJson({json.dumps(graph)}, 'old')")
    given = settings_of(sent)
    assert {name: given[name] for name in CHANGED} == CHANGED and given["rank"] == 3


@pytest.mark.parametrize("vue", RENDERERS)
def test_each_text_box_has_a_visible_label(browser, vue):  # noqa: F811
    name = json.dumps("Comfy.VueNodes.Enabled")
    browser.run(f"app.extensionManager.setting.set({name}, {json.dumps(vue)})")
    try:
        opened(browser, f"app.loadGraphData({json.dumps(workflow(changed_values()))})")
        browser.run("(app.canvas.ds.offset = [300, 60], app.canvas.setDirty(true, true))")
        seen = """[...document.querySelectorAll(".concept-surgery-labelled")]
            .filter((e) => e.offsetHeight > 20 && e.querySelector("textarea").offsetHeight > 10)
            .map((e) => [e.querySelector("label").innerText, e.querySelector("textarea").value])"""
        browser.wait_for(f"({seen}).length == 4", 20)
        labels = dict(browser.run(seen))
        assert labels["Erase"] == "cat" and labels["Keep"] == "a tiger"
        assert labels["Negative prompts you use"] == "blurry"
        assert labels["Templates (own phrases)"] == CHANGED["templates"]
        # What is typed there is what is sent.
        sent = opened(
            browser,
            """(async () => {
                const box = [...document.querySelectorAll(".concept-surgery-labelled textarea")]
                    .find((e) => e.value == "cat")
                box.value = "owl"
                box.dispatchEvent(new Event("input", { bubbles: true }))
            })()""",
        )
        assert sent["2"]["inputs"]["erase"] == "owl"
    finally:
        browser.run(f"app.extensionManager.setting.set({name}, false)")


@pytest.mark.skipif(
    "COMFYUI_FRONT_END_FOLDER" not in os.environ, reason="1.32 searches in names alone"
)
@pytest.mark.parametrize(
    "word", ["erase", "forget", "unlearn", "censor", "LECO", "ESD", "UCE", "delete", "remove"]
)
def test_the_search_finds_train(browser, word):  # noqa: F811
    found = browser.run(
        """(() => {
            const stores = document.querySelector("#vue-app").__vue_app__
                .config.globalProperties.$pinia._s
            const search = stores.get("nodeDef").nodeSearchService
            return search.searchNode(WORD, [], { limit: 8 }).map((one) => one.name)
        })()""".replace("WORD", json.dumps(word))
    )
    assert found[0] == "ConceptSurgeryTrain", found


def test_an_error_shows_once_at_its_input(browser):  # noqa: F811
    said = "names nothing after the arrow"
    graph = graphs.loader("one-level.safetensors", "1")
    graph |= graphs.train("2", erase=f"{TAG} =>", model=("1", 0), clip=("1", 1))
    graph |= graphs.show("4", ("2", 2))
    browser.run("window.harmed = 0")
    opened(browser, f"app.loadApiJson({json.dumps(graph)}, 'wrong')")
    errors = browser.run(
        """(async () => {
            const sent = await app.graphToPrompt()
            const asked = { method: "POST", body: JSON.stringify({ prompt: sent.output }) }
            const answer = await (await app.api.fetchApi("/prompt", asked)).json()
            return Object.entries(answer.node_errors).flatMap(([id, node]) =>
                node.errors.map((one) => [id, one.extra_info.input_name, one.details]))
        })()"""
    )
    ((node, name, details),) = errors
    assert (node, name) == ("2", "erase") and said in details
    browser.run("app.queuePrompt(0, 1)")
    opener = "[...document.querySelectorAll('button')].find((e) => e.innerText == 'View details')"
    browser.wait_for(f"({opener}?.click(), document.body.innerText.includes({said!r}))", 30)
    # Once in a dialog; newer front ends tell it beside the node, too.
    dialogs = f"""[...document.querySelectorAll("[role=dialog]")]
        .filter((e) => e.innerText.includes({said!r}))
        .map((e) => e.innerText.split({said!r}).length - 1)"""
    if os.environ.get("COMFYUI_FRONT_END_FOLDER") is None:
        assert browser.run(dialogs) == [1]
    assert browser.run("document.querySelectorAll('img[src=x]').length") == 0
    assert not browser.run("window.harmed")
