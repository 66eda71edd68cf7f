"""Training through the API on the model that the host has loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import surgery
from .comfy_side import PROMPTS, apart
from .test_files import SAME
from .webui_host import AnsweredWithError, rms

SAME_WEIGHTS = 0.01  # share of a change, between hosts
CAT = PROMPTS[0]


def _as_it_is(host) -> dict[str, Any]:
    state = host.get("/probe/state")
    return {"picture": host.draw(CAT), "weights": host.weights(), "state": state}


@pytest.fixture(scope="module")
def trained(host) -> dict[str, Any]:
    """One training, with what the host was before, during and after it."""
    before = {
        "picture": host.draw(CAT),
        "weights": host.weights(),
        "state": host.get("/probe/state"),
    }
    number = surgery.start(host)
    surgery.follow(host, number, lambda told: told["state"] == "running")
    during = host.get("/sdapi/v1/progress?skip_current_image=true")
    told = surgery.follow(host, number)
    assert told["state"] == "done", (told, host.text()[-3000:])
    after = {
        "picture": host.draw(CAT),
        "weights": host.weights(),
        "state": host.get("/probe/state"),
    }
    saved = surgery.save(host, number, "trained_here")
    return {
        "number": number,
        "before": before,
        "during": during,
        "after": after,
        "file": Path(saved["path"]),
        "saved": saved,
    }


def test_it_learns_what_comfyui_learns(host, trained, comfy):
    distance = apart(comfy.file, trained["file"])
    drawn = {text: host.draw(f"{text} {trained['saved']['tag']}") for text in PROMPTS}
    far = {text: rms(picture, comfy.pictures[1, text]) for text, picture in drawn.items()}
    print(f"weights {distance:.2%} apart, pictures {max(far.values()):.5f}")
    assert distance < SAME_WEIGHTS
    assert max(far.values()) < SAME, far


def test_the_loaded_model_is_as_it_was(trained):
    before, after = trained["before"], trained["after"]
    assert np.array_equal(after["picture"], before["picture"])
    assert after["weights"] == before["weights"]
    assert after["state"] == before["state"]


def test_the_hosts_own_progress_shows_it(trained):
    state = trained["during"]["state"]
    assert "Concept Surgery" in state["job"]
    assert state["sampling_steps"] > 0


def test_beside_the_file_lies_what_the_hosts_cards_show(host, trained):
    file = trained["file"]
    assert file.parent == host.loras
    card = json.loads(file.with_suffix(".json").read_text())
    assert "cat" in card["description"] and card["sd version"] == "SD1"
    assert card["preferred weight"] == 1
    assert "trained_here" in surgery.erasures(host)


def test_the_report_has_the_verdict_first(host, trained):
    told = surgery.report(host, trained["number"])
    assert "cat" in told["text"].splitlines()[0]
    assert told["numbers"]


def test_the_accordion_draws_what_the_tag_draws(host, trained):
    untouched = host.draw(CAT)
    tagged = host.draw(f"{CAT} {trained['saved']['tag']}")
    drawn, info = host.drawn(CAT, **surgery.accordion("trained_here"))
    assert np.array_equal(drawn, tagged)
    assert "Concept Surgery: trained_here" in info and "<lora" not in info
    assert np.array_equal(host.draw(CAT), untouched)
    nothing, info = host.drawn(CAT, **surgery.accordion("trained_here", strength=0))
    assert np.array_equal(nothing, untouched)
    assert "Concept Surgery" not in info
    half = host.draw(CAT, **surgery.accordion("trained_here", strength=0.5))
    assert rms(half, untouched) > SAME and rms(half, tagged) > SAME


def test_switched_on_by_the_api_it_acts_on_every_picture_until_it_is_off(host, trained):
    tagged = host.draw(f"{CAT} {trained['saved']['tag']}")
    host.post(f"{surgery.ROUTES}/apply", {"erasures": ["trained_here"]})
    try:
        drawn, info = host.drawn(CAT)
        assert np.array_equal(drawn, tagged) and "trained_here" in info
        named_twice = host.draw(f"{CAT} {trained['saved']['tag']}")
        assert np.array_equal(named_twice, tagged)
    finally:
        host.post(f"{surgery.ROUTES}/apply", {"erasures": []})
    assert np.array_equal(host.draw(CAT), trained["before"]["picture"])


def test_loras_of_the_last_prompt_are_taken_out_and_put_back(host, trained):
    tag = trained["saved"]["tag"]
    host.draw(f"{CAT} {tag}")
    merged = host.weights()
    number = surgery.train(host)
    file = surgery.save(host, number, "trained_again")["path"]
    assert apart(trained["file"], Path(file)) == 0
    assert host.weights() == merged
    assert np.array_equal(host.draw(CAT), trained["before"]["picture"])


def test_the_same_again_is_found_in_the_store(host, trained):
    number = surgery.train(host, stored_result="use if there")
    assert "Taken from the store" in surgery.report(host, number)["text"]


@pytest.mark.parametrize(
    ("values", "setting", "says"),
    [
        ({"erase": ""}, "concepts", "erase"),
        ({"erase": "cat => cat"}, "concepts", "cat"),
        ({"preset": "quick"}, "preset", "balanced"),
        ({"keep": "a dog <lora:trained_here:1>"}, "keep", "tag"),
        ({"steps": "many"}, "steps", "number"),
        ({"speed": 3}, "speed", "Unknown"),
    ],
)
def test_what_cant_work_is_refused_in_words(host, values, setting, says):
    with pytest.raises(AnsweredWithError) as refused:
        surgery.start(host, **values)
    assert refused.value.code == 422
    answer = refused.value.answer
    detail = answer.get("detail", answer)
    assert says in str(detail) and "Traceback" not in str(answer)
    if isinstance(detail, dict):
        assert detail["setting"]
