"""A run that ended before its time goes on, and ends as if it had never been interrupted."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from concept_surgery.erase_core import (
    Meter,
    NothingLearnedError,
    NothingToResumeError,
    erase,
    preset_settings,
    report_text,
)
from concept_surgery.erase_core.artefact.unfinished import Part, UnfinishedStore
from concept_surgery.erase_core.files import disk
from concept_surgery.erase_core.run import journal, training
from concept_surgery.erase_core.run.journal import Journal
from safetensors import safe_open

from .toy import ToyDenoiser

SMALL = {"resolution": 32, "captions": 40, "trajectories": 6, "sampling_steps": 4, "steps": 12}
# HOST_CRASHES=1 interrupts everywhere.
PLACES = 20 if os.environ.get("HOST_CRASHES") else 4
LANGUAGE = {}  # what was read of it, which takes longer than all the rest
FORMS = {"hard": {}, "soft": {"form": "soft", "stop_below": 0.01, "keep": ("a tree",)}}


class Pressed(BaseException):
    """The host's cancel button."""


def run(parts=None, results=None, reuse="use if there", cancel_at=None, stop_at=None, **values):
    """An erasure and its meter.

    Args:
        cancel_at: the report, counted from 0, at which the run is cancelled.
        stop_at: a stage that it is stopped in.
    """
    preset = values.pop("preset", "balanced")
    settings = preset_settings(preset, **{"concepts": "cat => dog", **SMALL, **values})
    seen = []

    def report(progress):
        if stop_at and progress.stage.startswith(stop_at):
            meter.stop()
        seen.append(progress.stage)
        if len(seen) - 1 == cancel_at:
            raise Pressed

    meter = Meter(report)
    meter.seen = seen
    toy = ToyDenoiser("cross-attention" if settings.form == "soft" else "key-value")
    language = {} if (stop_at or "").startswith("Reading") else LANGUAGE
    erasure = erase(settings, toy, language, meter, results, reuse, parts)
    return erasure, meter


@pytest.fixture(scope="module", autouse=True)
def language_is_read():
    """So that all runs of a form report alike."""
    for values in FORMS.values():
        run(**values, steps=1)


def told(erasure):
    """All that a record says but the time that it took."""
    return {k: v for k, v in erasure.record.items() if k not in ("created", "seconds")}


def cancelled(parts, place, **values):
    with pytest.raises(Pressed):
        run(parts, cancel_at=place, **values)


@pytest.mark.parametrize("form", FORMS)
def test_who_is_interrupted_anywhere_goes_on_to_the_same_bit(form, tmp_path):
    whole, meter = run(**FORMS[form])
    stages = len(meter.seen)
    for place in range(3, stages, (stages - 4) // PLACES):
        parts = UnfinishedStore(tmp_path / str(place))
        cancelled(parts, place, **FORMS[form])
        again, meter = run(parts, **FORMS[form])
        assert again.identity == whole.identity and told(again) == told(whole)
        if meter.resumed_at is not None:
            assert len(meter.seen) < stages - place / 2
    assert place > stages * 0.8


class OtherOrder(ToyDenoiser):
    """Lists its matrices from the last to the first, as a host may in another process."""

    @property
    def ways(self):
        return {way: list(reversed(names)) for way, names in super().ways.items()}

    def matrices(self):
        return dict(reversed(super().matrices().items()))


@pytest.mark.parametrize("form", FORMS)
def test_a_host_that_lists_its_matrices_in_another_order_goes_on_as_well(form, monkeypatch):
    whole, meter = run(**FORMS[form])
    parts = {}
    cancelled(parts, meter.seen.index("Training, step 8 of 12"), **FORMS[form])
    monkeypatch.setitem(globals(), "ToyDenoiser", OtherOrder)
    again, meter = run(parts, **FORMS[form])
    assert meter.resumed_at == 7 and len(whole.factors) > 1
    assert list(again.factors) != list(whole.factors)
    for name, factor in whole.factors.items():
        change = factor @ whole.bases[name].T
        apart = again.factors[name] @ again.bases[name].T - change
        assert float(apart.norm() / change.norm()) < 1e-5, name


def test_the_trial_and_what_moved_are_not_done_twice(monkeypatch):
    monkeypatch.setattr(training, "AIM", 2.0)
    monkeypatch.setattr(training, "LEAST_GAIN", -9.0)
    values = {"steps": None, "trajectories": None}
    whole, meter = run(**values)
    assert whole.record["training"] in ("trained", "worse")
    place = next(i for i, stage in enumerate(meter.seen) if stage.startswith("Training, step 3 "))
    parts = {}
    cancelled(parts, place, **values)
    again, meter = run(parts, **values)
    assert again.identity == whole.identity and told(again) == told(whole)
    assert meter.resumed_at == 2
    assert not [s for s in meter.seen if s.startswith(("Trying", "Sampling", "Checking the grad"))]


def test_interrupted_again_and_again_it_ends_the_same():
    whole, meter = run()
    parts = {}
    for more in range(8):
        try:
            again, _ = run(parts, cancel_at=10 + 7 * more)
            break
        except Pressed:
            continue
    assert again.identity == whole.identity and told(again) == told(whole)


def test_what_is_kept_on_the_way_is_enough_for_who_is_killed(monkeypatch, tmp_path):
    """Nothing is written at the end of a process that is killed."""
    monkeypatch.setattr(journal, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(journal, "WRITING_SHARE", 1.0)
    whole, meter = run()
    place = meter.seen.index("Training, step 8 of 12")
    write, parts = Journal.write, UnfinishedStore(tmp_path)
    monkeypatch.setattr(Journal, "__exit__", lambda self, *error: None)
    cancelled(parts, place + 1)
    monkeypatch.undo()
    assert write is Journal.write
    again, meter = run(parts)
    assert meter.resumed_at == 7 and again.identity == whole.identity


STAGES = (
    "Sampling states",
    "Sampling states to check on",
    "Choosing the protection",
    "Checking the gradient",
    "Training, step 1 ",
    "Training, step 5 ",
    "Checking what must stay",
)


@pytest.mark.parametrize("stage", STAGES)
def test_who_stops_keeps_what_was_learned_and_may_go_on(stage):
    whole, _ = run()
    results, parts = {}, {}
    kept, meter = run(parts, results, stop_at=stage)
    record = kept.record
    late = stage == "Checking what must stay"
    done = {"Training, step 1 ": 1, "Training, step 5 ": 5}.get(stage, 12 if late else 0)
    assert record["steps_done"] == done
    assert record["complete"] is late and record["stopped_early"] is not late
    assert kept.factors and any(factor.any() for factor in kept.factors.values())
    if late:
        assert kept.identity == whole.identity
        return
    assert meter.resumable is bool(parts) is (stage != "Sampling states")
    assert f"Stopped early, after {done} steps of 12" in report_text(record)
    again, meter = run(parts, results)
    assert not meter.reused and again.identity == whole.identity and told(again) == told(whole)
    assert run(parts, results)[1].reused


def test_a_stop_while_nothing_is_learned_says_so():
    with pytest.raises(NothingLearnedError, match="before anything was learned"):
        run(stop_at="Reading ordinary language")
    soft = {"form": "soft", "warm_start": False}
    for stage in ("Sampling states", "Checking the gradient"):
        with pytest.raises(NothingLearnedError, match="before the first step"):
            run(stop_at=stage, **soft)
    erasure, _ = run(stop_at="Training, step 2 ", **soft)
    assert erasure.record["steps_done"] == 2


def test_a_stop_takes_one_step_at_most():
    _, meter = run(stop_at="Training, step 4 ")
    after = meter.seen.index("Training, step 4 of 12")
    assert "Training, step 5 of 12" not in meter.seen
    spent = [s for s in meter.seen[after:] if s == "Training, step 4 of 12"]
    assert len(spent) <= 2
    _, meter = run(stop_at="Sampling states to check on")
    assert meter.seen.count("Sampling states to check on") == 1


def test_steps_can_be_added_to_a_finished_run():
    results, parts = {}, {}
    first, _ = run(parts, results)
    more, meter = run(parts, results, "resume", steps=18)
    assert meter.resumed_at == 12 and more.record["steps_done"] == 18 and more.record["complete"]
    assert more.record["losses"][:12] == first.record["losses"]
    assert more.identity != first.identity
    assert more.record["steps_added"] == [[12, 12]] and "steps_added" not in first.record
    # It isn't what 18 steps from the start give, and doesn't pass for that.
    fresh, meter = run({}, results, steps=18)
    assert not meter.reused and meter.resumed_at is None and fresh.identity != more.identity
    again, meter = run(parts, results, "resume", steps=18)
    assert again.identity == fresh.identity  # the complete result of these very settings


def test_added_steps_are_found_again_and_can_be_interrupted():
    results, parts = {}, {}
    run(parts, results)
    whole, meter = run(dict(parts), dict(results), "resume", steps=18)
    place = meter.seen.index("Training, step 16 of 18")
    cancelled(parts, place + 1, results=results, reuse="resume", steps=18)
    more, meter = run(parts, results, "resume", steps=18)
    assert meter.resumed_at == 15 and more.identity == whole.identity
    assert run(parts, results, "resume", steps=18)[1].reused


def test_a_mismatch_is_refused_with_what_differs():
    parts = {}
    with pytest.raises(NothingToResumeError, match="No run is kept"):
        run(parts, reuse="resume")
    run(parts, stop_at="Training, step 5 ")
    with pytest.raises(NothingToResumeError) as refused:
        run(parts, reuse="resume", seed=3, learning_rate=0.001)
    said = str(refused.value)
    assert "cat (replaced by dog), 5 of 12 steps done" in said
    assert "learning rate (0.003 there, 0.001 here)" in said and "seed (0 there, 3 here)" in said
    with pytest.raises(NothingToResumeError, match=r"concept \("):
        run(parts, reuse="resume", concepts="cat => boat")
    with pytest.raises(
        NothingToResumeError, match=r"steps \(12 there, of which 5 are done; 4 here"
    ):
        run(parts, reuse="resume", steps=4)
    other = ToyDenoiser()
    other.identity = "71" * 20
    settings = preset_settings("balanced", concepts="cat => dog", **SMALL)
    with pytest.raises(NothingToResumeError, match="the model or a LoRA on it"):
        erase(settings, other, reuse="resume", unfinished=parts)


def test_another_version_is_refused(monkeypatch):
    parts = {}
    run(parts, stop_at="Training, step 5 ")
    about = next(name for name in parts if name.endswith("about"))
    values = dict(parts[about].values)
    values["made_from"] = {**values["made_from"], "version": "0.0.1", "same": "0" * 40}
    key = "ab" * 20
    for name in list(parts):
        parts[key + name[40:]] = parts.pop(name)
    parts[f"{key}.about"] = Part({**values, "key": key})
    with pytest.raises(NothingToResumeError, match=r"the version \(0\.0\.1 there"):
        run(parts, reuse="resume")


def test_train_again_begins_anew_and_use_only_does_not_train():
    parts, results = {}, {}
    run(parts, results, stop_at="Training, step 5 ")
    _, meter = run(parts, results, "train again")
    assert meter.resumed_at is None and not meter.reused


def test_a_run_that_needs_no_training_leaves_nothing():
    parts = {}
    erasure, meter = run(parts, steps=None, trajectories=None)
    assert erasure.record["training"] == "not needed" and not parts and not meter.resumable
    run(parts, preset="instant", steps=None, trajectories=None)
    assert not parts


# The folder


def some_part(seed=0, size=10):
    generator = torch.Generator().manual_seed(seed)
    return Part({"a": [1, 0.1, None, "猫"]}, {"x": torch.randn(size, generator=generator)})


KEYS = [letter * 16 for letter in "abcdef"]


def test_a_part_comes_back_as_it_went_and_damage_counts_as_absent(tmp_path):
    store = UnfinishedStore(tmp_path / "new")
    name = f"{KEYS[0]}.training"
    assert name not in store and not list(store)
    store[name] = some_part()
    back = UnfinishedStore(store.folder)[name]
    assert back.values == some_part().values and torch.equal(
        back.tensors["x"], some_part().tensors["x"]
    )
    (path,) = store.folder.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert name not in store
    path.rename(path.with_name(f"{KEYS[1]}.training.safetensors"))  # a part of another run
    path.with_name(f"{KEYS[1]}.training.safetensors").write_bytes(data)
    assert f"{KEYS[1]}.training" not in store
    for bad in ("../x.training", "", f"{KEYS[0]}.a/b", KEYS[0]):
        with pytest.raises(KeyError):
            store[bad]


def test_a_part_without_tensors_comes_back_whatever_the_library_makes_of_it(tmp_path, monkeypatch):
    # Version 0.4.2, which Automatic1111 and Forge have, writes such a header in two pieces.
    def refuse_none(tensors, metadata):
        assert tensors, "the library was asked to write no tensors"
        return disk_save(tensors, metadata=metadata)

    disk_save = disk.save
    monkeypatch.setattr(disk, "save", refuse_none)
    store = UnfinishedStore(tmp_path)
    store[f"{KEYS[0]}.about"] = Part({"a": ["猫", '"', 0.1]})
    assert store[f"{KEYS[0]}.about"] == Part({"a": ["猫", '"', 0.1]})
    store[f"{KEYS[0]}.training"] = some_part()
    assert f"{KEYS[0]}.training" in store
    with safe_open(tmp_path / f"{KEYS[0]}.about.safetensors", "pt") as file:  # a file like others
        assert file.metadata() and not list(file.keys())


def test_whole_runs_go_beyond_the_limits_those_used_longest_ago_first(tmp_path):
    store = UnfinishedStore(tmp_path, limit_runs=3)
    for age, key in zip((500, 400, 300), KEYS, strict=False):
        for part in ("about", "heldout"):
            store[f"{key}.{part}"] = some_part()
            os.utime(tmp_path / f"{key}.{part}.safetensors", (time.time() - age,) * 2)
    store[f"{KEYS[3]}.about"] = some_part()
    assert {name[0] for name in store} == {"b", "c", "d"} and len(store) == 5
    tiny = UnfinishedStore(tmp_path, limit_bytes=2700)
    tiny[f"{KEYS[4]}.about"] = some_part(size=600)
    assert {name[0] for name in store} == {"e"}
    tiny[f"{KEYS[4]}.heldout"] = some_part(size=3000)
    assert f"{KEYS[4]}.heldout" not in tiny  # too large to keep
    os.utime(tmp_path / f"{KEYS[4]}.about.safetensors", (time.time() - 40 * 24 * 3600,) * 2)
    store[f"{KEYS[5]}.about"] = some_part()
    assert {name[0] for name in store} == {"f"}


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    said = []
    store = UnfinishedStore(tmp_path / "file", said.append)
    for _ in range(2):
        store[f"{KEYS[0]}.about"] = some_part()
    assert len(said) == 1 and "can't be kept" in said[0]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_who_is_killed_while_writing_leaves_what_was_there(tmp_path):
    """Whenever it is killed, the part is one that was written, whole."""
    name = f"{KEYS[0]}.progress"
    store = UnfinishedStore(tmp_path)
    store[name] = some_part(0, 400_000)
    for number in range(8):
        child = os.fork()
        if not child:
            seed = 0
            while True:
                seed = (seed + 1) % 3
                UnfinishedStore(tmp_path)[name] = some_part(seed, 400_000)
        time.sleep(0.02 + 0.013 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = UnfinishedStore(tmp_path)[name].tensors["x"]
        assert any(torch.equal(found, some_part(s, 400_000).tensors["x"]) for s in range(3))


def test_nothing_of_a_damaged_state_is_believed():
    whole, _ = run()
    parts = {}
    run(parts, stop_at="Training, step 5 ")
    for name in list(parts):
        part = parts[name]
        for spoiled in (
            replace(part, values={k: v for k, v in part.values.items() if k == "key"}),
            replace(part, tensors={k: v[:1] for k, v in part.tensors.items()}),
        ):
            if name.endswith((".about", "heldout", "training", "trial")) and spoiled.values:
                continue  # states of another number are as good as any, and hashed
            again, _ = run({**parts, name: spoiled})
            assert again.identity == whole.identity
