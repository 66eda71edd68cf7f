"""Interrupts, kills, other users and other models: nothing is changed, nothing is lost."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from concept_surgery.erase_core import Erasure

from . import surgery
from .comfy_side import PROMPTS, apart
from .conftest import new_host
from .models import EMOJI, OTHER

INTERRUPTS = int(os.environ.get("WEBUI_INTERRUPTS", "20"))
CAT = PROMPTS[0]


@pytest.fixture(scope="module")
def known(host):
    """The host before any trouble, and a file trained without any."""
    picture, weights, state = host.draw(CAT), host.weights(), host.get("/probe/state")
    began = time.monotonic()
    number = surgery.train(host)
    seconds = time.monotonic() - began
    file = Path(surgery.save(host, number, "known")["path"])
    return {
        "picture": picture,
        "weights": weights,
        "state": state,
        "seconds": seconds,
        "file": file,
    }


def as_it_was(host, known) -> None:
    """Nothing of the host is changed."""
    assert np.array_equal(host.draw(CAT), known["picture"])
    assert host.weights() == known["weights"]
    assert host.get("/probe/state") == known["state"]


def test_interrupts_at_every_stage_change_nothing(host, known):
    began = time.monotonic()
    surgery.train(host)  # language is in its store now
    seconds = time.monotonic() - began
    stages, ends = set(), []
    for turn in range(INTERRUPTS):
        number = surgery.start(host)
        time.sleep(seconds * (turn + random.random()) / INTERRUPTS)
        told = surgery.look(host, number)
        stages.add(told.get("stage"))
        host.post("/sdapi/v1/interrupt")
        told = surgery.follow(host, number)
        ends.append(told["state"])
        if told["state"] == "cancelled":
            assert "Interrupted" in told["message"] and told["saved"] is None
        if turn % 5 == 4:
            as_it_was(host, known)
    print(f"{ends.count('cancelled')} of {INTERRUPTS} interrupted, in {sorted(map(str, stages))}")
    assert set(ends) <= {"cancelled", "done"}
    assert ends.count("cancelled") >= INTERRUPTS // 2 and len(stages) > 2
    as_it_was(host, known)
    file = surgery.save(host, surgery.train(host), "after_interrupts")["path"]
    assert apart(known["file"], Path(file)) == 0


def test_cancel_keeps_nothing_and_stop_keeps_what_was_learned(host, known):
    stored = set((host.work / "concept_surgery" / "results").glob("*"))
    thorough = {"preset": "thorough", "training_seed": 11}
    number = surgery.start(host, **thorough)
    surgery.follow(host, number, lambda told: (told.get("step") or 0) >= 2)
    surgery.stop(host, number, keep=False)
    told = surgery.follow(host, number, timeout=60)
    assert told["state"] == "cancelled" and "Cancelled" in told["message"]
    assert set((host.work / "concept_surgery" / "results").glob("*")) == stored
    number = surgery.start(host, **thorough)
    surgery.follow(host, number, lambda told: (told.get("step") or 0) >= 3)
    surgery.stop(host, number)
    told = surgery.follow(host, number)
    assert told["state"] == "done" and told["step"] < told["steps"]
    erasure = Erasure.load(Path(surgery.save(host, number, "stopped")["path"]))
    assert erasure.record["concepts"]
    as_it_was(host, known)


def test_a_second_user_waits_and_both_get_what_they_asked_for(host, known):
    first, second = surgery.start(host), surgery.start(host, training_seed=8)
    time.sleep(0.5)
    assert surgery.look(host, second)["before"] == 1
    picture = {}
    drawing = threading.Thread(target=lambda: picture.update(drawn=host.draw(CAT)))
    drawing.start()
    ends = [surgery.follow(host, number)["state"] for number in (first, second)]
    drawing.join(600)
    assert ends == ["done", "done"]
    assert np.array_equal(picture["drawn"], known["picture"])
    file = surgery.save(host, first, "of_the_first")["path"]
    assert apart(known["file"], Path(file)) == 0
    as_it_was(host, known)


def test_a_model_switched_in_while_it_trains_is_refused_or_comes_after(host, known):
    number = surgery.start(host)
    surgery.follow(host, number, lambda told: told["state"] == "running")
    switch = host.background("/sdapi/v1/options", {"sd_model_checkpoint": f"{OTHER}.safetensors"})
    told = surgery.follow(host, number)
    switch.wait()
    try:
        if told["state"] == "done":
            path = Path(surgery.save(host, number, "of_the_right_one")["path"])
            assert apart(known["file"], path) == 0
            assert Erasure.load(path).record["base"]["name"] == f"{EMOJI}.safetensors"
        else:
            assert told["state"] == "failed" and "Another model" in told["message"]
        host.draw(CAT)
        assert host.get("/probe/state")["checkpoint"] == f"{OTHER}.safetensors"
        another = surgery.train(host)
        path = Path(surgery.save(host, another, "of_the_other")["path"])
        assert Erasure.load(path).record["base"]["name"] == f"{OTHER}.safetensors"
        assert apart(known["file"], path) > 0.1
    finally:
        host.post("/sdapi/v1/options", {"sd_model_checkpoint": f"{EMOJI}.safetensors"})
    as_it_was(host, known)


def test_a_kill_while_saving_leaves_whole_files_and_the_result_is_found_again(tmp_path, known):
    work = tmp_path / "killed"
    with new_host(work, browser=False) as host:
        host.draw(CAT)
        number = surgery.train(host)
        whole = threading.Thread(target=_save_many, args=(host, number), daemon=True)
        whole.start()
        while len(list(host.loras.glob("many_*.safetensors"))) < 3:
            time.sleep(0.01)
        time.sleep(random.random() * 0.2)
        host.kill()
        files = list(host.loras.glob("*.safetensors"))
        assert len(files) >= 3
        for file in files:
            assert Erasure.load(file).record["concepts"]
    with new_host(work, browser=False) as host:
        host.draw(CAT)
        again = surgery.train(host, stored_result="use only")
        assert "Taken from the store" in surgery.report(host, again)["text"]
        surgery.save(host, again, "after_the_kill")
        assert {file.stem for file in files} < set(surgery.erasures(host))
        assert not [p for p in host.loras.iterdir() if p.name.startswith(".")]


def _save_many(host, number: str) -> None:
    try:
        for turn in range(1000):
            surgery.save(host, number, f"many_{turn}")
    except Exception:  # the host was killed
        pass
