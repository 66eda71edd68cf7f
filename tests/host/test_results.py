"""Finished erasures on disk: the folder they lie in, the whole way."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import pytest
import torch
from concept_surgery.erase_core import Erasure, Meter, erase, preset_settings
from concept_surgery.erase_core.artefact.formats import kohya_tensors
from concept_surgery.erase_core.artefact.results import ResultStore
from concept_surgery.nodes.host import ComfyDenoiser

from tools import graphs
from tools.environment import BUILD
from tools.host import ComfyHost, GraphFailed

from ..core.toy import ToyDenoiser
from .test_identity import load, train, with_lora
from .tiny import interrupting

CHECKPOINT = "one-level.safetensors"
TOY = {"resolution": 32, "captions": 40, "trajectories": 4, "sampling_steps": 4, "steps": 2}
TINY = {"steps": 2, "trajectories": 2, "sampling_steps": 2, "captions": 8, "resolution": 32}
SMALL = {"steps": 2, "trajectories": 2, "resolution": 32, "captions": 8, "protection": 1.0}
SMALL |= {"templates": "a photo of a {}"}  # each phrase takes longer to encode than all the rest
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint)


@pytest.fixture(scope="module")
def finished() -> Erasure:
    return toy_erasure()


def toy_erasure(seed=0) -> Erasure:
    settings = preset_settings("balanced", concepts="cat => dog", seed=seed, **TOY)
    last = erase(settings, ToyDenoiser())
    return last


# The folder


def test_a_result_comes_back_as_it_went(finished, tmp_path):
    store = ResultStore(tmp_path / "new" / "folder")
    assert KEY not in store and len(store) == 0
    store[KEY] = finished
    again = ResultStore(store.folder)[KEY]
    assert again.identity == finished.identity and again.record == finished.record
    assert list(store) == [KEY] and len(store) == 1
    assert [path.name for path in store.folder.iterdir()] == [f"{KEY}.safetensors"]
    del store[KEY]
    assert KEY not in store and not list(store.folder.iterdir())
    for key in ("../" + KEY, "", "g" * 16):
        with pytest.raises(KeyError):
            store[key]


def test_a_stopped_result_is_kept_but_not_served(finished, tmp_path):
    store = ResultStore(tmp_path)
    stopped = dataclasses.replace(finished, record={**finished.record, "complete": False})
    store[KEY] = stopped
    assert KEY not in store and len(store) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == f"{KEY}.stopped-{finished.identity}.safetensors"
    assert Erasure.load(path).identity == stopped.identity
    store[KEY] = finished
    store[KEY] = stopped
    assert KEY in store and len(list(tmp_path.iterdir())) == 2
    path.rename(tmp_path / f"{KEY}.safetensors")  # not even by accident
    assert KEY not in store


@pytest.mark.parametrize("damage", ["cut", "empty", "one bit", "foreign"])
def test_a_damaged_file_counts_as_absent_and_is_replaced(finished, tmp_path, damage):
    said = []
    store = ResultStore(tmp_path, said.append)
    store[KEY] = finished
    path = tmp_path / f"{KEY}.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[-5] ^= 1  # in the values, where the format itself notices nothing
    contents = {"cut": data[:-50], "empty": b"", "one bit": data, "foreign": b"hello" * 99}
    path.write_bytes(contents[damage])
    assert store.get(KEY) is None
    assert KEY in said[0] and "next training replaces it" in said[0]
    store[KEY] = finished
    assert store[KEY].identity == finished.identity


def test_the_least_recently_used_go_first(finished, tmp_path):
    ResultStore(tmp_path)["a" * 16] = finished
    size = (tmp_path / ("a" * 16 + ".safetensors")).stat().st_size
    store = ResultStore(tmp_path, limit_bytes=3 * size + size // 2)
    for age, name in ((300, "a"), (200, "b"), (100, "c")):
        store[name * 16] = finished
        os.utime(tmp_path / (name * 16 + ".safetensors"), (time.time() - age,) * 2)
    assert store["a" * 16]  # used now, so "b" is the oldest
    store["d" * 16] = finished
    assert {name[0] for name in store} == {"a", "c", "d"}
    tiny = ResultStore(tmp_path, limit_bytes=1)
    tiny["e" * 16] = finished
    assert list(tiny) == ["e" * 16]


def test_what_a_dead_process_left_is_cleared_up(finished, tmp_path):
    old, young = tmp_path / ".a.safetensors.1.tmp", tmp_path / ".b.safetensors.2.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    ResultStore(tmp_path)[KEY] = finished
    assert not old.exists() and young.exists()


def test_a_folder_that_cannot_be_written_costs_only_the_reuse(finished, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    said = []
    store = ResultStore(tmp_path / "file", said.append)
    store[KEY] = finished
    assert "can't be stored" in said[0] and KEY not in store and len(store) == 0


@pytest.mark.skipif(os.name == "nt", reason="needs limits of a process")
def test_a_full_disk_costs_only_the_reuse(finished, tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    said = []
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        ResultStore(tmp_path, said.append)[KEY] = finished
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "can't be stored" in said[0] and not list(tmp_path.iterdir())


def _write_often(folder: Path, erasure: Erasure) -> None:
    for _ in range(20):
        ResultStore(folder, limit_bytes=1)[KEY] = erasure


def test_several_writers_and_readers_of_one_key(finished, tmp_path):
    said = []
    store = ResultStore(tmp_path, said.append)
    store[KEY] = finished
    writers = [threading.Thread(target=_write_often, args=(tmp_path, finished)) for _ in range(2)]
    if sys.platform == "linux":
        fork = multiprocessing.get_context("fork")
        writers += [fork.Process(target=_write_often, args=(tmp_path, finished)) for _ in range(2)]
    for writer in reversed(writers):  # processes before there are threads
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert store[KEY].identity == finished.identity
    for writer in writers:
        writer.join()
        assert getattr(writer, "exitcode", 0) == 0
    assert not said and [path.name for path in tmp_path.iterdir()] == [f"{KEY}.safetensors"]


# Through the engine


def test_the_same_training_is_found_and_another_is_not(loaded, checkpoint, store, tmp_path):
    results, language = ResultStore(tmp_path / "results"), store
    first = train(loaded, results, language)
    assert not first.stored and len(results) == 1
    again = train(load(checkpoint), results, language)
    assert again.stored and again.erasure.identity == first.erasure.identity
    assert again.erasure.record == first.erasure.record
    patched = with_lora(loaded[0], 1, 0.7)
    assert not train((patched, loaded[1]), results, language).stored
    assert train((with_lora(loaded[0], 1, 0.7), loaded[1]), results, language).stored
    skipping = loaded[1].clone()
    skipping.clip_layer(-2)
    assert not train((loaded[0], skipping), results, language).stored
    assert len(results) == 3


def test_an_interrupt_stores_nothing(loaded, store, tmp_path):
    results = ResultStore(tmp_path / "results")
    values = {"templates": SMALL["templates"], "protection": 1.0, **TINY}
    settings = preset_settings("balanced", concepts="cat", **values)
    with torch.inference_mode(False), torch.enable_grad():
        with ComfyDenoiser(*loaded, "tiny", 6, 64) as denoiser:
            meter = Meter(interrupting("Checking what must stay"))
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                erase(settings, denoiser, store, meter, results)
    assert len(results) == 0 and not results.folder.exists()


# Over HTTP


@dataclasses.dataclass
class Run:
    """How a graph went: the history entry, whether steps were trained, the report, the file."""

    entry: dict
    trained: bool
    report: str
    file: Path


def queue(host: ComfyHost, filename: str, graph=None, report=("train", 2), **values) -> Run:
    """Run a graph with a trainer, save what it gives and watch the progress."""
    if graph is None:
        graph = training(**values)
    graph = graph | graphs.save(filename=filename, erasure=(report[0], 0))
    events = []
    entry = host.run(graph | graphs.show("report", report), 240, events.append)
    texts = [e["data"]["text"] for e in events if e["type"] == "progress_text"]
    file = host.models("loras") / f"{filename}.safetensors"
    trained = any(text.startswith("Training, step") for text in texts)
    return Run(entry, trained, "".join(entry["outputs"]["report"]["text"]), file)


def training(**values):
    settings = {"erase": "cat", "replace_with": "dog", **SMALL, **values}
    return graphs.loader(CHECKPOINT) | graphs.train(**settings)


def other_workflow():
    """Other names, other order, a picture, but the same into the trainer."""
    graph = graphs.loader(CHECKPOINT, "weights")
    graph |= graphs.apply("without", model=("weights", 0), erasure=("surgery", 0))
    sources = {"model": ("without", 0), "clip": ("weights", 1), "vae": ("weights", 2)}
    graph |= graphs.picture("shot", "a cat", steps=2, **sources)
    into = {"model": ("weights", 0), "clip": ("weights", 1)}
    return graph | graphs.train("surgery", erase="cat ", replace_with="dog", **SMALL, **into)


@contextlib.contextmanager
def host_on(work: Path, checkpoint: Path):
    log = BUILD / "logs" / "host-results.log"
    with ComfyHost(work, checkpoints=[checkpoint], log=log) as host:
        yield host


def stored_files(host: ComfyHost) -> dict[str, bytes]:
    folder = host.work / "user" / "concept_surgery" / "results"
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture(scope="module")
def restarted(checkpoint, tmp_path_factory):
    """A host that was stopped and started again after it trained; with how that training went."""
    work = tmp_path_factory.mktemp("results")
    with host_on(work, checkpoint) as host:
        with pytest.raises(GraphFailed, match="Nothing is stored .* 'use only' forbids to train"):
            queue(host, "absent", stored_result="use only")
        assert not stored_files(host)
        first = queue(host, "first")
        assert first.trained and "Taken from the store" not in first.report
        assert len(stored_files(host)) == 1
    with host_on(work, checkpoint) as host:
        yield host, first


def test_after_a_restart_the_same_file_without_training(restarted):
    host, first = restarted
    before = stored_files(host)
    second = queue(host, "second")
    assert not second.trained
    assert "Taken from the store: trained on 20" in second.report
    one, two = Erasure.load(first.file), Erasure.load(second.file)
    assert one.identity == two.identity and one.record == two.record
    assert all(
        torch.equal(tensor, kohya_tensors(two.bases, two.factors)[name])
        for name, tensor in kohya_tensors(one.bases, one.factors).items()
    )
    assert stored_files(host) == before


def test_another_workflow_finds_it(restarted):
    host, first = restarted
    other = queue(host, "third", other_workflow(), ("surgery", 2))
    assert not other.trained and "Taken from the store" in other.report
    assert Erasure.load(other.file).identity == Erasure.load(first.file).identity
    assert queue(host, "only", stored_result="use only").trained is False


def test_train_again_trains_and_use_only_never_does(restarted):
    host, first = restarted
    again = queue(host, "again", stored_result="train again")
    assert again.trained and "Taken from the store" not in again.report
    one, two = Erasure.load(first.file), Erasure.load(again.file)
    assert one.identity == two.identity
    (path,) = (host.work / "user" / "concept_surgery" / "results").iterdir()
    assert Erasure.load(path).record["created"] > one.record["created"]
    assert len(stored_files(host)) == 1
    with pytest.raises(GraphFailed, match="Nothing is stored"):
        queue(host, "never", stored_result="use only", training_seed=77)
    assert len(stored_files(host)) == 1


def test_an_interrupt_leaves_the_folder_as_it_was(restarted):
    host, _ = restarted
    before = stored_files(host)
    graph = training(steps=5000, training_seed=9) | graphs.show("report", ("train", 2))

    def stop(event):
        if event["type"] == "progress_text" and "Training, step 2 " in event["data"]["text"]:
            host.interrupt()

    with pytest.raises(GraphFailed) as failure:
        host.run(graph, timeout=120, on_progress=stop)
    assert failure.value.interrupted and stored_files(host) == before


def damage_the_result(host):
    (path,) = (host.work / "user" / "concept_surgery" / "results").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    host.free()  # or the result would come out of the host's cache


def test_a_damaged_file_is_made_again_from_what_its_run_left(restarted):
    host, first = restarted
    damage_the_result(host)
    run = queue(host, "continued")
    assert not run.trained and "earlier run" in run.report
    assert Erasure.load(run.file).identity == Erasure.load(first.file).identity


def test_a_damaged_file_is_trained_again_where_nothing_is_left(restarted):
    host, first = restarted
    shutil.rmtree(host.work / "user" / "concept_surgery" / "unfinished")
    damage_the_result(host)
    repaired = queue(host, "repaired")
    assert repaired.trained
    assert Erasure.load(repaired.file).identity == Erasure.load(first.file).identity
    host.free()
    assert not queue(host, "reused").trained
