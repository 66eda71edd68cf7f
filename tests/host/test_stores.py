"""Both stores on a disk that damages, hides, refuses and drops their files."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
import torch
from concept_surgery.erase_core import Erasure, erase, preset_settings
from concept_surgery.erase_core.artefact.language_store import LanguageStore
from concept_surgery.erase_core.artefact.results import ResultStore
from safetensors.torch import save_file

from ..core.toy import ToyDenoiser

TOY = {"resolution": 32, "captions": 40, "trajectories": 4, "sampling_steps": 4, "steps": 2}
KEY, OTHER = "0123456789abcdef", "fedcba9876543210"
MOMENT = torch.eye(8, dtype=torch.float64)


@pytest.fixture(scope="module")
def erasure() -> Erasure:
    last = erase(preset_settings("balanced", concepts="cat => dog", **TOY), ToyDenoiser())
    return last


@pytest.fixture
def written(tmp_path) -> Path:
    """A file of the store of what was read of language."""
    LanguageStore(tmp_path)[KEY] = MOMENT
    return tmp_path / f"{KEY}.safetensors"


def same(found: torch.Tensor) -> bool:
    return torch.equal(found, MOMENT) and found.dtype == MOMENT.dtype


def test_a_flipped_bit_of_what_was_read_counts_as_absent(written):
    data, chance, absent = written.read_bytes(), random.Random(0), 0
    for _ in range(200):
        changed = bytearray(data)
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        written.write_bytes(changed)
        found = LanguageStore(written.parent).get(KEY)
        assert found is None or same(found)  # a blank of the header may have become another
        absent += found is None
    assert absent > 150
    store = LanguageStore(written.parent)
    store[KEY] = MOMENT
    assert same(LanguageStore(written.parent)[KEY])


def test_what_was_written_under_another_key_or_by_others_counts_as_absent(written):
    folder = written.parent
    shutil.copy(written, folder / f"{OTHER}.safetensors")
    assert OTHER not in LanguageStore(folder)
    save_file({"moment": MOMENT}, written)  # as version 0.7.0 wrote it
    assert KEY not in LanguageStore(folder)


def test_what_is_not_finite_counts_as_absent(written):
    LanguageStore(written.parent)[KEY] = MOMENT / 0
    assert KEY not in LanguageStore(written.parent)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_does_not_hang_and_is_written_over(erasure, written):
    written.unlink()
    os.mkfifo(written)
    store = LanguageStore(written.parent)
    assert KEY not in store
    store[KEY] = MOMENT
    assert same(LanguageStore(written.parent)[KEY])
    written.unlink()
    os.mkfifo(written)
    said = []
    results = ResultStore(written.parent, said.append)
    assert KEY not in results and "not an ordinary file" in said[0]
    results[KEY] = erasure
    assert results[KEY].identity == erasure.identity


@pytest.mark.parametrize("way", ["open", "stat", "mkdir", "glob", "unlink"])
def test_a_folder_without_rights_costs_only_the_reuse(erasure, written, monkeypatch, way):
    said, kept = [], ResultStore(written.parent)
    kept[OTHER] = erasure

    def refuse(self, *args, **more):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, way, refuse)
    language, results = LanguageStore(written.parent), ResultStore(written.parent, said.append)
    assert way not in ("open", "stat") or (KEY not in language and OTHER not in results)
    language[KEY] = MOMENT * 2
    results[OTHER] = erasure
    assert torch.equal(language[KEY], MOMENT * 2)
    assert len(language) >= 0 and len(results) >= 0
    assert all("Permission denied" in text for text in said)


@pytest.mark.skipif(os.name == "nt", reason="needs a umask")
def test_both_stores_leave_files_with_the_rights_of_the_user(erasure, tmp_path):
    before = os.umask(0o022)
    try:
        LanguageStore(tmp_path)[KEY] = MOMENT
        ResultStore(tmp_path)[OTHER] = erasure
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [0o644] * 2


def _killed(folder: Path, erasure: Erasure) -> None:
    """Write to both stores and be killed when the bytes are on the disk and have no name yet."""
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    if folder.name == "language":
        LanguageStore(folder)[KEY] = MOMENT
    else:
        ResultStore(folder)[KEY] = erasure


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.parametrize("name", ["language", "results"])
def test_what_a_killed_process_left_is_cleared_up(erasure, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    fork = multiprocessing.get_context("fork")
    killed = [fork.Process(target=_killed, args=(folder, erasure)) for _ in range(3)]
    for process in killed:
        process.start()
        process.join()
    assert [process.exitcode for process in killed] == [-signal.SIGKILL] * 3
    (folder / ".tmpAbC123").write_bytes(b"half")  # as the library names its own
    left = list(folder.iterdir())
    assert len(left) == 4 and not (folder / f"{KEY}.safetensors").exists()
    young = folder / ".concept-surgery-0.tmp"
    young.write_bytes(b"")
    for path in left:
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    if name == "language":
        LanguageStore(folder)[KEY] = MOMENT
    else:
        ResultStore(folder)[KEY] = erasure
    assert sorted(path.name for path in folder.iterdir()) == [young.name, f"{KEY}.safetensors"]


def test_a_result_whose_record_was_changed_counts_as_absent(erasure, tmp_path):
    said = []
    store = ResultStore(tmp_path, said.append)
    store[KEY] = erasure
    (path,) = tmp_path.iterdir()
    data, absent = path.read_bytes(), 0
    start = data.index(b'"concept_surgery":')
    length = len(json.dumps(json.dumps(dict(erasure.record))))
    for place in random.Random(0).sample(range(start, start + length), 100):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        absent += KEY not in store
    assert absent == len(said) == 100


def _evict(folder: Path, data: bytes, seconds: float) -> None:
    """What another process does that drops and trains the same again and again."""
    path, end = folder / f"{KEY}.safetensors", time.monotonic() + seconds
    while time.monotonic() < end:
        path.unlink(missing_ok=True)
        fresh = folder / "fresh"
        fresh.write_bytes(data)
        os.replace(fresh, path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_files_that_another_process_drops_are_absent_or_whole(erasure, tmp_path):
    said = []
    store = ResultStore(tmp_path, said.append)
    store[KEY] = erasure
    data = (tmp_path / f"{KEY}.safetensors").read_bytes()
    other = multiprocessing.get_context("fork").Process(target=_evict, args=(tmp_path, data, 2.0))
    other.start()
    found = {"whole": 0, "absent": 0}
    while other.is_alive():
        read = store.get(KEY)
        assert read is None or read.identity == erasure.identity
        found["whole" if read else "absent"] += 1
    other.join()
    assert not said and min(found.values()) > 5


def test_a_language_file_that_is_dropped_meanwhile_is_absent(written, monkeypatch):
    whole = Path.stat

    def gone(self, **more):
        if self == written:
            written.unlink(missing_ok=True)
        return whole(self, **more)

    monkeypatch.setattr(Path, "stat", gone)
    store = LanguageStore(written.parent)
    assert KEY not in store and len(store) == 0
    store[OTHER] = MOMENT
    assert len(store) == 1
