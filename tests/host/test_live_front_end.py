"""A training watched in the host's own front end, with both of its renderers.

``LIVE_IN_BROWSER=1`` runs these; they take some minutes. The pictures lie in ``build/screenshots``.
"""

from __future__ import annotations

import json
import os
import time

import pytest

from tools import graphs
from tools.browser import Browser, find_chromium
from tools.environment import BUILD

from .test_live import SHORT

pytestmark = pytest.mark.skipif(
    not os.environ.get("LIVE_IN_BROWSER"), reason="set LIVE_IN_BROWSER=1"
)
SHOTS = BUILD / "screenshots"
VIEW = "document.querySelector('.concept-surgery-run')"
RENDERERS = {"litegraph": "false", "vue": "true"}
HOSTILE = "cat <img src=x onerror='window.harmed=1'>"


@pytest.fixture(scope="module")
def browser():
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium found: install one, or name it in the variable CHROMIUM")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with Browser(executable) as browser:
        yield browser


def opened(browser: Browser, server, renderer: str) -> None:
    """The front end with a renderer, and none of its own dialogs."""
    browser.open(server.url)
    ready = "!!window.app?.graph && 'ConceptSurgeryTrain' in window.LiteGraph.registered_node_types"
    browser.wait_for(ready)
    choices = {"Comfy.VueNodes.Enabled": RENDERERS[renderer], "Comfy.TutorialCompleted": "true"}
    for name, value in choices.items():
        browser.run(f"app.extensionManager.setting.set({name!r}, {value})")
    time.sleep(1)  # until the settings are saved
    reload(browser, ready)
    browser.wait_for(f"(document.querySelector('.p-dialog-close-button')?.click(), {ready})")


def reload(browser: Browser, ready: str) -> None:
    browser.run("void (window.before = true, setTimeout(() => location.reload(), 50))")
    browser.wait_for(f"!window.before && {ready}")


def queue(browser: Browser, graph: graphs.Graph | None = None) -> None:
    """Queue a graph, or what is open, as the button does; and look at its trainer."""
    load = "" if graph is None else f"app.loadApiJson({json.dumps(graph)}, 'live')"
    browser.run(
        f"""(async () => {{
            {load}
            await new Promise((drawn) => setTimeout(drawn, 1500))
            const node = app.graph.nodes.find((one) => one.type === "ConceptSurgeryTrain")
            app.canvas.ds.scale = 0.8
            app.canvas.ds.offset = [40 - node.pos[0], 90 - node.pos[1]]
            app.canvas.setDirty(true, true)
            await app.queuePrompt(0, 1)
        }})()"""
    )


def state(browser: Browser, wanted: str, timeout: float = 240.0) -> str:
    """The text of the view, once it is in a state."""
    return browser.wait_for(f"{VIEW}?.dataset.state === {wanted!r} && {VIEW}.innerText", timeout)


def training(seed: int, **values) -> graphs.Graph:
    given = {"erase": "cat => dog", "keep": "a tiger", **SHORT, "steps": 2000, **values}
    graph = graphs.loader("one-level.safetensors") | graphs.train(training_seed=seed, **given)
    return graph | graphs.show("report", ("train", 2))


@pytest.mark.parametrize("renderer", RENDERERS)
def test_a_training_is_watched_stopped_reloaded_and_gone_on_with(server, browser, renderer):
    opened(browser, server, renderer)
    seed = list(RENDERERS).index(renderer) + 50
    queue(browser, training(seed))
    browser.wait_for(f"{VIEW}?.innerText.includes('Training, step')", 240)
    browser.wait_for(f"Number({VIEW}.querySelector('canvas').dataset.points) > 2")
    painted = "getContext('2d').getImageData(0, 0, 600, 160).data.filter((byte) => byte).length"
    assert browser.run(f"{VIEW}.querySelector('canvas').{painted}") > 1000
    browser.wait_for(f"{VIEW}.querySelectorAll('img').length >= 2")
    assert browser.run(f"{VIEW}.getBoundingClientRect().height") > 100
    text = browser.run(f"{VIEW}.innerText")
    assert "What is left of it:" in text and "Drift of the rest:" in text and "at most" in text
    browser.screenshot(SHOTS / f"live-{renderer}-running.png")

    # A page that is loaded again while it trains shows the same run.
    reload(browser, "!!window.app?.graph?.nodes?.length")
    browser.wait_for(f"{VIEW}?.dataset.state === 'running'", 60)
    browser.wait_for(f"{VIEW}.querySelectorAll('img').length >= 2")
    assert not browser.run(f"{VIEW}.querySelector('button').disabled")
    browser.run(f"{VIEW}.querySelector('button').click()")
    text = state(browser, "stopped")
    assert "of 2000 steps and kept" in text and "Stop and keep" not in text
    verdict = browser.run(f"{VIEW}.querySelector('.concept-surgery-verdict').innerText")
    assert "cat" in verdict and "What else changes most" in verdict and verdict in text
    assert browser.run(f"{VIEW}.querySelectorAll('img').length") == 5
    browser.screenshot(SHOTS / f"live-{renderer}-stopped.png")

    # And when it has ended.
    reload(browser, "!!window.app?.graph?.nodes?.length")
    assert "Stopped and kept" in state(browser, "stopped", 60)
    assert browser.run(f"{VIEW}.querySelectorAll('img').length") == 5

    browser.run(
        """(() => { const node = app.graph.nodes.find((n) => n.type === "ConceptSurgeryTrain")
            node.widgets.find((w) => w.name === "stored_result").value = "resume" })()"""
    )
    done = int(text.split("Stopped after ")[1].split()[0])
    queue(browser)
    browser.wait_for(f"{VIEW}?.innerText.includes('Training, step {done + 2} of')", 240)
    browser.run(f"{VIEW}.querySelector('button').click()")
    text = state(browser, "stopped")
    assert f"Went on from step {done} of an earlier run" in text
    height = browser.run(f"{VIEW}.scrollHeight - {VIEW}.clientHeight")
    assert height <= 2  # nothing of it is cut off
    browser.screenshot(SHOTS / f"live-{renderer}-again.png")
    ours = [said for said in browser.complaints if "concept" in said.lower()]
    assert not ours


def test_the_view_takes_no_value_of_the_workflow_and_no_markup(server, browser):
    opened(browser, server, "litegraph")
    queue(browser, training(60, erase=HOSTILE, keep=HOSTILE, steps=2))
    text = browser.wait_for(
        f"['done', 'stored', 'failed'].includes({VIEW}?.dataset.state) && {VIEW}.innerText", 240
    )
    assert text and browser.run("document.querySelectorAll('img[src=x]').length") == 0
    assert not browser.run("window.harmed")
    values = browser.run(
        """app.graph.serialize().nodes.find((n) => n.type === "ConceptSurgeryTrain")
            .widgets_values.length"""
    )
    inputs = browser.run(
        """LiteGraph.createNode("ConceptSurgeryTrain").widgets
            .filter((widget) => widget.name !== "concept_surgery_run").length"""
    )
    assert values == inputs
