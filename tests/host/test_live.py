"""Runs as they go, on a real host: shown, stopped and kept, cancelled, and gone on with."""

from __future__ import annotations

import os
import re
import urllib.error
from pathlib import Path

import pytest
from concept_surgery.erase_core import Erasure, Meter, preset_settings
from concept_surgery.nodes.live import LiveRun, remember, runs_of, stop_runs
from concept_surgery.nodes.messages import all_shown
from concept_surgery.nodes.routes import asked_of

from tools import graphs
from tools.host import ComfyHost, GraphFailed

from .test_front_end import APART, HOSTILE, Markup
from .test_http import predictions

CHECKPOINT = "one-level.safetensors"
SHORT = {"steps": 8, "trajectories": 4, "resolution": 32, "captions": 8, "protection": 1.0}
SHORT |= {"templates": "a photo of a {}"}
# Each training takes some seconds, and on toys the core's tests show the same.
ALL = pytest.mark.skipif(not os.environ.get("HOST_CRASHES"), reason="set HOST_CRASHES=1")
INTERRUPTS = 20


class Watched:
    """A graph that trains, run to its end, with all that was sent meanwhile.

    Args:
        at: a text under a node, or which one, counted from 1.
        press: called once with the host when it shows.
    """

    def __init__(self, host: ComfyHost, at: str | int = "", press=None, filename="live", **values):
        self.host, self.runs, self.texts = host, [], []
        self._at, self._press, self.answers = at, press, []
        graph = graphs.loader(CHECKPOINT)
        graph |= graphs.train(**{"erase": "cat => dog", **SHORT, **values})
        graph |= graphs.save(filename=filename) | graphs.show("report", ("train", 2))
        self.prompt_id = host.queue(graph)
        self.entry = host.wait(self.prompt_id, 300, self._note)
        self.report = "".join(self.entry["outputs"].get("report", {}).get("text", ()))

    def _note(self, event):
        if event["type"] == "concept_surgery.run":
            self.runs.append(event["data"])
        if event["type"] == "progress_text":
            self.texts.append(event["data"]["text"])
            at, text = self._at, self.texts[-1]
            if self._press and (at == len(self.texts) if isinstance(at, int) else at in text):
                self.answers.append(self._press(self.host))
                self._press = None

    @property
    def states(self):
        return list(dict.fromkeys(run["state"] for run in self.runs))


def saved(host: ComfyHost, begins: str = "live") -> list[Path]:
    """The files that the graphs saved, in the order in which they did."""
    paths = host.models("loras").glob(f"{begins}*.safetensors")
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns)


def stop(host: ComfyHost, **which):
    return host.post("/concept_surgery/stop", {"client_id": host._client, **which})


@pytest.fixture(scope="module")
def stopped(server):
    """A run that was stopped while it trained, from its node."""

    def press(host):
        assert stop(host, client_id="somebody else") == {"stopping": 0}
        assert stop(host, node="another") == {"stopping": 0}
        return [stop(host, node="train"), stop(host, node="train")]

    server.free()
    return Watched(server, "Training, step 3 of", press, training_seed=21)


def test_who_stops_gets_what_was_learned_and_the_graph_goes_on(server, stopped):
    assert stopped.entry["status"]["status_str"] == "success"
    assert stopped.answers == [[{"stopping": 1}, {"stopping": 1}]]
    assert re.search(r"Stopped early, after [34] steps of 8", stopped.report)
    assert re.search(r"Stopped after [34] of 8 steps and kept", stopped.report)
    assert "Choose 'resume'" in stopped.report
    path = Path(re.search(r"It lies in (\S+\.safetensors)", stopped.report.replace(APART, ""))[1])
    kept = Erasure.load(path)
    assert ".stopped-" in path.name and not kept.record["complete"]
    assert Erasure.load(saved(server)[-1]).identity == kept.identity


def test_the_page_is_told_all_the_way(server, stopped):
    assert stopped.states == ["running", "stopped"]
    first, *_, last = stopped.runs
    assert first["node"] == "train" and first["prompt_id"] == stopped.prompt_id
    shares = [run["share"] for run in stopped.runs]
    assert shares == sorted(shares) and shares[-1] == 1
    assert any(run["stopping"] for run in stopped.runs if run["state"] == "running")
    assert {run["stage"].split(",")[0] for run in stopped.runs} >= {"Sampling states", "Training"}
    assert last["curve"][0][1] == 1 and len(last["curve"]) > 3
    # What came of it, in the words that the report begins with.
    assert first["verdict"] == "" and last["verdict"].splitlines()[0] in stopped.report
    assert "cat" in last["verdict"]
    kinds = {picture["kind"]: picture for picture in last["pictures"]}
    assert set(kinds) == {"erased", "kept", "drawn"} and kinds["erased"]["label"] == "cat"
    for picture in last["pictures"]:
        assert picture["now"].startswith("ffd8") and bytes.fromhex(picture["now"])
    # For who loads the page again, and for who is served out of the host's cache.
    (again,) = [
        run
        for run in server.get(f"/concept_surgery/runs?client_id={server._client}")["runs"]
        if run["prompt_id"] == stopped.prompt_id
    ]
    assert again == {**last, "pictures": again["pictures"]}
    (output,) = stopped.entry["outputs"]["train"]["concept_surgery"]
    assert output["state"] == "stopped" and output["pictures"] == last["pictures"]
    assert server.get("/concept_surgery/runs") == {"runs": []}


def test_nothing_stays_under_the_node(stopped):
    assert not stopped.texts[-1].startswith(("Training", "Checking", "Sampling"))


@ALL
def test_what_was_stopped_is_never_the_result_and_the_next_run_goes_on(server, stopped):
    server.free()
    more = Watched(server, training_seed=21)
    assert "Taken from the store" not in more.report and more.states == ["running", "done"]
    assert re.search(r"Went on from step [34] of an earlier run", more.report)
    assert "Stopped" not in more.report and not [t for t in more.texts if t.startswith("Sampling")]
    server.free()
    stored = Watched(server, training_seed=21)
    assert "Taken from the store" in stored.report and stored.states == ["running", "stored"]
    last = stored.runs[-1]
    assert last["note"].startswith("Taken from the store") and len(last["curve"]) > 8
    assert {picture["kind"] for picture in last["pictures"]} == {"erased", "kept", "drawn"}
    server.free()
    whole = Watched(server, training_seed=21, stored_result="train again")
    identities = [Erasure.load(path).identity for path in saved(server)]
    assert len(identities) == 4 and len(set(identities[1:])) == 1
    assert "Went on" not in whole.report


@ALL
def test_steps_are_added_and_a_mismatch_is_told_at_the_node(server, stopped):
    server.free()
    more = Watched(server, training_seed=21, steps=10, stored_result="resume")
    assert "Went on from step 8 of an earlier run" in more.report
    with pytest.raises(GraphFailed, match=r"seed \(21 there, 99 here\)"):
        graph = graphs.loader(CHECKPOINT) | graphs.show("report", ("train", 2))
        values = {**SHORT, "erase": "cat => dog", "training_seed": 99}
        server.run(graph | graphs.train(**values, stored_result="resume"))


@ALL
def test_who_cancels_leaves_a_state_and_no_text(server):
    server.free()
    cancelled = Watched(
        server, "Training, step 4 of", lambda host: host.interrupt(), training_seed=5
    )
    assert "execution_interrupted" in dict(cancelled.entry["status"]["messages"])
    assert cancelled.states == ["running", "cancelled"] and cancelled.texts[-1] == ""
    assert "Queue again to go on" in cancelled.runs[-1]["note"]
    assert stop(server) == {"stopping": 0}
    again = Watched(server, training_seed=5)
    assert re.search(r"Went on from step [34] of an earlier run", again.report)


@ALL
def test_who_stops_before_anything_is_learned_is_told(server):
    server.free()
    early = Watched(server, "Reading the prompts", stop, training_seed=6, captions=9)
    if early.entry["status"]["status_str"] == "success":  # all that it reads was read before
        assert "Stopped early, after 0 steps" in early.report
    else:
        failed = dict(early.entry["status"]["messages"])["execution_error"]
        assert "before anything was learned" in failed["exception_message"]
        assert early.states == ["running", "failed"] and early.texts[-1] == ""


@ALL
def test_interrupts_in_every_stage_leave_a_state_that_goes_on_to_the_same_end(server):
    server.free()
    whole = Watched(server, filename="all-whole", training_seed=30)
    stages = len(whole.texts)
    folder = server.work / "user" / "concept_surgery"
    untouched = predictions(server, "a cat")
    for number in range(INTERRUPTS):
        for kept in ("results", "unfinished"):
            for path in (folder / kept).glob("*"):
                path.unlink()
        server.free()
        place = 2 + number * (stages - 3) // INTERRUPTS
        hurt = Watched(server, place, lambda host: host.interrupt(), training_seed=30)
        assert "execution_error" not in dict(hurt.entry["status"]["messages"])
        again = Watched(server, filename=f"all-{number}", training_seed=30)
        assert again.entry["status"]["status_str"] == "success"
        assert len({Erasure.load(path).identity for path in saved(server, "all-")}) == 1
    assert predictions(server, "a cat") == untouched


# What a request may be


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        None,
        "train",
        {"node": "3"},
        {"client_id": 3},
        {"client_id": ""},
        {"prompt_id": ["a"]},
        {"client_id": "x" * 999},
        {"client_id": "a", "node": {}},
    ],
)
def test_a_request_that_names_no_run_is_refused(content):
    with pytest.raises(ValueError, match="Say which run"):
        asked_of(content)


def test_a_request_may_name_a_page_a_graph_or_a_node():
    assert asked_of({"client_id": "a", "node": 3, "else": 1}) == {"client_id": "a", "node": "3"}
    assert asked_of({"prompt_id": "a", "client_id": None}) == {"prompt_id": "a"}


def test_bad_requests_are_answered(server):
    for body in ({}, [], "x", {"node": "train"}):
        with pytest.raises((urllib.error.HTTPError, LookupError, OSError, RuntimeError)) as refused:
            server.post("/concept_surgery/stop", body)
        assert "400" in str(refused.value) or "Say which run" in str(refused.value)


class Nothing:
    """A previewer of a model whose latents nobody can show."""

    def picture(self, latent):
        return None


def live_run(node="3", client="page", prompt="graph", concepts="cat"):
    settings = preset_settings("balanced", concepts=concepts)
    return LiveRun(node, prompt, client, settings, Nothing(), Meter())


def test_a_stop_is_heard_by_the_runs_it_names_alone():
    runs = [live_run("3"), live_run("4"), live_run("3", "other page", "other graph")]
    for run in runs:
        remember(run)
    assert runs_of("page") == runs[:2] and runs_of(None, "other graph") == runs[2:]
    assert runs_of() == []
    assert stop_runs({"client_id": "page", "node": "4"}) == 1
    assert [run._meter.stop_asked for run in runs] == [False, True, False]
    assert stop_runs({"client_id": "page", "prompt_id": "other graph"}) == 0
    runs[1].end("done", "")
    assert stop_runs({"client_id": "page"}) == 1
    assert stop_runs({"client_id": "nobody"}) == 0


def test_nothing_of_a_hostile_run_is_markup():
    run = live_run(concepts=f"cat {HOSTILE[0]}")
    run.end("failed", " ".join(HOSTILE))
    sent = all_shown(run.snapshot())
    for text in (sent["note"], sent["erases"]):
        assert Markup(text).other == []
    assert sent["note"].replace(APART, "") == " ".join(HOSTILE)


def test_an_error_at_the_node_ends_its_run():
    run = live_run()
    with pytest.raises(RuntimeError), run:
        assert run.is_running
        raise RuntimeError("no")
    assert not run.is_running and run.snapshot()["state"] == "failed"
