"""The tab: what its buttons do. It is built with whichever Gradio is there, or with a fake one."""

from __future__ import annotations

import numpy as np
import pytest
from concept_surgery.erase_core import Erasure, ErasureFileError

from .test_adapters import queue_lock

FAST = {"captions": 8, "steps": 3, "trajectories": 2, "resolution": 64, "rank": 6}


def values(**given):
    """What the page sends, in its order: everything as it stands there."""
    from concept_surgery.webui import form, tab

    made = {name: None for name in form.INPUTS}
    for name, (_, default, _hint) in tab._EXPERT.items():
        made[name] = default[0] if isinstance(default, list) else default
    made |= {"erase": "cat => dog", "replace_with": "", "keep": "a tree", "negative_prompts": ""}
    made |= {"kind": "object", "preset": "balanced", "training_seed": 0, **FAST, **given}
    return [made[name] for name in form.INPUTS]


def test_every_input_of_the_form_is_on_the_tab(fake):
    from concept_surgery.webui import form, tab

    ((built, title, where),) = tab.on_ui_tabs()
    assert title == "Concept Surgery" and where == "concept_surgery" and built is not None
    assert set(tab._EXPERT) | set(form.MAIN) == set(form.INPUTS)


def test_train_follow_save_and_draw(fake):
    from concept_surgery.webui import tab

    fake.load()
    seen = list(tab.start(*values()))
    number, status, curve, pictures, chart, report = seen[-1]
    assert "ended well" in status and "<svg" in curve
    assert report.startswith("**") and "cat" in report
    assert any("left" in one[1] or "Reading" in one[1] for one in seen)
    assert seen[0][4] == "" and "nobody named" in chart and ">cat</text>" in chart
    tag, said = tab.save_job(number, "folder/no_cat")
    assert tag == "<lora:no_cat:1>" and "Saved as" in said
    path = fake.folder / "models" / "Lora" / "folder" / "no_cat.safetensors"
    assert Erasure.load(path).record["concepts"][0]["text"] == "cat"
    card = path.with_suffix(".json").read_text("utf-8")
    assert '"preferred weight": 1' in card and '"sd version": "SD1"' in card
    import networks

    assert networks.available_network_aliases["no_cat"].filename == str(path)
    gallery, sheet, tag, said = tab.draw_job(number, "folder/no_cat", "a cat\na tree")
    assert len(gallery) == 4 and gallery[0][1].startswith("before (erased): a cat")
    before, after = (picture.tobytes() for picture, _ in gallery[:2])
    kept = [picture.tobytes() for picture, _ in gallery[2:]]
    assert before != after and kept[0] == kept[1]
    width, height = gallery[0][0].size
    assert sheet.mode == "RGB" and sheet.width > 2 * width and sheet.height > 2 * height
    (left, top), (right, level), (at, below), _ = (where_is(sheet, one) for one, _ in gallery)
    assert left == at < right and top == level < below
    again = sheet.crop((right, below, right + width, below + height))
    assert again.tobytes() == kept[1]
    assert path.with_suffix(".preview.png").exists()
    assert len(list(path.parent.glob("*.safetensors"))) == 1
    assert not queue_lock().locked()


def where_is(sheet, picture):
    """Left and top of the first place on a sheet that looks like a picture; None for nowhere."""
    whole, part = (np.asarray(one.convert("RGB")).astype(int) for one in (sheet, picture))
    height, width = part.shape[:2]
    for top in range(whole.shape[0] - height + 1):
        for left in np.flatnonzero((whole[top, : 1 - width or None] == part[0, 0]).all(-1)):
            place = whole[top : top + height, left : left + width]
            if place.shape == part.shape and np.array_equal(place, part):
                whole[top : top + height, left : left + width] = -1
                return int(left), top
    return None


def test_names_are_suggested_and_nothing_of_the_host_is_changed(fake):
    from concept_surgery.webui import tab

    fake.load()
    before = fake.hashes()
    lines, neighbours, said = tab.suggest_job("cat => dog\nred apple", "object")
    assert [line.split(" ")[0] for line in lines.splitlines()] == ["cat", "red"]
    assert lines.splitlines()[0].endswith("=> dog") and "Look through them" in said
    assert "cat" not in neighbours.splitlines()
    assert fake.hashes() == before and not queue_lock().locked()
    for erase, kind, words in (("", "object", "Nothing to erase"), ("cat", "x", "kind")):
        assert words in tab.suggest_job(erase, kind)[2]


def test_the_chart_is_escaped_and_ends_where_it_ends(a1111):
    from concept_surgery.webui import shown

    a1111.load()
    from concept_surgery.webui import tab
    from concept_surgery.webui.jobs import JOBS

    name = "<script>alert(1)</script>" * 4
    last = list(tab.start(*values(erase=name, preset="instant", steps=0, trajectories=0)))[-1]
    assert last[4] == shown.chart(JOBS.get("").erasure.record)
    assert "<script>" not in last[4] and "&lt;script&gt;" in last[4]
    assert shown.chart(None) == ""


def test_what_cant_work_is_told_at_once_and_nothing_runs(a1111):
    from concept_surgery.webui import tab

    a1111.load()
    for given, words in (
        ({"erase": ""}, "Nothing to erase"),
        ({"keep": "a <lora:x:1> tree"}, "Leave the tag out"),
        ({"keep": "a [red:blue:0.5] tree"}, "changes while a picture is drawn"),
        ({"keep": "a tree AND a house"}, "joined by AND"),
        ({"training_seed": 0.5}, "whole number"),
        ({"erase": "<img src=x onerror=alert(1)> => <img src=x onerror=alert(1)>"}, "&lt;img"),
    ):
        (only,) = tab.start(*values(**given))
        assert words in only[1], only[1]
        assert "<img" not in only[1]
    assert not a1111.shared.state.jobs


def test_without_anything_trained_the_buttons_say_so(a1111):
    from concept_surgery.webui import tab

    a1111.load()
    assert "Nothing is being trained" in tab.stop_job("")
    assert "Nothing is being trained" in list(tab.follow_latest())[-1][1]
    assert "no training" in tab.save_job("7", "x")[1]
    assert "no training" in tab.draw_job("7", "x", "")[3]


@pytest.mark.parametrize("name", ["a:b", "../x", "none", "a<b", "a=b", "x/ADDAMS"])
def test_names_that_no_prompt_can_say_are_refused(a1111, name):
    from concept_surgery.webui import loras

    with pytest.raises(ErasureFileError):
        loras.refuse_unspeakable(name)
    loras.refuse_unspeakable("a folder/no cat, of mine.safetensors")


def test_stop_keeps_and_cancel_does_not(a1111):
    from concept_surgery.webui import tab
    from concept_surgery.webui.jobs import JOBS

    a1111.load()
    run = tab.start(*values(steps=400))
    for _ in run:
        job = JOBS.get("")
        if job.progress is not None and job.progress.step > 1:
            tab.stop_job(job.id)
            break
    last = list(run)[-1]
    assert "ended well" in last[1] and "tag" not in last[5][:5]
    assert job.erasure is not None and job.erasure.record["steps_done"] < 400
    before = a1111.hashes()
    run = tab.start(*values(steps=400, training_seed=1))
    for _ in run:
        job = JOBS.get("")
        if job.progress is not None:
            tab.cancel_job(job.id)
            break
    last = list(run)[-1]
    assert "Nothing was kept" in last[1] and last[5] == ""
    assert "nothing to save" in tab.save_job(job.id, "x")[1]
    assert a1111.hashes() == before and not queue_lock().locked()


def test_two_at_once_wait_for_each_other(a1111):
    from concept_surgery.webui.jobs import DONE, JOBS, WAITING

    a1111.load()
    given = {"erase": "cat", "preset": "instant", **FAST, "steps": 0, "trajectories": 0}
    with queue_lock():
        first = JOBS.start(given)
        second = JOBS.start({**given, "erase": "dog"})
        assert (first.state, second.state) == (WAITING, WAITING)
        assert JOBS.before(second) == 1
        second.cancel()
    assert first.wait(60) and second.wait(60)
    assert first.state == DONE and second.state == "cancelled"


def test_what_is_shown_is_escaped(a1111):
    from concept_surgery.webui import shown, tab
    from concept_surgery.webui.jobs import Job

    a1111.load()
    name = "<script>alert(1)</script>"
    last = list(tab.start(*values(erase=name, preset="instant", steps=0, trajectories=0)))[-1]
    assert "<script>" not in last[1] + last[2] + last[4] + last[5]
    job = Job(1, {})
    job.state, job.message = "failed", name
    assert "<script>" not in shown.status(job)


def test_durations_are_readable():
    from concept_surgery.webui.shown import duration

    assert [duration(s) for s in (0, 59.6, 61, 3700)] == [
        "0 s",
        "1 min 00 s",
        "1 min 01 s",
        "1 h 01 min",
    ]
