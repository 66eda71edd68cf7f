"""The routes, without a web server: as functions, and their answers to what is wrong."""

from __future__ import annotations

import pytest
from concept_surgery.erase_core import ErasureFileError, SettingsError

from .conftest import in_all_only
from .test_tab import FAST

ASKED = {"erase": "cat => dog", "keep": ["a tree"], **FAST}


def test_train_watch_save_list_report_apply(fake):
    from concept_surgery.webui import api
    from concept_surgery.webui.jobs import JOBS, NoSuchJobError

    fake.load()
    number = api.train(ASKED)["id"]
    assert JOBS.get(number).wait(60)
    told = api.job("latest")
    assert told["state"] == "done" and told["share"] == 1.0 and told["curve"]
    assert [one["id"] for one in api.jobs()] == [number]
    kept = api.save({"id": number, "filename": "no_cat"})
    assert kept["tag"] == "<lora:no_cat:1>" and api.erasures() == ["no_cat"]
    assert api.report(number=number)["numbers"] == api.report(name="no_cat")["numbers"]
    assert api.report(name="no_cat")["text"].startswith("Verdict")
    assert api.applied() == {"erasures": [], "strength": 1.0}
    api.apply({"erasures": ["no_cat"], "strength": 0.5})
    from .test_accordion import drawn

    p, done = drawn(fake, [])
    assert "Concept Surgery: no_cat, Concept Surgery strength: 0.5" in done.info
    assert api.apply({"erasures": []})["erasures"] == []
    p, done = drawn(fake, [])
    assert "Concept" not in done.info
    with pytest.raises(ErasureFileError):
        api.apply({"erasures": ["gone"]})
    with pytest.raises(NoSuchJobError):
        api.job("99")
    with pytest.raises(SettingsError, match="Unknown input 'nonsense'"):
        api.train({**ASKED, "nonsense": 1})


@in_all_only
def test_stop_and_cancel(a1111):
    from concept_surgery.webui import api
    from concept_surgery.webui.jobs import JOBS

    a1111.load()
    for keep, state in ((True, "done"), (False, "cancelled")):
        number = api.train({**ASKED, "steps": 400, "training_seed": int(keep)})["id"]
        job = JOBS.get(number)
        while job.progress is None or (keep and job.progress.step < 2):
            assert not job.wait(0.02)
        assert api.stop({"id": number, "keep": keep})["stopping"]
        assert job.wait(60) and job.state == state
    with pytest.raises(ErasureFileError, match="nothing to save"):
        api.save({"id": number, "filename": "x"})


def test_the_hosts_interrupt_ends_it(a1111):
    from concept_surgery.webui import api
    from concept_surgery.webui.jobs import JOBS

    a1111.load()
    job = JOBS.get(api.train({**ASKED, "steps": 400})["id"])
    while job.progress is None:
        assert not job.wait(0.02)
    a1111.shared.state.interrupt()
    assert job.wait(60) and job.state == "cancelled" and "as it was" in job.message
