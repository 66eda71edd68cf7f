"""The tab and the accordion in a real browser."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tools.browser import Browser, find_chromium

from . import surgery
from .comfy_side import TRAINING
from .page import Page

ID = "#concept_surgery"
NAMES = ("erase", "replace_with", "keep", "training_seed", "resolution", "captions")
NAMES += ("steps", "trajectories")
SHOTS = os.environ.get("WEBUI_SCREENSHOTS")


@pytest.fixture(scope="module")
def page(host) -> Iterator[Page]:
    """The page, opened once."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium; the variable CHROMIUM names one")
    with Browser(chromium) as browser:
        page = Page(browser, host.url)
        page.open()
        yield page


def shoot(page: Page, name: str) -> None:
    """Keep a picture of the page where WEBUI_SCREENSHOTS says so."""
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.browser.screenshot(Path(SHOTS) / f"{name}.png")


def fill_in(page: Page, **values: object) -> None:
    """The values of the comparison with ComfyUI, with some changed."""
    given = {**TRAINING, **values}
    page.tab("Concept Surgery")
    for name in NAMES:
        if name in given:
            page.type(f"{ID}_{name}", given[name])


def test_a_person_trains_saves_and_applies_with_the_mouse(host, page):
    picture, weights = host.draw("a photo of a cat"), host.weights()
    fill_in(page, training_seed=21)
    page.click(f"{ID}_train")
    page.wait_for_text(f"{ID}_status", "Training")
    page.wait_for_text(f"{ID}_status", "left", 1500)  # language is read before
    shoot(page, "tab-training")
    page.wait_for_text(f"{ID}_status", "ended well")
    report = page.text(f"{ID}_report")
    assert "cat" in report and len(report) > 200
    page.type(f"{ID}_filename", "from_the_tab")
    page.click(f"{ID}_save")
    page.wait_for_text(f"{ID}_saved", "from_the_tab", 60)
    assert page.value(f"{ID}_tag") == "<lora:from_the_tab:1>"
    shoot(page, "tab-report")
    assert (host.loras / "from_the_tab.json").exists()
    assert np.array_equal(host.draw("a photo of a cat"), picture)
    assert host.weights() == weights
    draw_with_the_accordion(host, page)
    assert host.weights() != weights  # the LoRA of the last prompt is in it, as the host has it
    assert np.array_equal(host.draw("a photo of a cat"), picture)
    assert not [c for c in page.browser.complaints if "concept" in c.lower()]


def draw_with_the_accordion(host, page: Page) -> None:
    page.tab("txt2img")
    page.type("#txt2img_prompt", "a photo of a cat")
    for name, value in (("steps", 12), ("width", 64), ("height", 64), ("cfg_scale", 5)):
        page.type(f"#txt2img_{name}", value)
    page.type("#txt2img_seed", 7)
    page.unfold("#txt2img_concept_surgery")
    page.click("#txt2img_concept_surgery_refresh")
    page.browser.run("new Promise((r) => setTimeout(() => r(true), 2000))")
    page.choose("#txt2img_concept_surgery_names", "from_the_tab")
    shoot(page, "accordion")
    page.click("#txt2img_generate")
    said = page.wait_for_text("#html_info_txt2img", "Concept Surgery", 300)
    assert "from_the_tab" in said
    assert "<lora" not in said


def test_the_page_can_be_reloaded_while_it_trains(host, page):
    fill_in(page, training_seed=22)
    page.click(f"{ID}_train")
    page.wait_for_text(f"{ID}_status", "Training", 60)
    page.reload()
    page.tab("Concept Surgery")
    page.click(f"{ID}_watch")
    page.wait_for_text(f"{ID}_status", "ended well")
    assert "cat" in page.text(f"{ID}_report")


def test_cancel_and_wrong_values_say_so_in_a_sentence(host, page):
    fill_in(page, training_seed=23)
    page.click(f"{ID}_train")
    page.wait_for_text(f"{ID}_status", "Training", 60)
    page.click(f"{ID}_cancel")
    page.wait_for_text(f"{ID}_status", "Cancelled", 120)
    fill_in(page, erase="")
    page.click(f"{ID}_train")
    page.wait_for_text(f"{ID}_status", "erase", 60)
    assert surgery.look(host, "latest")["state"] == "cancelled"


def test_names_the_chart_and_the_sheet_are_shown(host, page):
    fill_in(page, training_seed=24, captions=16, steps=30, trajectories=4)
    page.click(f"{ID}_train")
    page.wait_for_text(f"{ID}_status", "ended well", 1500)
    assert "nobody named" in page.text(f"{ID}_chart")
    page.type(f"{ID}_filename", "on_a_sheet")
    page.type(f"{ID}_prompts", "a photo of a cat\na photo of a dog")
    page.click(f"{ID}_draw")
    page.browser.wait_for(f"!!cs.find('{ID}_sheet img')", 600)
    assert (host.loras / "on_a_sheet.preview.png").exists()
    page.unfold(f"{ID}_names")
    page.click(f"{ID}_suggest")
    page.wait_for_text(f"{ID}_found", "Look through", 600)
    assert page.value(f"{ID}_lines").startswith("cat")
    assert page.value(f"{ID}_neighbours")
    shoot(page, "tab-result")


def test_after_the_hosts_reload_ui_everything_is_there_once(host, page):
    number = surgery.train(host, **surgery.SHORT)
    surgery.save(host, number, "before_the_reload")
    state, picture = host.get("/probe/state"), host.draw("a photo of a cat")
    starts = host.text().count("Startup time")
    page.click("#settings_restart_gradio")
    deadline = time.monotonic() + 600
    while host.text().count("Startup time") == starts:
        assert time.monotonic() < deadline, host.text()[-2000:]
        time.sleep(1)
    page.open()
    for css in (f"{ID}_train", "#txt2img_concept_surgery", "#img2img_concept_surgery"):
        assert page.browser.run(f"cs.root().querySelectorAll('{css}').length") == 1, css
    assert host.get("/probe/state") == state
    assert np.array_equal(host.draw("a photo of a cat"), picture)
    drawn, info = host.drawn("a photo of a cat", **surgery.accordion("before_the_reload"))
    assert not np.array_equal(drawn, picture) and info.count("before_the_reload") == 1
    assert surgery.look(host, number)["state"] == "done"
