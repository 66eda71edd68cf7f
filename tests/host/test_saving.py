"""Saving into the host's folder: names, sub-folders, savers at once, savers that were killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import folder_paths
import pytest
import torch
from concept_surgery.erase_core import Erasure, ErasureFileError, erase, preset_settings
from concept_surgery.erase_core.artefact.saving import checked_name, save_erasure
from concept_surgery.nodes.files import LoadErasure, SaveErasure

from ..core.toy import ToyDenoiser

TOY = {"resolution": 32, "captions": 40, "trajectories": 4, "sampling_steps": 4, "steps": 2}
SUFFIX = ".safetensors"


@pytest.fixture(scope="module")
def erasure() -> Erasure:
    last = erase(preset_settings("balanced", concepts="cat => dog", **TOY), ToyDenoiser())
    return last


@pytest.fixture(scope="module")
def two(erasure) -> tuple[Erasure, Erasure]:
    """Two that differ."""
    factors = {name: 2 * factor for name, factor in erasure.factors.items()}
    return erasure, Erasure(erasure.bases, factors, erasure.record)


@pytest.fixture
def loras(tmp_path, monkeypatch) -> Path:
    """The host's LoRA folder."""
    folder = tmp_path / "loras"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(folder)])
    return folder


# Names


GOOD = [
    "cat",
    "no ink",
    "cat.v2",
    "Katze mit Hut ü",
    "猫",
    "styles/no_ink",
    "a/b/c",
    "console",
    "COM10",
    "nullify",
    "aux_cat",
    "cat (1)",
    "é" * 117,
    "x" * 235,
    "a" * 200 + "/" + "b" * 200,
]
BAD = [
    "",
    " ",
    "cat ",
    " cat",
    "cat.",
    "cat. ",
    "cat .safetensors",
    "cat\t",
    "cat\u00a0",
    "CON",
    "con",
    "Nul.txt",
    "COM1",
    "com9.v2",
    "LPT1.safetensors",
    "COM¹",
    "prn .x",
    "aux",
    "CONIN$",
    "styles/NUL",
    "NUL/cat",
    "..",
    "../cat",
    "styles/../../cat",
    "styles/./cat",
    ".hidden",
    "styles/.cat",
    "/cat",
    "/tmp/cat",
    "//server/share/cat",
    "styles//cat",
    "styles/",
    "styles /cat",
    "styles./cat",
    "C:cat",
    "C:/cat",
    "a\\b",
    "..\\cat",
    "\\\\server\\cat",
    "cat\x00",
    "a\nb",
    "a\x7fb",
    "a*b",
    "a?b",
    'a"b',
    "a<b",
    "a|b",
    "a:stream",
    "\ud800",
    "cat\udc80",
    "x" * 236,
    "x" * 244,
    "é" * 118,
    "猫" * 79,
    "x" * 236 + "/cat",
    "/".join(["folder"] * 200),
    ".safetensors",
    "styles/.safetensors",
]


@pytest.mark.parametrize("name", GOOD)
def test_good_names_are_saved_and_found_again(erasure, loras, name):
    assert SaveErasure.validate_inputs(filename=name) is True
    for number, expected in ((1, name + SUFFIX), (2, f"{name}_2{SUFFIX}")):
        factors = {one: number * factor for one, factor in erasure.factors.items()}
        saved = Erasure(erasure.bases, factors, erasure.record)
        path = save_erasure(saved, loras, name)
        assert path == loras / expected
        assert Erasure.load(path).identity == saved.identity


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_refused_before_anything_is_trained(erasure, loras, name):
    said = SaveErasure.validate_inputs(filename=name)
    assert isinstance(said, str) and "can't be a file name" in said and len(said) < 400
    assert "styles/no_ink" in said
    said.encode()  # or the host could not send it
    with pytest.raises(ErasureFileError, match="can't be a file name"):
        save_erasure(erasure, loras, name)
    assert not list(loras.iterdir())


def test_the_ending_may_be_given_in_any_case():
    assert checked_name("cat.safetensors") == checked_name("cat.SafeTensors") == "cat"
    assert checked_name("styles/cat.safetensors") == "styles/cat"


def test_a_linked_name_is_checked_when_it_comes():
    assert SaveErasure.validate_inputs() is True


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_a_link_that_leads_out_is_refused_and_one_inside_is_followed(erasure, loras, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (loras / "out").symlink_to(outside)
    (loras / "inner").mkdir()
    (loras / "in").symlink_to(loras / "inner")
    (loras / "circle").symlink_to(loras / "circle")
    (loras / "file").write_text("in the way")
    for name in ("out/cat", "out/deeper/cat"):
        said = SaveErasure.validate_inputs(filename=name)
        assert "outside" in said
        with pytest.raises(ErasureFileError, match="would lie outside"):
            save_erasure(erasure, loras, name)
    for name in ("circle/cat", "file/cat", "file/deeper/cat"):
        assert isinstance(SaveErasure.validate_inputs(filename=name), str)
        with pytest.raises(ErasureFileError, match="Check its rights"):
            save_erasure(erasure, loras, name)
    assert not list(outside.iterdir())
    assert save_erasure(erasure, loras, "in/cat").samefile(loras / "inner" / "cat.safetensors")


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_the_hosts_folder_itself_may_be_a_link(erasure, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "loras").symlink_to(tmp_path / "real")
    save_erasure(erasure, tmp_path / "loras", "styles/cat")
    assert (tmp_path / "real" / "styles" / "cat.safetensors").is_file()


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_a_link_to_nothing_is_not_written_through(erasure, loras, tmp_path):
    (loras / "cat.safetensors").symlink_to(tmp_path / "elsewhere")
    assert save_erasure(erasure, loras, "cat").name == "cat_2.safetensors"
    assert not (tmp_path / "elsewhere").exists()


def test_the_node_says_where_the_file_is(erasure, loras):
    shown = SaveErasure.execute(erasure, "styles/cat")
    assert shown.args == (str(loras / "styles" / "cat.safetensors"),)


def test_a_changed_file_is_read_again_and_a_missing_one_is_no_fault(erasure, loras, monkeypatch):
    path = save_erasure(erasure, loras, "cat")
    monkeypatch.setattr(folder_paths, "get_full_path", lambda folder, name: str(path))
    before = LoadErasure.fingerprint_inputs(filename="cat.safetensors")
    assert LoadErasure.fingerprint_inputs(filename="cat.safetensors") == before
    kept = path.stat()
    path.write_bytes(path.read_bytes() + b" ")
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # as tools that keep times do
    assert LoadErasure.fingerprint_inputs(filename="cat.safetensors") != before
    path.unlink()
    assert LoadErasure.fingerprint_inputs(filename="cat.safetensors") != before


# Savers at once


def _wait_and_save(erasure: Erasure, folder: Path, name: str, start, way: str) -> None:
    if way == "no links":

        def link(*_):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        os.link = link
    elif way == "no such call":
        del os.link
    start.wait()
    save_erasure(erasure, folder, name)


def _identities(folder: Path) -> list[str]:
    return sorted(Erasure.load(path).identity for path in folder.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.parametrize("way", ["links", "no links", "no such call"])
def test_of_two_savers_at_once_none_is_lost(two, tmp_path, way):
    fork = multiprocessing.get_context("fork")
    expected = sorted(one.identity for one in two)
    for number in range(15):
        folder, start = tmp_path / str(number), fork.Barrier(3)
        folder.mkdir()
        savers = [
            fork.Process(target=_wait_and_save, args=(one, folder, "cat", start, way))
            for one in two
        ]
        for saver in savers:
            saver.start()
        start.wait()
        for saver in savers:
            saver.join(30)
        assert [saver.exitcode for saver in savers] == [0, 0]
        assert _identities(folder) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.parametrize("way", ["links", "no links"])
def test_no_half_written_file_is_seen_under_the_name(erasure, tmp_path, way):
    """A large erasure is saved while its name is looked at all the time."""
    wide = Erasure(
        {"lora_unet_x": torch.randn(20_000, erasure.rank)},
        {"lora_unet_x": torch.randn(20_000, erasure.rank)},
        erasure.record,
    )
    fork = multiprocessing.get_context("fork")
    for number in range(5):
        folder, start = tmp_path / str(number), fork.Barrier(2)
        folder.mkdir()
        saver = fork.Process(target=_wait_and_save, args=(wide, folder, "cat", start, way))
        saver.start()
        start.wait()
        while saver.is_alive():
            for path in folder.glob(f"*{SUFFIX}"):
                assert Erasure.load(path).identity == wide.identity
        saver.join()
        assert [path.name for path in folder.iterdir()] == ["cat.safetensors"]


def test_a_disk_that_is_full_leaves_nothing(erasure, loras, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ErasureFileError, match="No space left on device"):
        save_erasure(erasure, loras, "cat")
    assert not list(loras.iterdir())


def test_a_name_that_is_claimed_by_another_saver_is_left_to_it(two, loras, monkeypatch):
    monkeypatch.delattr(os, "link")
    whole = os.rename

    def slowly(source, target):
        monkeypatch.setattr(os, "rename", whole)
        assert save_erasure(two[1], loras, "cat").name == "cat_2.safetensors"
        whole(source, target)

    monkeypatch.setattr(os, "rename", slowly)
    assert save_erasure(two[0], loras, "cat").name == "cat.safetensors"
    assert sorted(path.name for path in loras.iterdir()) == ["cat.safetensors", "cat_2.safetensors"]


# Savers that were killed


def _killed(erasure: Erasure, folder: Path) -> None:
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    save_erasure(erasure, folder, "cat")


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
def test_what_a_killed_saver_left_goes_and_what_others_left_stays(erasure, loras):
    fork = multiprocessing.get_context("fork")
    for _ in range(3):
        saver = fork.Process(target=_killed, args=(erasure, loras))
        saver.start()
        saver.join()
        assert saver.exitcode == -signal.SIGKILL
    ours = list(loras.iterdir())
    assert len(ours) == 3 and not [path for path in ours if path.name.endswith(SUFFIX)]
    whole = save_erasure(erasure, loras, "whole")
    # What version 0.7.0 left: under its own name, and under the library's.
    ours += [loras / f".cat.safetensors.{'0a' * 16}.tmp", loras / ".tmpAbC123"]
    ours[-2].write_bytes(b"")
    ours[-1].write_bytes(whole.read_bytes()[:-300])
    others = [loras / ".tmpXyZ789", loras / ".upload.tmp", loras / ".tmp", loras / "cat.tmp"]
    for path in others:
        path.write_bytes(b"another program's")
    young = loras / ".concept-surgery-00.tmp"
    young.write_bytes(b"half")
    (loras / ".concept-surgery-folder.tmp").mkdir()
    for path in (*ours, *others, loras / ".concept-surgery-folder.tmp"):
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    save_erasure(erasure, loras, "next")
    assert not [path for path in ours if path.exists()]
    assert all(path.exists() for path in (*others, young, whole))


def test_another_file_that_cannot_be_read_is_not_written_over(two, loras, monkeypatch):
    path = save_erasure(two[0], loras, "cat")
    before = path.read_bytes()
    whole = Path.open

    def refuse(self, *args, **more):
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return whole(self, *args, **more)

    monkeypatch.setattr(Path, "open", refuse)
    assert save_erasure(two[0], loras, "cat").name == "cat_2.safetensors"
    monkeypatch.undo()
    assert path.read_bytes() == before


def test_what_cannot_be_looked_into_is_said(erasure, loras, monkeypatch):
    (loras / "styles").mkdir()

    def refuse(self, *args, **more):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "resolve", refuse)
    assert "Permission denied" in SaveErasure.validate_inputs(filename="styles/cat")
    with pytest.raises(ErasureFileError, match="Permission denied.*Check its rights"):
        save_erasure(erasure, loras, "styles/cat")
