"""Texts of files and workflows in the front end: they read as they are and nothing of them runs."""

from __future__ import annotations

import ast
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from concept_surgery.erase_core import Erasure, erase, preset_settings
from concept_surgery.nodes.messages import preview, shown, warn
from hypothesis import given
from hypothesis import strategies as st

from tools import graphs
from tools.browser import Browser, BrowserError, find_chromium

from ..core.toy import ToyDenoiser

NODES = Path(__file__).resolve().parents[2] / "nodes"
APART = "\N{WORD JOINER}"
TAG = "<img src=x onerror='window.harmed=1'>"
HOSTILE = (
    TAG,
    "<svg/onload=window.harmed=1>",
    "<!--",
    "</span><script>window.harmed=1</script>",
    "&lt;b&gt;",
    "&#60;b&#62;",
    "[[label|https://elsewhere.example/]]",
    "[[[label|https://elsewhere.example/]]]",
    "__LNK0__",
    "http://elsewhere.example/?a=1&b=2",
    "FTP://elsewhere.example",
    "WWW.elsewhere.example",
    "![p](http://elsewhere.example/p.png)",
    "[t](javascript:window.harmed=1)",
    "[a][b] [b]: //elsewhere.example",
)
# What front ends 1.32, 1.49 and 1.58 look for in a text under a node, and Markdown for links.
LOOKED_FOR = (
    r"\[\[([^|\]]+)\|([^\]]+)\]\]",
    r"__LNK(\d+)__",
    r"(?i)\b(https?|ftp|file)://",
    r"(?i)\bwww\.",
    r"\]\(",
    r"\]\[",
    r"\]:",
)


class Markup(HTMLParser):
    """The text that HTML leaves, and whatever else is in it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.other = "", []
        self.feed(html)
        self.close()

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.other.append(tag)

    handle_endtag = handle_comment = handle_decl = handle_pi = unknown_decl = lambda self, data: (
        self.other.append(data)
    )


def reads_the_same(text: str) -> None:
    """None of it is markup, and without the characters that nobody sees it is the same."""
    safe = shown(text)
    markup = Markup(safe)
    assert (markup.text, markup.other) == (safe, [])
    assert not [pattern for pattern in LOOKED_FOR if re.search(pattern, safe)]
    assert safe.replace(APART, "") == text
    assert shown(safe) == safe


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_of_a_hostile_text_is_markup(text):
    reads_the_same(text)
    reads_the_same(f"The erasure of {text!r} was made on {text}, {text}{text}")


@given(st.lists(st.sampled_from([*"<>&[]|()_:/!;.#x", "www", "http", "LNK0", "lt", "b "])))
def test_nor_of_whatever_is_put_together(parts):
    reads_the_same("".join(parts))


@pytest.mark.parametrize(
    "text", ["cat => dog", "R & B, AT & T", "a < b", "[x]", "猫 <3 🐈‍⬛", "a_b"]
)
def test_an_innocent_text_stays_as_it_is(text):
    assert shown(text).replace(APART, "") == text
    if "<3" not in text:
        assert shown(text) == text


@pytest.mark.parametrize("bad", ["\x1b[2J", "\ud800", "\u202e", "\x00", "\r"])
def test_what_cannot_be_printed_or_sent_is_replaced(bad, caplog):
    text = shown(f"a {bad} b\nc\td")
    text.encode("utf-8")
    assert bad not in text and "\N{REPLACEMENT CHARACTER}" in text and text.endswith("b\nc\td")
    warn(f"one {bad}\n[ERROR] two", None)
    (line,) = caplog.messages
    assert bad not in line and "\n" not in line


def test_every_text_goes_through_that_place():
    """What a node sends, previews or reports is made safe, and only messages.py sends."""
    for path in NODES.glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        safe = set()
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if name == "shown":
                safe |= {id(argument) for argument in call.args}
            if name in ("send_progress_text", "send_sync", "PreviewText"):
                assert path.name == "messages.py", f"{path.name} sends by itself"
                assert getattr(call.args[0].func, "id", "") == "shown"
            if name == "report_text":
                assert id(call) in safe, f"{path.name} gives a report out as it is"
    assert preview(TAG).as_dict() == {"text": (shown(TAG),)}


@pytest.fixture(scope="module")
def browser(server):
    """The host's own front end, open in a Chromium."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium found: install one, or name it in the variable CHROMIUM")
    with Browser(executable) as browser:
        browser.open(server.url)
        browser.wait_for("!!window.app?.graph && !!window.LiteGraph")
        browser.wait_for("'ConceptSurgeryApply' in LiteGraph.registered_node_types")
        yield browser


@pytest.fixture(scope="module")
def hostile_file(server) -> str:
    """An erasure in the host's LoRA folder, made elsewhere, of something that is a script."""
    values = {"captions": 40, "trajectories": 0, "steps": 0, "resolution": 32}
    last = erase(preset_settings("instant", concepts="cat", **values), ToyDenoiser())
    record = copy.deepcopy(dict(last.record))
    record["concepts"][0]["text"] = " ".join(HOSTILE)
    record["base"]["name"] = f"another {TAG}"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    basis = torch.linalg.qr(torch.randn(768, last.rank))[0]
    erasure = Erasure({name: basis}, {name: torch.zeros(320, basis.shape[1])}, record)
    erasure.save(server.models("loras") / "hostile.safetensors")
    return "hostile.safetensors"


def run_in_front_end(browser: Browser, graph: graphs.Graph) -> None:
    """Load a graph and queue it, as a person would with the mouse, until it has ended."""
    browser.run(
        """new Promise(async (ended) => {
            window.harmed = 0
            const api = app.api
            for (const kind of ["execution_success", "execution_error"])
                api.addEventListener(kind, (event) => ended(event.type), { once: true })
            app.loadApiJson(GRAPH, "hostile")
            await new Promise((drawn) => setTimeout(drawn, 1500))
            if (!(await app.queuePrompt(0, 1))) ended("refused")
        })""".replace("GRAPH", json.dumps(graph))
    )


def test_a_hostile_erasure_runs_no_script(server, browser, hostile_file):
    graph = graphs.loader("one-level.safetensors", "1") | graphs.load("2", filename=hostile_file)
    graph |= graphs.apply("3", model=("1", 0), erasure=("2", 0), clip=("1", 1))
    graph |= graphs.prompt("4", "a cat", clip=("1", 1))
    graph |= graphs.prediction("5", model=("3", 0), conditioning=("4", 0))
    graph |= graphs.show("6", ("2", 1))
    run_in_front_end(browser, graph)
    texts = "[...document.querySelectorAll('span, textarea')].map((e) => e.value ?? e.innerText)"
    # The last warning under the node, and the report in the host's own node for texts.
    for part_of_it in ("made with another text encoder", "forward-equivalents"):
        text = browser.wait_for(f"{texts}.find((text) => text.includes({part_of_it!r}))", 30)
        assert all(part in text.replace(APART, "") for part in HOSTILE), text
    assert browser.run("document.querySelectorAll('a[href*=elsewhere], img[src=x]').length") == 0
    assert not browser.run("window.harmed")


def test_the_reports_node_shows_its_verdict_and_chart_and_runs_no_script(
    server, browser, hostile_file
):
    graph = graphs.load("2", filename=hostile_file) | graphs.report("3", erasure=("2", 0))
    graph |= graphs.show("4", ("3", 0)) | graphs.show("5", ("3", 1))
    run_in_front_end(browser, graph)
    node = "app.graph.getNodeById(3)"
    browser.wait_for(f"{node}.imgs?.length === 1 && {node}.imgs[0].naturalWidth === 1024", 30)
    texts = "[...document.querySelectorAll('span, textarea')].map((e) => e.value ?? e.innerText)"
    for part in ("judged by the words alone", "## What stays", '"schema": 1'):
        browser.wait_for(f"{texts}.find((text) => text.includes({part!r}))", 30)
    assert browser.run("document.querySelectorAll('a[href*=elsewhere], img[src=x]').length") == 0
    # As Markdown, where the host's node for texts can show it so.
    browser.run("""(() => {
        const shown = app.graph.getNodeById(4).widgets.find((w) => w.name === "previewMode")
        if (shown) { shown.value = true; shown.callback?.(true) }
    })()""")
    assert browser.run("document.querySelectorAll('a[href*=elsewhere], img[src=x]').length") == 0
    assert not browser.run("window.harmed")


def test_a_hostile_error_runs_no_script(server, browser, hostile_file):
    graph = graphs.load("2", filename=hostile_file)
    graph |= graphs.take_out("3", concepts=f"dog {TAG}", erasure=("2", 0))
    graph |= graphs.show("4", ("3", 1))
    run_in_front_end(browser, graph)
    said = "document.body.innerText"
    # Newer front ends show the words themselves only when asked.
    details = "[...document.querySelectorAll('button')].find((e) => e.innerText == 'View details')"
    browser.wait_for(f"({details}?.click(), {said}.includes('not among what this erasure'))", 30)
    assert TAG in browser.run(said)
    assert browser.run("document.querySelectorAll('img[src=x]').length") == 0
    assert not browser.run("window.harmed")


def test_the_browser_says_what_failed_in_the_page(browser):
    with pytest.raises(BrowserError, match="no such thing"):
        browser.run("(() => { throw new Error('no such thing') })()")
