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


WORDS = ["erase", "remove", "forget", "delete", "unlearn", "censor", "LECO", "ESD", "UCE"]
SEARCH = """(() => {
    const stores = document.querySelector("#vue-app").__vue_app__
        .config.globalProperties.$pinia._s
    const search = stores.get("nodeDef").nodeSearchService
    return TYPED.map((one) =>
        search.searchNode(one, [], { limit: 8 }).map((found) => found.display_name))
})()"""


def searched(browser: Browser, *typed: str) -> list[list[str]]:  # noqa: F811
    return browser.run(SEARCH.replace("TYPED", json.dumps(typed)))


def test_the_search_finds_train_first_by_each_word(browser):  # noqa: F811
    words = [*WORDS, *(word.upper() for word in WORDS), " forget "]
    for word, found in zip(words, searched(browser, *words), strict=True):
        assert found[0] == "Train Concept Erasure", (word, found)


def test_the_search_still_finds_what_is_called_so(browser):  # noqa: F811
    """Words of ours put nothing in front of a node whose name was typed, and add no more."""
    typed = ["KSampler", "Load LoRA", "Join Erasures", "Purify Image", "Save LoRA Weights", "unl"]
    ksampler, lora, join, purified, save, begun = searched(browser, *typed)
    assert ksampler[0] == "KSampler" and lora[0] == "Load LoRA"
    assert join[0] == "Join Erasures" and purified[0] == "Purify Image"
    assert save[0] == "Save LoRA Weights"
    assert "Train Concept Erasure" in begun
    (few,) = searched(browser, "e")
    assert len(few) == 8 and "Train Concept Erasure" not in few[:1]


def test_a_person_who_types_leco_into_the_search_box_adds_train(browser):  # noqa: F811
    browser.run("app.graph.clear()")
    # The templates that greet a new user.
    browser.run("document.querySelectorAll('.p-dialog-close-button').forEach((e) => e.click())")
    browser.run("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    field = "inputs.find((one) => /^(Search Nodes|Add a node)/.test(one.placeholder))"
    field = field.replace("inputs", "[...document.querySelectorAll('input')]")
    browser.wait_for(f"({field}?.focus(), document.activeElement === {field})", 20)
    browser.type("leco")
    first = "[...document.querySelectorAll('[role=option]')].find((one) => one.innerText.trim())"
    browser.wait_for(f"{first}?.innerText.includes('Train Concept Erasure')", 20)
    browser.run(f"{first}.click()")
    # A newer front end lets the node hang on the mouse until it is clicked.
    placed = "app.graph.nodes.some((node) => node.type === 'ConceptSurgeryTrain')"
    if not browser.run(f"new Promise((ask) => setTimeout(() => ask({placed}), 500))"):
        browser.click(700, 500)
    browser.wait_for(placed, 20)


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
