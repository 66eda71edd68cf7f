"""Files whose record is of another version or damaged: said in words, never a bare error."""

import copy
import json

import pytest
from concept_surgery.erase_core import Erasure, ErasureFileError, erase, preset_settings
from concept_surgery.erase_core.artefact import formats
from concept_surgery.erase_core.artefact.report import report_text
from concept_surgery.erase_core.version import VERSION

from .toy import ToyDenoiser

SMALL = {"resolution": 32, "captions": 40, "sampling_steps": 4}
RUNS = {
    "sampled": {"trajectories": 8, "steps": 2, "keep": "a tree\na boat", "negative_prompts": "mud"},
    "instant": {"trajectories": 0, "steps": 0},
    "soft": {"trajectories": 8, "steps": 2, "form": "soft", "keep": "a tree", "layers": "*_to_q"},
}


@pytest.fixture(scope="module", params=RUNS)
def erasure(request) -> Erasure:
    values = {"concepts": "cat => dog\npizza => bread", **SMALL, **RUNS[request.param]}
    last = erase(
        preset_settings("balanced", **values), ToyDenoiser(values.get("layers", "key-value"))
    )
    return last


def read(erasure: Erasure, record) -> Erasure:
    """The erasure from a file with another record, through everything that is read of it."""
    tensors = formats.kohya_tensors(erasure.bases, erasure.factors)
    info = formats.metadata(erasure.record, tensors) | {formats.RECORD_KEY: json.dumps(record)}
    again = Erasure._from_file("cat.safetensors", tensors, info)
    report_text(again.record)
    formats.metadata(again.record, tensors)
    assert again.concept and again.parts
    return again


def places(value, path=()):
    """Every key and index in plain JSON values; of a list only the first."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from places(item, (*path, key))
    elif isinstance(value, list) and value:
        yield (*path, 0)
        yield from places(value[0], (*path, 0))


def changed(record, path, change):
    """A copy of the record in which ``change`` was done to the parent and key of one place."""
    record = copy.deepcopy(dict(record))
    parent = record
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return record


def test_what_a_run_writes_is_read(erasure):
    assert read(erasure, erasure.record).record == erasure.record
    if erasure.record["form"] == "hard":
        less = erasure.without(["cat"])
        assert read(less, less.record).record["taken_out"] == ["cat"]


CHANGES = {
    "gone": lambda parent, key: parent.pop(key),
    "none": lambda parent, key: parent.update({key: None}) if isinstance(parent, dict) else None,
    "text": lambda parent, key: parent.__setitem__(key, "odd"),
    "list": lambda parent, key: parent.__setitem__(key, [{}]),
    "empty": lambda parent, key: parent.__setitem__(key, []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_amiss_is_said_or_not_needed(erasure, change):
    refused = 0
    for path in places(erasure.record):
        try:
            read(erasure, changed(erasure.record, path, CHANGES[change]))
        except ErasureFileError as error:
            refused += 1
            assert str(error).startswith("cat.safetensors ") and "LoRA loader" in str(error)
    assert refused >= 10


@pytest.mark.parametrize(
    "record, words",
    [
        ([], "names no version and lacks or has wrong: everything"),
        ({}, "names no version and lacks or has wrong: version, created, family and"),
        ({"version": VERSION}, f"damaged: its record, of this version {VERSION}, lacks"),
        (
            {"version": "0.1.0"},
            f"written by version 0.1.0 .* this is {VERSION}.* Train the erasure",
        ),
    ],
)
def test_the_version_that_wrote_it_is_named(erasure, record, words):
    with pytest.raises(ErasureFileError, match=words):
        read(erasure, record)


def test_columns_beyond_the_tensors_are_refused(erasure):
    record = copy.deepcopy(dict(erasure.record))
    record["concepts"][1]["columns"] = [2, erasure.rank + 1]
    with pytest.raises(ErasureFileError, match=r"concepts\[1\].columns"):
        read(erasure, record)


def test_a_file_from_before_the_pooled_vector_was_edited_is_read(erasure):
    measures = {**erasure.record["measures"], "pooled": {"leak": 0.02, "moved_swapped": 0.9}}
    record = {**erasure.record, "version": "0.4.0", "measures": measures}
    assert "pooled vector goes past" in report_text(read(erasure, record).record)
    measures["pooled"]["left"] = "little"
    with pytest.raises(ErasureFileError, match="measures.pooled.left"):
        read(erasure, record)


def test_a_file_from_before_others_were_measured_is_read(erasure):
    measures = {k: v for k, v in erasure.record["measures"].items() if k != "unnamed_of"}
    record = {k: v for k, v in erasure.record.items() if k not in ("others", "training")}
    again = read(erasure, {**record, "version": "0.6.0", "measures": measures})
    text = report_text(again.record)
    assert text.startswith("Verdict: ") and "Prompts nobody named: drift" in text
    assert "What else changes" not in text and "Not trained" not in text


@pytest.mark.parametrize(
    "path, value",
    [
        ("others", {"change": 0.1}),
        ("others", {"change": "much", "words": [], "nearest": [], "most_changed": []}),
        ("training", 3),
        ("measures.unnamed_of", None),
    ],
)
def test_what_is_new_and_amiss_is_said(erasure, path, value):
    *parents, key = path.split(".")
    record = copy.deepcopy(dict(erasure.record))
    place = record
    for parent in parents:
        place = place[parent]
    place[key] = value
    with pytest.raises(ErasureFileError, match=path):
        read(erasure, record)
