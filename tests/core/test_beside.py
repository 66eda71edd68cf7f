"""What lies beside an erasure for programs that list LoRAs, and which files are erasures."""

import json
import os
import struct

import pytest
from concept_surgery.erase_core import Erasure, ErasureFileError, erase, preset_settings
from concept_surgery.erase_core.artefact import listing
from concept_surgery.erase_core.artefact.beside import card, mark_of, write_beside
from concept_surgery.erase_core.artefact.listing import ErasureFiles
from concept_surgery.erase_core.artefact.saving import (
    ADD_NUMBER,
    OVERWRITE,
    is_erasure_file,
    planned_path,
    save_erasure,
)
from concept_surgery.erase_core.files.disk import LONGEST_LISTED

from .toy import ToyDenoiser

SMALL = {"resolution": 32, "captions": 40, "sampling_steps": 4}


@pytest.fixture(scope="module")
def cat() -> Erasure:
    return erase(preset_settings("instant", concepts="cat => dog", **SMALL), ToyDenoiser())


@pytest.fixture(scope="module")
def other(cat) -> Erasure:
    factors = {name: 2 * factor for name, factor in cat.factors.items()}
    concepts = [{**cat.record["concepts"][0], "text": "fox"}]
    return Erasure(cat.bases, factors, {**cat.record, "concepts": concepts})


def picture(erasure: Erasure, pixels: bytes = b"pixels") -> bytes:
    return b"\x89PNG....tEXtSoftware\0" + mark_of(erasure).encode() + b"...." + pixels


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_card_has_the_words_that_automatic1111_and_forge_read(cat, tmp_path):
    path = save_erasure(cat, tmp_path, "cat.v2")
    assert write_beside(path, cat) == ""
    found = json.loads((tmp_path / "cat.v2.json").read_text("utf-8"))
    assert found["preferred weight"] == 1
    assert "cat (replaced by dog)" in found["description"]
    assert found["sd version"] == "SD1"
    for family, version in {"SD1.x": "SD1", "SD2 (v)": "SD2", "SDXL": "SDXL"}.items():
        assert card({**cat.record, "family": family})["sd version"] == version
    assert "sd version" not in card({**cat.record, "family": "Flux"})
    assert sorted(content(tmp_path)) == ["cat.v2.json", "cat.v2.safetensors"]


def test_a_concept_that_is_a_script_stays_text_in_the_card(cat):
    concepts = [{**cat.record["concepts"][0], "text": "<script>alert(1)</script>"}]
    assert "<" not in card({**cat.record, "concepts": concepts})["description"]


def test_what_a_person_put_or_changed_there_is_left_alone(cat, other, tmp_path):
    path = save_erasure(cat, tmp_path, "cat")
    (tmp_path / "cat.json").write_text('{"description": "mine"}')
    (tmp_path / "cat.jpg").write_bytes(b"my picture")
    before = content(tmp_path)
    assert write_beside(path, other, picture(other)) == ""
    assert content(tmp_path) == before
    (tmp_path / "cat.jpg").unlink()
    (tmp_path / "cat.preview.png").write_bytes(b"another picture of mine")
    before = content(tmp_path)
    write_beside(path, other, picture(other))
    write_beside(path, other)
    assert content(tmp_path) == before


def test_a_card_that_a_person_edited_is_theirs(cat, other, tmp_path):
    path = save_erasure(cat, tmp_path, "cat")
    write_beside(path, cat)
    card_path = tmp_path / "cat.json"
    for edited in (
        {**json.loads(card_path.read_text("utf-8")), "notes": "mine"},
        {**json.loads(card_path.read_text("utf-8")), "preferred weight": 0.7},
        [1],
    ):
        card_path.write_text(json.dumps(edited))
        write_beside(path, other)
        assert json.loads(card_path.read_text("utf-8")) == edited
    card_path.write_bytes(b"\xff no JSON")
    write_beside(path, other)
    assert card_path.read_bytes() == b"\xff no JSON"


def test_what_was_written_here_follows_the_erasure(cat, other, tmp_path):
    path = save_erasure(cat, tmp_path, "cat")
    write_beside(path, cat, picture(cat))
    assert (tmp_path / "cat.preview.png").read_bytes() == picture(cat)
    write_beside(path, cat, picture(cat, b"drawn again"))
    assert (tmp_path / "cat.preview.png").read_bytes() == picture(cat, b"drawn again")
    write_beside(path, cat)  # nothing is connected now, and what is there still shows this one
    assert (tmp_path / "cat.preview.png").exists()
    assert save_erasure(other, tmp_path, "cat", if_taken=OVERWRITE) == path
    write_beside(path, other)
    assert not (tmp_path / "cat.preview.png").exists()  # it showed what isn't there any more
    assert "fox" in json.loads((tmp_path / "cat.json").read_text("utf-8"))["description"]


def test_what_cannot_be_written_beside_is_said_and_nothing_is_lost(cat, tmp_path, monkeypatch):
    path = save_erasure(cat, tmp_path, "cat")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = write_beside(path, cat, picture(cat))
    assert "cat.safetensors is saved" in said and "No space left on device" in said
    assert list(content(tmp_path)) == ["cat.safetensors"]


def test_overwriting_replaces_erasures_and_nothing_else(cat, other, tmp_path):
    assert planned_path(tmp_path, "cat", OVERWRITE) == tmp_path / "cat.safetensors"
    path = save_erasure(cat, tmp_path, "cat", if_taken=OVERWRITE)
    stamp = path.stat().st_mtime_ns
    assert save_erasure(cat, tmp_path, "cat", if_taken=OVERWRITE) == path
    assert path.stat().st_mtime_ns == stamp  # the same one isn't written twice
    assert save_erasure(other, tmp_path, "cat", if_taken=OVERWRITE) == path
    assert Erasure.load(path).identity == other.identity
    for number, foreign in enumerate((b"a LoRA of another", lora({"ss_tag": "concept_surgery"}))):
        (tmp_path / f"{number}.safetensors").write_bytes(foreign)
    (tmp_path / "2.safetensors").mkdir()
    (tmp_path / "3.safetensors").symlink_to(tmp_path / "0.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for number in range(4):
        for refused in (
            lambda n=number: save_erasure(cat, tmp_path, f"{n}", if_taken=OVERWRITE),
            lambda n=number: planned_path(tmp_path, f"{n}", OVERWRITE),
        ):
            with pytest.raises(ErasureFileError, match="is not an erasure, so it isn't overwrit"):
                refused()
        assert planned_path(tmp_path, f"{number}", ADD_NUMBER).name == f"{number}_2.safetensors"
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_link_is_replaced_and_not_written_through(cat, other, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real = save_erasure(cat, tmp_path / "elsewhere", "real")
    (tmp_path / "cat.safetensors").symlink_to(real)
    path = save_erasure(other, tmp_path, "cat", if_taken=OVERWRITE)
    assert not path.is_symlink() and Erasure.load(path).identity == other.identity
    assert Erasure.load(real).identity == cat.identity


# Which files are erasures


def lora(metadata: dict, pad: int = 0) -> bytes:
    header = json.dumps({"__metadata__": metadata, "x": {"pad": "p" * pad}}).encode()
    return struct.pack("<Q", len(header)) + header + b"weights"


FOREIGN = {
    "empty": b"",
    "short": b"\x08\0\0",
    "huge": struct.pack("<Q", 2**63) + b"{}",
    "long": lora({"concept_surgery": "{}"}, LONGEST_LISTED),
    "cut": lora({"concept_surgery": "{}"})[:40],
    "no JSON": struct.pack("<Q", 40) + b'"concept_surgery"'.ljust(40),
    "a list": struct.pack("<Q", 19) + b'["concept_surgery"]',
    "deep": struct.pack("<Q", 200_017) + b'"concept_surgery"' + b"[" * 200_000,
    "by value": lora({"ss_comment": '"concept_surgery"'}),
    "no metadata": struct.pack("<Q", 2) + b"{}",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_others_and_broken_ones_are_no_erasures(kind, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(FOREIGN[kind])
    assert is_erasure_file(path) is False
    assert ErasureFiles().among({"a": path}) == []


def test_erasures_are_told_from_loras_and_looked_at_once(cat, tmp_path, monkeypatch):
    looked_at = []

    def counted(path):
        looked_at.append(path.name)
        return is_erasure_file(path)

    monkeypatch.setattr(listing, "is_erasure_file", counted)
    save_erasure(cat, tmp_path, "cat")
    (tmp_path / "cat.SAFETENSORS").write_bytes((tmp_path / "cat.safetensors").read_bytes())
    (tmp_path / "lora.safetensors").write_bytes(lora({"ss_tag": "1"}))
    (tmp_path / "old.ckpt").write_bytes((tmp_path / "cat.safetensors").read_bytes())
    (tmp_path / "folder.safetensors").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    files = {path.name: path for path in sorted(tmp_path.iterdir())}
    files["gone.safetensors"] = tmp_path / "gone.safetensors"
    known = ErasureFiles()
    assert known.among(files) == ["cat.SAFETENSORS", "cat.safetensors"]
    first = len(looked_at)
    assert known.among(files) == ["cat.SAFETENSORS", "cat.safetensors"]
    assert len(looked_at) == first and "old.ckpt" not in looked_at
    (tmp_path / "lora.safetensors").write_bytes((tmp_path / "cat.safetensors").read_bytes())
    assert "lora.safetensors" in known.among(files)
    assert looked_at[first:] == ["lora.safetensors"]


def test_the_weights_of_a_file_are_not_read_to_tell_it(cat, tmp_path):
    path = save_erasure(cat, tmp_path, "cat")
    length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:length])
    assert is_erasure_file(path)
