"""The example workflows in the host and its front end: they run, and nothing lies over anything."""

from __future__ import annotations

import itertools
import json
import os

import pytest
from concept_surgery.erase_core import Erasure

from tools.browser import Browser, find_chromium
from tools.environment import BUILD
from tools.host import ComfyHost, GraphRejected
from tools.templates import TEMPLATES, Template, workflow

CHECKPOINT = "one-level.safetensors"
ALL = bool(os.environ.get("TEMPLATES"))
# Of each way to be put together one; all of them are tried where there is time.
CHOSEN = TEMPLATES if ALL else [t for t in TEMPLATES if t.resolution or t.typed is None]
NAMES = [template.stem for template in CHOSEN]
TITLE = 30  # pixels over each node
SHOTS = BUILD / "front_end"
# Small as the tests' checkpoint: two phrases, few words of language, one step for each picture.
SMALL = {
    "templates": "a photo of a {} => a photo\na {} in a garden => a garden",
    "captions": 24,
    "resolution": 32,
}
DRAWN_SMALL = {"steps": 1, "width": 32, "height": 32, "prompts": "a cat\na tree"}


def graph_of(server: ComfyHost, content) -> dict[str, dict]:
    """A workflow as the front end sends it."""
    links = {link[0]: [str(link[1]), link[2]] for link in content["links"]}
    graph = {}
    for node in content["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        info = server.object_info(node["type"])["input"]
        sockets = {one["name"]: one["link"] for one in node["inputs"]}
        names = []
        for name in [*info.get("required", {}), *info.get("optional", {})]:
            names += [] if name in sockets else [name]
            names += [""] if name == "seed" else []  # what the front end does about it afterwards
        inputs = dict(zip(names, node["widgets_values"], strict=True))
        inputs.pop("", None)
        inputs |= {name: links[link] for name, link in sockets.items() if link is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def small(server: ComfyHost, template: Template) -> dict[str, dict]:
    """A template's graph on the tests' checkpoint, as small as that."""
    graph = graph_of(server, workflow(template))
    for node in list(graph.values()):
        inputs = node["inputs"]
        if node["class_type"] == "CheckpointLoaderSimple":
            inputs["ckpt_name"] = CHECKPOINT
        elif node["class_type"] == "ConceptSurgeryTrain":
            kept = graph.get(inputs.get("settings", ["small"])[0], {}).get("inputs", {})
            graph["small"] = {"class_type": "ConceptSurgerySettings", "inputs": kept | SMALL}
            inputs |= {"settings": ["small", 0], "preset": "instant"}
        elif node["class_type"] == "ConceptSurgeryCompare":
            inputs |= DRAWN_SMALL
        elif node["class_type"] == "ConceptSurgeryLoad":
            inputs["filename"] = inputs["filename"].replace("cat_to_dog", "cat_to_dog_turbo")
    return graph


def of_kind(graph, kind: str) -> tuple[str, dict]:
    return next((key, node) for key, node in graph.items() if node["class_type"].endswith(kind))


@pytest.mark.parametrize("template", CHOSEN, ids=NAMES)
def test_a_template_runs_and_leaves_what_it_says(server, template):
    graph = small(server, template)
    entry = server.run(graph)
    sheet, _ = of_kind(graph, "Compare")
    assert entry["outputs"][sheet]["images"]
    if template.typed is not None:
        saved = server.models("loras") / f"{template.file}.safetensors"
        first = template.typed["erase"].split("=>")[0].split("|")[0].strip()
        assert Erasure.load(saved).concept.startswith(first)
        assert saved.with_suffix(".preview.png").is_file() and saved.with_suffix(".json").is_file()


@pytest.mark.parametrize("template", [TEMPLATES[0], TEMPLATES[-1]], ids=("train", "apply"))
def test_what_is_typed_wrong_stops_all_of_it(server, template):
    """What the sheet or the training can't work with keeps the whole graph from being queued."""
    wrong = [("Compare", "strengths", "high"), ("Compare", "prompts", "x" * 10_000)]
    wrong += [("Train", "erase", " "), ("Load", "filename", "gone.safetensors")]
    for kind, name, value in wrong:
        graph = small(server, template)
        if any(node["class_type"].endswith(kind) for node in graph.values()):
            of_kind(graph, kind)[1]["inputs"][name] = value
            with pytest.raises(GraphRejected):
                server.queue(graph)


@pytest.fixture(scope="module")
def browser(server):
    """A front end that has been used before: without its greetings."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium found: install one, or name it in the variable CHROMIUM")
    with Browser(executable) as browser:
        opened(browser, server)
        for name, value in {
            "Comfy.TutorialCompleted": True,
            "Comfy.Workflow.ShowMissingModelsWarning": False,
        }.items():
            set_to(browser, name, value)
        opened(browser, server)
        yield browser


def opened(browser: Browser, server: ComfyHost) -> None:
    browser.open(server.url)
    browser.wait_for("!!window.app?.graph && !!window.LiteGraph")
    browser.wait_for("'ConceptSurgeryApply' in LiteGraph.registered_node_types")


def set_to(browser: Browser, name: str, value: bool) -> None:
    browser.run(f"app.extensionManager.setting.set({name!r}, {json.dumps(value)})")


def loaded_in(browser: Browser, content) -> None:
    text = json.dumps(content)
    wait = "new Promise((drawn) => setTimeout(drawn, 1200))"
    browser.run(f"app.loadGraphData({text}, true, true, 'a template').then(() => {wait})")


# What is on the page is measured in the graph's own pixels; a node's place is below its title.
BOXES = """(() => {
    const { scale, offset } = app.canvas.ds
    const page = app.canvas.canvas.getBoundingClientRect()
    const boxes = {}
    for (const node of app.graph._nodes) {
        const least = node.computeSize()
        const size = [0, 1].map((side) => Math.max(node.size[side], vue ? 0 : least[side]))
        const [left, top] = node.pos
        boxes[node.id] = [left, top - 30, left + size[0], top + size[1]]
    }
    for (const element of vue ? document.querySelectorAll("[data-node-id]") : []) {
        const box = element.getBoundingClientRect()
        const left = (box.left - page.left) / scale - offset[0]
        const top = (box.top - page.top) / scale - offset[1]
        const size = [box.width / scale, box.height / scale]
        boxes[element.dataset.nodeId] = [left, top, left + size[0], top + size[1]]
    }
    const groups = app.graph._groups.map((group) => {
        const [left, top, width, height] = group._bounding
        return [left, top, left + width, top + height]
    })
    return [Object.values(boxes), groups]
})()"""


def apart(one, other) -> bool:
    sides = ((0, 2), (1, 3))
    return any(max(one[a], other[a]) >= min(one[b], other[b]) for a, b in sides)


def inside(node, group) -> bool:
    return all(group[n] <= node[n] and node[n + 2] <= group[n + 2] for n in (0, 1))


@pytest.mark.parametrize("vue", [False, True], ids=("LiteGraph", "Vue nodes"))
def test_nothing_lies_over_anything_in_the_front_end(browser, vue):
    set_to(browser, "Comfy.VueNodes.Enabled", vue)
    SHOTS.mkdir(exist_ok=True)
    for template in CHOSEN:
        content = workflow(template)
        loaded_in(browser, content)
        nodes, groups = browser.run(BOXES.replace("vue", json.dumps(vue)))
        assert len(nodes) == len(content["nodes"]) and len(groups) == len(content["groups"])
        assert all(apart(*pair) for pair in itertools.combinations(nodes, 2)), template.stem
        assert all(apart(*pair) for pair in itertools.combinations(groups, 2)), template.stem
        loose = [n for n in nodes if not any(inside(n, group) for group in groups)]
        assert len(loose) == 1  # the note
        assert all(apart(loose[0], group) for group in groups), template.stem
        browser.screenshot(SHOTS / f"{template.stem}-{'vue' if vue else 'litegraph'}.png")


CLICKS = 5  # the template, "a model is missing", the list of checkpoints, one of them, Run


# Where the list of checkpoints opens on the canvas, in the page's pixels.
LIST = """(() => {
    const node = app.graph._nodes.find((n) => n.type == "CheckpointLoaderSimple")
    const page = app.canvas.canvas.getBoundingClientRect()
    const { scale, offset } = app.canvas.ds
    const [left, top] = [node.pos[0] + node.size[0] / 2, node.pos[1] + node.widgets[0].last_y + 10]
    return [page.left + (left + offset[0]) * scale, page.top + (top + offset[1]) * scale]
})()"""
IS_ON_SCREEN = """(() => {
    const node = app.graph._nodes.find((n) => n.type == "ConceptSurgeryCompare")
    const [left, top, width, height] = app.canvas.visible_area
    return node.imgs?.[0]?.naturalWidth > 0 && node.pos[0] >= left && node.pos[1] >= top &&
        node.pos[0] + node.size[0] <= left + width && node.pos[1] + node.size[1] <= top + height
})()"""


@pytest.mark.skipif(not ALL, reason="takes half a minute; set TEMPLATES=1")
def test_five_clicks_lead_from_an_empty_page_to_the_sheet(server):
    """As a new user does it whose checkpoint is another than the template's."""
    for name in ("Comfy.TutorialCompleted", "Comfy.VueNodes.Enabled"):
        server.post(f"/settings/{name}", False)
    server.post("/settings/Comfy.Workflow.ShowMissingModelsWarning", True)
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium found: install one, or name it in the variable CHROMIUM")
    with Browser(executable) as page:  # nobody has used it before
        opened(page, server)
        clicks = walked(page)
        page.wait_for(IS_ON_SCREEN, 240)
        page.run("new Promise((drawn) => setTimeout(drawn, 500))")
        SHOTS.mkdir(exist_ok=True)
        page.screenshot(SHOTS / "five-clicks.png")
    assert clicks == CLICKS
    assert (server.models("loras") / "cat_to_dog.safetensors").is_file()


def walked(page: Browser) -> int:
    """From the empty page to a run; how many clicks it took."""
    cards = "[...document.querySelectorAll('h3')]"
    middle_of(page, f"{cards}.find((e) => e.innerText == 'replace_an_object')")
    page.wait_for("app.graph._nodes.length == 5", 30)
    middle_of(page, "[...document.querySelectorAll('.p-dialog-close-button')].at(-1)")
    page.wait_for("!document.querySelector('.p-dialog-mask')", 30)
    page.click(*page.wait_for(LIST, 30))
    entries = "[...document.querySelectorAll('.litemenu-entry')]"
    middle_of(page, f"{entries}.find((e) => e.innerText.trim() == {CHECKPOINT!r})")
    shrunk(page)
    middle_of(page, "document.querySelector('button[aria-label=Run]')")
    return page.clicks


def middle_of(page: Browser, element: str) -> None:
    """A click into the middle of an element, which may have to be scrolled to."""
    page.wait_for(f"(({element}).scrollIntoView(), true)", 30)
    page.run("new Promise((moved) => setTimeout(moved, 500))")
    box = f"({element}).getBoundingClientRect()"
    page.click(
        *page.run(f"(() => {{ const r = {box}; return [r.left + r.width / 2, r.top + 8] }})()")
    )


def shrunk(browser: Browser) -> None:
    """What a real model doesn't need: the template as small as the tests' checkpoint."""
    browser.run(
        """(() => {
            const of = (kind) => app.graph._nodes.find((n) => n.type == "ConceptSurgery" + kind)
            const put = (node, values) => {
                for (const [name, value] of Object.entries(values))
                    node.widgets.find((w) => w.name == name).value = value
            }
            const settings = LiteGraph.createNode("ConceptSurgerySettings")
            app.graph.add(settings)
            settings.pos = [400, 1000]
            put(settings, SMALL)
            settings.connect(0, of("Train"), "settings")
            put(of("Train"), { preset: "instant" })
            put(of("Compare"), DRAWN)
        })()""".replace("SMALL", json.dumps(SMALL)).replace("DRAWN", json.dumps(DRAWN_SMALL))
    )
