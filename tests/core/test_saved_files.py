"""Files of erasures: every damage is seen, everything intact is read, old files too."""

import copy
import json
import os
import random
import stat
from pathlib import Path

import pytest
import torch
from concept_surgery.erase_core import Erasure, ErasureFileError, erase, preset_settings
from concept_surgery.erase_core.artefact import formats
from concept_surgery.erase_core.artefact.report import report_text
from concept_surgery.erase_core.artefact.together import settings_together
from safetensors.torch import load_file, save_file

from .toy import ToyDenoiser

SMALL = {"resolution": 32, "captions": 40, "trajectories": 8, "sampling_steps": 4, "steps": 2}
# One erasure of the toy as each version wrote it, and the hash of its values.
OLD_FILES = Path(__file__).parent / "old_files"
OLD = {
    "0.2.0": "081c86472150d319",
    "0.2.1": "b353774eb65ec5e4",
    "0.4.0": "4fd613cea789645a",
    "0.5.0": "4fd613cea789645a",
    "0.7.0": "aea0f8fde1a94d4d",
}
OLD_HASH = "modelspec.hash_sha256"


@pytest.fixture(scope="module")
def erasure() -> Erasure:
    values = {"concepts": "cat => dog\npizza => bread", "keep": "a tree", **SMALL}
    last = erase(preset_settings("balanced", **values), ToyDenoiser())
    return last


@pytest.fixture
def path(erasure, tmp_path):
    erasure.save(tmp_path / "cat.safetensors")
    return tmp_path / "cat.safetensors"


def tensors_of(erasure) -> dict:
    tensors = formats.kohya_tensors(erasure.bases, erasure.factors)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def write(path, tensors, record, without=()):
    """A file whose hashes are right, whatever it holds."""
    info = formats.metadata(record, tensors)
    save_file(tensors, path, metadata={k: v for k, v in info.items() if k not in without})


def write_record(path, erasure, text: str):
    """A file with any text for its record, and the right hashes."""
    tensors = tensors_of(erasure)
    info = formats.metadata(erasure.record, tensors) | {formats.RECORD_KEY: text}
    if hasattr(formats, "content_hash"):
        info[formats.HASH_KEY] = formats.content_hash(text, tensors)
    save_file(tensors, path, metadata=info)


def use(erasure):
    """All that is read of an erasure."""
    report_text(erasure.record)
    formats.metadata(erasure.record, tensors_of(erasure))
    settings_together([erasure.record, erasure.record])
    assert erasure.concept and erasure.parts and erasure.identity


def test_a_flipped_bit_is_refused_or_changes_nothing(erasure, path):
    data, chance = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for number in range(300):  # as many in what is said as in the values
        place = chance.randrange(*((0, header) if number % 2 else (header, len(data))))
        changed = bytearray(data)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            again = Erasure.load(path)
        except ErasureFileError as error:
            assert str(error).startswith("cat.safetensors ")
            refused += 1
        else:
            assert again.identity == erasure.identity and again.record == erasure.record
            assert place < header
    assert refused > 250


@pytest.mark.parametrize("cut", [0, 5, 8, 100, -1])
def test_a_file_that_was_cut_off_is_refused(path, cut):
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ErasureFileError, match="damaged or was not copied whole"):
        Erasure.load(path)


def some_matrix(tensors):
    return next(iter(tensors)).split(".")[0]


def doubled(tensors):
    tensors[some_matrix(tensors) + ".alpha"] *= 2


def alpha_is_no_number(tensors):
    tensors[some_matrix(tensors) + ".alpha"].fill_(float("nan"))


def alpha_is_a_row(tensors):
    tensors[some_matrix(tensors) + ".alpha"] = torch.ones(2)


def huge(tensors):
    tensors[some_matrix(tensors) + ".lora_up.weight"][0, 0] = 1e30


def infinite(tensors):
    tensors[some_matrix(tensors) + ".lora_down.weight"][0, 0] = float("inf")


def half(tensors):
    name = some_matrix(tensors) + ".lora_up.weight"
    tensors[name] = tensors[name].half()


def whole_numbers(tensors):
    name = some_matrix(tensors) + ".lora_up.weight"
    tensors[name] = tensors[name].to(torch.int32)


def without_columns(tensors):
    for name, tensor in tensors.items():
        if name.endswith(".alpha"):
            tensor.zero_()
        else:
            tensors[name] = tensor[:0] if "down" in name else tensor[:, :0].contiguous()


def without_rows(tensors):
    name = some_matrix(tensors) + ".lora_up.weight"
    tensors[name] = tensors[name][:0]


def of_a_bias(tensors):
    for suffix in (".lora_up.weight", ".lora_down.weight", ".alpha"):
        tensors["diffusion_model.out.2.bias" + suffix] = tensors.pop(some_matrix(tensors) + suffix)


def another_name(tensors):
    name = some_matrix(tensors)
    tensors[name + "_x.alpha"] = tensors.pop(name + ".alpha")


@pytest.mark.parametrize(
    "change",
    [
        doubled,
        alpha_is_no_number,
        alpha_is_a_row,
        huge,
        infinite,
        half,
        whole_numbers,
        without_columns,
        without_rows,
        of_a_bias,
        another_name,
    ],
)
def test_what_no_training_gives_is_refused_though_its_hash_is_right(erasure, path, change):
    tensors = tensors_of(erasure)
    change(tensors)
    write(path, tensors, erasure.record)
    with pytest.raises(ErasureFileError, match="^cat.safetensors .*[Gg]et (the file|it) again"):
        Erasure.load(path)


@pytest.mark.parametrize("version", OLD)
def test_files_that_older_versions_wrote_are_read(version, tmp_path):
    old = Erasure.load(OLD_FILES / f"{version}.safetensors")
    assert old.record["version"] == version and old.identity == OLD[version]
    report_text(old.record)
    assert old.concept == "cat, pizza" and old.without(["cat"]).concept == "pizza"
    old.save(tmp_path / "again.safetensors")
    again = Erasure.load(tmp_path / "again.safetensors", old=False)
    assert again.identity == old.identity and again.record == old.record


def test_a_file_with_a_hash_of_the_values_alone_is_checked_by_that(erasure, path):
    write(path, tensors_of(erasure), erasure.record, without={"concept_surgery_hash"})
    again = Erasure.load(path)
    assert again.identity == erasure.identity and again.record == erasure.record
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ErasureFileError, match="is damaged: its content is not what was saved"):
        Erasure.load(path)


def test_a_file_without_any_hash_is_refused(erasure, path):
    write(path, tensors_of(erasure), erasure.record, without={OLD_HASH, "concept_surgery_hash"})
    with pytest.raises(ErasureFileError, match="doesn't say what its content must be"):
        Erasure.load(path)


def test_other_tools_may_add_metadata(erasure, path):
    tensors = tensors_of(erasure)
    info = formats.metadata(erasure.record, tensors)
    save_file(tensors, path, metadata={**info, "modelspec.title": "Mine", "ss_tag": "1"})
    assert Erasure.load(path).record == erasure.record


def test_the_file_has_the_names_and_the_alpha_that_every_loader_reads(erasure, path):
    found = load_file(path)
    for name, factor in erasure.factors.items():
        assert float(found[f"{name}.alpha"]) == erasure.rank
        delta = found[f"{name}.lora_up.weight"] @ found[f"{name}.lora_down.weight"]
        assert torch.equal(found[f"{name}.lora_up.weight"], factor)
        torch.testing.assert_close(delta, erasure.delta(name))
    assert len(found) == 3 * len(erasure.factors)


def replaced(record, place: str, value: str) -> str:
    """The record as JSON with other text where a value stands."""
    record = copy.deepcopy(dict(record))
    parent, *keys = record, *place.split(".")
    for key in keys[:-1]:
        parent = parent[int(key) if key.isdigit() else key]
    parent[int(keys[-1]) if keys[-1].isdigit() else keys[-1]] = "HERE"
    return json.dumps(record).replace('"HERE"', value)


@pytest.mark.parametrize("place", ["seconds", "steps_done", "concepts.0.moved", "odd.unread"])
@pytest.mark.parametrize("value", ["9" * 400, "-" + "9" * 21, "[" * 100_000 + "]" * 100_000])
def test_numbers_and_depths_that_nobody_means_are_refused(erasure, path, place, value):
    record = {**erasure.record, "odd": {}}
    write_record(path, erasure, replaced(record, place, value))
    with pytest.raises(ErasureFileError, match="digits|nested|is damaged"):
        Erasure.load(path)


@pytest.mark.parametrize("depth", [40, 900])
def test_a_depth_that_can_be_read_and_not_written_is_refused(erasure, path, depth):
    record = {**erasure.record, "odd": 1}
    write_record(path, erasure, replaced(record, "odd", "[" * depth + "]" * depth))
    with pytest.raises(ErasureFileError, match="nested too deeply"):
        Erasure.load(path)


@pytest.mark.parametrize(
    "place", ["concepts.0.text", "ended_by", "warnings", "settings.keep.0", "odd", "family"]
)
def test_half_a_character_is_refused(erasure, path, place):
    value = '["\\ud800"]' if place == "warnings" else '"a \\ud800 b"'
    write_record(path, erasure, replaced({**erasure.record, "odd": 1}, place, value))
    with pytest.raises(ErasureFileError, match="half of a character"):
        Erasure.load(path)


def test_half_a_character_is_not_written_either(erasure, tmp_path):
    for place in ("concepts.0.text", "settings.keep.0"):
        record = json.loads(replaced(erasure.record, place, '"a \\ud800"'))
        broken = Erasure(erasure.bases, erasure.factors, record)
        with pytest.raises(ErasureFileError, match="half of a character"):
            broken.save(tmp_path / "cat.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "place, value",
    [
        ("settings.captions", '"many"'),
        ("settings.captions", "Infinity"),
        ("settings.rank", "[1]"),
        ("settings.templates", "3"),
        ("settings.templates", "[[]]"),
        ("settings.keep", "[1]"),
        ("settings.kind", "{}"),
        ("settings.layers", "7"),
        ("settings.eta", "NaN"),
        ("settings.guidance_scale", "1e999"),
        ("concepts.0.kind", "[]"),
        ("version", '"' + "0.1" * 5000 + '"'),
        ("version", '"\\u001b[31m0.1"'),
    ],
)
def test_what_only_joining_reads_is_checked_too(erasure, path, place, value):
    write_record(path, erasure, replaced(erasure.record, place, value))
    with pytest.raises(ErasureFileError) as refusal:
        Erasure.load(path)
    assert len(str(refusal.value)) < 400


def test_figures_that_are_no_numbers_are_read_without_a_fault(erasure, path):
    """A run may measure what isn't finite; older versions wrote it down."""
    for value in ("NaN", "Infinity"):
        write_record(path, erasure, replaced(erasure.record, "measures.null_drift", value))
        use(Erasure.load(path))


def test_columns_of_a_narrower_matrix_are_refused(erasure, path):
    tensors = tensors_of(erasure)
    name = some_matrix(tensors)
    down, up = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
    tensors[down], tensors[up] = tensors[down][:1], tensors[up][:, :1].contiguous()
    tensors[f"{name}.alpha"] = torch.tensor(1.0)
    write(path, tensors, erasure.record)
    with pytest.raises(ErasureFileError, match=r"concepts\[.\].columns"):
        Erasure.load(path).without(["cat"])


def test_the_fault_that_is_there_is_named(erasure, path, monkeypatch):
    folder = path.with_name("folder.safetensors")
    folder.mkdir()
    with pytest.raises(ErasureFileError, match="not an ordinary file"):
        Erasure.load(folder)
    if hasattr(os, "mkfifo"):
        pipe = path.with_name("pipe.safetensors")
        os.mkfifo(pipe)
        with pytest.raises(ErasureFileError, match="not an ordinary file"):
            Erasure.load(pipe)

    def refuse(self, *args, **more):
        raise PermissionError(13, "Permission denied", str(self))

    for way in ("open", "stat"):
        with monkeypatch.context() as patch:
            patch.setattr(type(path), way, refuse)
            with pytest.raises(ErasureFileError, match="can't be read: Permission denied.*rights"):
                Erasure.load(path)


@pytest.mark.skipif(os.name == "nt", reason="needs a umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_rights_that_the_user_gives_files(erasure, tmp_path, umask):
    before = os.umask(umask)
    try:
        erasure.save(tmp_path / "cat.safetensors")
        erasure.save_new(tmp_path / "new.safetensors")
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_the_pooled_matrix_alone_is_not_left_out(erasure):
    name = "lora_unet_label_emb_0_0"
    (basis, *_), (factor, *_) = erasure.bases.values(), erasure.factors.values()
    only = Erasure({name: basis}, {name: factor}, {**erasure.record, "family": "SDXL"})
    with pytest.raises(ValueError, match="Nothing would be left"):
        only.without_pooled()
