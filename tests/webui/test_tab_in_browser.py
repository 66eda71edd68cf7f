"""The real tab in a real Gradio, opened and used in Chromium; the host around it is a fake.

GRADIO_PYTHONS names Pythons that have Gradio 3.41.2 or 4.40.0, with colons between them.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tools.browser import Browser, find_chromium

HERE = Path(__file__).parent
PYTHONS = [one for one in os.environ.get("GRADIO_PYTHONS", "").split(":") if one]
pytestmark = pytest.mark.skipif(not PYTHONS, reason="GRADIO_PYTHONS names no Python with Gradio")
TAG = "<img src=x onerror=window.harmed=1>"


@pytest.fixture(scope="module", params=PYTHONS, ids=lambda path: path.split("/")[-3])
def page(request, tmp_path_factory):
    """Address of the page, and its folder."""
    folder = tmp_path_factory.mktemp("page")
    kind = "forge" if "4." in request.param else "a1111"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [request.param, str(HERE / "page.py"), kind, str(folder / "host")],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
    try:
        url = ""
        while not url.startswith("http"):
            line = process.stdout.readline()
            assert line, (folder / "log").read_text("utf-8")[-3000:]
            url = line.strip()
        yield url.rstrip("/"), folder / "host"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def browser(page):
    executable = find_chromium()
    if executable is None:
        pytest.skip("there is no Chromium")
    with Browser(executable) as opened:
        opened.open(page[0])
        opened.wait_for("!!document.querySelector('#txt2img_prompt textarea')", 120)
        yield opened


def click(browser, what):
    browser.run(f"document.querySelector({what!r}).click()")


def open_tab(browser, title):
    browser.run(
        "[...document.querySelectorAll('.tab-nav button, button[role=tab]')]"
        f".find((b) => b.textContent.trim() === {title!r}).click()"
    )


def type_into(browser, name, text):
    browser.run(
        f"(() => {{ const box = document.querySelector('#{name} textarea, #{name} input');"
        "const kind = box.tagName === 'TEXTAREA' ? HTMLTextAreaElement : HTMLInputElement;"
        "Object.getOwnPropertyDescriptor(kind.prototype, 'value').set.call("
        f"box, {json.dumps(text)});"
        "box.dispatchEvent(new Event('input', {bubbles: true}));"
        "box.dispatchEvent(new Event('change', {bubbles: true}));"
        "box.dispatchEvent(new Event('blur', {bubbles: true})); })()"
    )


def said(browser, name, words, timeout=120):
    found = f"document.querySelector('#concept_surgery_{name}')?.textContent ?? ''"
    browser.wait_for(f"({found}).includes({words!r})", timeout)
    return browser.run(found)


def fill_in(browser, erase, **more):
    open_tab(browser, "Concept Surgery")
    given = {"steps": 3, "trajectories": 2, "captions": 40, "resolution": 64, "rank": 6, **more}
    type_into(browser, "concept_surgery_erase", erase)
    for name, value in given.items():
        type_into(browser, f"concept_surgery_{name}", str(value))
    time.sleep(0.5)  # until the page has taken it over


def test_a_training_from_the_first_click_to_the_picture(page, browser):
    browser.wait_for("!!document.querySelector('#concept_surgery_train')")
    open_tab(browser, "Concept Surgery")
    click(browser, "#concept_surgery_expert > button, #concept_surgery_expert .label-wrap")
    browser.wait_for("!!document.querySelector('#concept_surgery_steps input')")
    fill_in(browser, "cat => dog", keep="a tree")
    click(browser, "#concept_surgery_train")
    said(browser, "status", "ended well")
    report = said(browser, "report", "cat")
    assert "[object" not in report
    browser.wait_for("!!document.querySelector('#concept_surgery_curve svg polyline')")
    if folder := os.environ.get("SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"tab-{page[0][-4:]}.png")
    type_into(browser, "concept_surgery_filename", "no_cat")
    click(browser, "#concept_surgery_save")
    said(browser, "saved", "Saved as")
    tag = browser.run(
        "document.querySelector('#concept_surgery_tag').querySelector('textarea, input').value"
    )
    assert tag == "<lora:no_cat:1>"
    assert (page[1] / "models" / "Lora" / "no_cat.json").exists()
    type_into(browser, "concept_surgery_prompts", "a cat")
    click(browser, "#concept_surgery_draw")
    pictures = "document.querySelectorAll('#concept_surgery_gallery img').length"
    browser.wait_for(f"{pictures} >= 2", 60)


def test_what_is_wrong_is_said_and_nothing_typed_is_markup(page, browser):
    fill_in(browser, f"{TAG} => {TAG}")
    click(browser, "#concept_surgery_train")
    assert TAG in said(browser, "status", "are the same")
    fill_in(browser, TAG)
    click(browser, "#concept_surgery_train")
    said(browser, "status", "ended well")
    said(browser, "report", "img")
    assert browser.run("document.querySelectorAll('img[src=x]').length") == 0
    assert not browser.run("window.harmed")


def test_stop_cancel_and_a_page_that_was_reloaded(page, browser):
    fill_in(browser, "cat => dog", steps=3000, training_seed=5)
    click(browser, "#concept_surgery_train")
    said(browser, "status", "step ")
    browser.open(page[0])
    browser.wait_for("!!document.querySelector('#concept_surgery_watch')")
    open_tab(browser, "Concept Surgery")
    click(browser, "#concept_surgery_watch")
    said(browser, "status", "step ")
    click(browser, "#concept_surgery_stop")
    said(browser, "status", "ended well")
    said(browser, "report", "Stopped")
    click(browser, "#concept_surgery_expert > button, #concept_surgery_expert .label-wrap")
    browser.wait_for("!!document.querySelector('#concept_surgery_steps input')")
    fill_in(browser, "cat => dog", steps=3000, training_seed=6)
    click(browser, "#concept_surgery_train")
    said(browser, "status", "step ")
    click(browser, "#concept_surgery_cancel")
    said(browser, "status", "Nothing was kept")


def test_the_accordion_writes_and_is_filled_in_again(page, browser):
    open_tab(browser, "txt2img")
    choose = "#txt2img_concept_surgery_names"
    click(browser, "#txt2img_concept_surgery > button, #txt2img_concept_surgery .label-wrap")
    click(browser, "#txt2img_concept_surgery_refresh")
    type_into(browser, "txt2img_prompt", "a cat")
    type_into(browser, "info", "a cat\nConcept Surgery: no_cat, Concept Surgery strength: 0.5")
    click(browser, "#paste")
    browser.wait_for(f"document.querySelector('{choose}').textContent.includes('no_cat')")
    click(browser, "#txt2img_generate")
    info = "document.querySelector('#info textarea').value"
    browser.wait_for(f"{info}.startsWith('a cat\\nConcept Surgery: no_cat')")
    assert "Concept Surgery strength: 0.5" in browser.run(info)
    assert "lora" not in browser.run(info)


def asked(page, method, path, body=None, user="me:secret"):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{page[0]}/concept-surgery/v1/{path}", data, method=method)
    request.add_header("Content-Type", "application/json")
    if user:
        request.add_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_routes_answer_and_are_locked(page):
    for user in ("", "me:wrong", "you:secret"):
        assert asked(page, "GET", "jobs", user=user)[0] == 401
        assert asked(page, "POST", "apply", {"erasures": []}, user=user)[0] == 401
    fast = {"steps": 0, "trajectories": 0, "captions": 40, "resolution": 64}
    status, job = asked(page, "POST", "train", {"erase": "car", **fast})
    assert status == 200, job
    while job["state"] in ("waiting", "running"):
        status, job = asked(page, "GET", f"jobs/{job['id']}")
    assert job["state"] == "done", job
    status, kept = asked(page, "POST", "save", {"id": job["id"], "filename": "no_car"})
    assert status == 200 and kept["tag"] == "<lora:no_car:1>"
    assert "no_car" in asked(page, "GET", "erasures")[1]
    assert asked(page, "GET", "report?name=no_car")[1]["text"].startswith("Verdict")
    assert asked(page, "POST", "apply", {"erasures": ["no_car"]})[1]["erasures"] == ["no_car"]
    assert asked(page, "POST", "apply", {"erasures": []})[0] == 200
    status, wrong = asked(page, "POST", "train", {"erase": ""})
    assert status == 422 and wrong["detail"]["setting"] == "concepts"
    assert asked(page, "GET", "jobs/999")[0] == 404
    assert asked(page, "GET", "report?name=..%2F..%2Fx")[0] == 422
