"""Three hundred files that went wrong: each works, or is refused in words of our own."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import folder_paths
import pytest
import torch
from concept_surgery.erase_core import (
    Erasure,
    ErasureFileError,
    SettingsError,
    preset_settings,
)
from concept_surgery.erase_core import erase as run
from concept_surgery.erase_core.artefact import formats
from concept_surgery.erase_core.artefact.erasure import ErasureError
from concept_surgery.erase_core.artefact.language_store import LanguageStore
from concept_surgery.erase_core.artefact.results import ResultStore
from concept_surgery.erase_core.artefact.saving import save_erasure
from concept_surgery.erase_core.artefact.stack import overlap_warnings
from concept_surgery.erase_core.artefact.together import settings_together, warnings_together
from concept_surgery.nodes.apply import (
    ApplyError,
    applied_to,
    apply_erasure,
    mismatches,
    stack_report,
)
from concept_surgery.nodes.files import LoadErasure, SaveErasure
from concept_surgery.nodes.join import other_bases
from concept_surgery.nodes.matrices import original_weights, trained_keys
from concept_surgery.nodes.take_out import TakeConceptsOut
from safetensors.torch import save

from ..core.toy import ToyDenoiser

TOY = {"resolution": 32, "captions": 40, "trajectories": 4, "sampling_steps": 4, "steps": 2}
KEY = "0123456789abcdef"
OURS = (ErasureError, ApplyError, SettingsError)
LONGEST_SECONDS = 5.0


@pytest.fixture(scope="module")
def erasure(loaded) -> Erasure:
    """An erasure of the checkpoint's matrices, with the record of another run."""
    settings = preset_settings("balanced", concepts="cat => dog\npizza", keep=("a tree",), **TOY)
    last = run(settings, ToyDenoiser())
    weights = original_weights(loaded[0], trained_keys(loaded[0]))
    generator, rank = torch.Generator().manual_seed(0), last.rank
    width = next(iter(weights.values())).shape[1]
    basis = torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q
    factors = {n: 0.01 * torch.randn(len(w), rank, generator=generator) for n, w in weights.items()}
    return Erasure(dict.fromkeys(factors, basis), factors, last.record)


def file_of(record: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A file whose hash is right."""
    own = {formats.RECORD_KEY: record, formats.HASH_KEY: formats.content_hash(record, tensors)}
    return save(tensors, metadata={**metadata, **own})


def with_header(data: bytes, change: Callable[[dict], None]) -> bytes:
    """A file with another header, and the hash that it had."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def flip(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 20))):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def flip_header(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    changed[chance.randrange(8 + int.from_bytes(data[:8], "little"))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(chance: random.Random, data: bytes) -> bytes:
    if chance.random() < 0.2:
        return data + chance.randbytes(chance.randrange(1, 100))
    return data[: chance.choice((0, 4, 8, 9, chance.randrange(len(data))))]


def edit_header(chance: random.Random, data: bytes) -> bytes:
    def change(header: dict) -> None:
        names = [name for name in header if name != "__metadata__"]
        one, other = chance.sample(names, 2)
        entry, metadata = header[one], header["__metadata__"]
        key = chance.choice(sorted(metadata))
        chance.choice(
            (
                lambda: entry.update(dtype=chance.choice(("F16", "I32", "F4", "odd", 7, []))),
                lambda: entry.update(shape=chance.choice(([0], [-1], [2**63], [[]], "x", None))),
                lambda: entry.update(
                    data_offsets=chance.choice(([0, 4], [9, 1], [], 0, [0, 2**70]))
                ),
                lambda: header.update({one: header[other], other: header[one]}),
                lambda: header.update({one + chance.choice("x \u202e\ud800"): header.pop(one)}),
                lambda: header.update({"x" * 10_000 + one: header.pop(one)}),
                lambda: header.pop(one),
                lambda: header.update({one: chance.choice((None, [], 1, "x"))}),
                lambda: metadata.pop(key),
                lambda: metadata.update({key: chance.choice(("", "0", "{}", "\u202e", 1, None))}),
                lambda: header.update(__metadata__=chance.choice((None, [], "x", {"a": {}}))),
            )
        )()

    return with_header(data, change)


def change_tensors(chance: random.Random, erasure: Erasure) -> bytes:
    tensors = formats.kohya_tensors(erasure.bases, erasure.factors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name = chance.choice(sorted(tensors))
    tensor, (stem, _, rest) = tensors[name], name.partition(".")
    new = f"{chance.choice(('diffusion_model.out.2.bias', 'lora_te_x', 'x', '', 'a/../b'))}.{rest}"
    chance.choice(
        (
            lambda: tensors.update({name: tensor.to(chance.choice((torch.half, torch.int64)))}),
            lambda: tensors.update({name: tensor.reshape(-1)[:0]}),
            lambda: tensors.update({name: tensor[None]}),
            lambda: tensors.update({name: tensor.reshape(-1)}),
            lambda: tensors.update({name: tensor.T.contiguous() if tensor.ndim == 2 else -tensor}),
            lambda: tensor.fill_(chance.choice((float("nan"), float("inf"), 1e30, 3e38, 0, -1))),
            lambda: tensors.update({new: tensors.pop(name)}),
            lambda: [
                tensors.update({f"{new.partition('.lora')[0]}.{end}": tensors.pop(f"{stem}.{end}")})
                for end in ("lora_up.weight", "lora_down.weight", "alpha")
            ],
            lambda: [
                tensors.pop(f"{stem}.{end}")
                for end in ("lora_up.weight", "lora_down.weight", "alpha")
            ],
        )
    )()
    return file_of(json.dumps(dict(erasure.record)), tensors, {})


VALUES = [
    *("null", "true", "-1", "0", "1e308", "-1e308", "1e999", "NaN", "-Infinity", "1e-320"),
    *("9" * 19, "9" * 400, '""', "[]", "{}", "[[]]", '[""]', "[0, 0]", "[0, 1]", "[null]"),
    *('"{}"', '"%s%n"', '"\\u202e"', '"\\ud800"', '"\\u0000"', '"\\u001b[2J"', '"<b>"', '{"a": 1}'),
    *("[" * 31 + "]" * 31, "[" * 5000 + "]" * 5000, '"' + "x" * 100_000 + '"', "[1.5, NaN]"),
]


def places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


def change_record(chance: random.Random, erasure: Erasure) -> bytes:
    record = copy.deepcopy(dict(erasure.record))
    record["odd"] = {}
    values = {}
    for number in range(chance.choice((1, 1, 3))):
        path = chance.choice(list(places(record)))
        parent = record
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]], values[f'"HERE {number}"'] = f"HERE {number}", chance.choice(VALUES)
    text = json.dumps(record)
    for mark, value in values.items():
        text = text.replace(mark, value)
    return file_of(text, formats.kohya_tensors(erasure.bases, erasure.factors), {})


def mutated(erasure: Erasure, whole: bytes, number: int) -> bytes:
    """File ``number`` of all; the same each time."""
    chance = random.Random(number)
    ways = (
        (flip, whole),
        (flip_header, whole),
        (cut, whole),
        (edit_header, whole),
        (change_tensors, erasure),
        (change_record, erasure),
        (change_record, erasure),
    )
    way, given = ways[number % len(ways)]
    return way(chance, given)


def use(model, other: Erasure, folder: Path, filename: str) -> None:
    """A file through Load, Apply in both modes, Take out, Join and Save."""
    (erasure, report) = LoadErasure.execute(filename).args
    report.encode()
    assert str(erasure.identity) and len(json.dumps(dict(erasure.record))) > 0

    def apply(mode):
        patched = apply_erasure(model, erasure, 1.0, mode)
        overlap_warnings(applied_to(patched), other)
        stack_report(patched)
        twice = apply_erasure(patched, other, -0.5, mode)  # refused where they have something
        stack_report(twice).encode()

    steps = [
        lambda: apply("merge"),
        lambda: apply("exact"),
        lambda: mismatches(model, erasure, None, ""),
        lambda: other_bases(model, [erasure], ""),
        lambda: TakeConceptsOut.execute(erasure, erasure.record["concepts"][0]["text"]),
        lambda: settings_together([erasure.record, other.record]),
        lambda: warnings_together([other.record, erasure.record]),
        lambda: SaveErasure.execute(erasure, "again/cat"),
        lambda: SaveErasure.execute(erasure, "again/cat", pooled_vector=False),
        lambda: Erasure.load(save_erasure(erasure, folder, "copy")),
    ]
    for step in steps:
        try:
            step()
        except OURS as error:
            assert str(error).strip()


@pytest.fixture
def loras(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(tmp_path)])
    return tmp_path


def test_each_works_or_is_refused_in_words(loaded, erasure, loras, tmp_path_factory, monkeypatch):
    work = tmp_path_factory.mktemp("files")
    said: list[str] = []
    results = ResultStore(work, said.append)
    results[KEY] = erasure
    (file,) = work.iterdir()
    whole, outcome = file.read_bytes(), {"works": 0, "refused": 0}
    monkeypatch.setattr(folder_paths, "get_full_path", lambda folder, name: str(file))
    for number in range(300):
        data = mutated(erasure, whole, number)
        file.write_bytes(data)
        began = time.monotonic()
        try:
            use(loaded[0], erasure, loras, file.name)
            outcome["works"] += 1
        except ErasureFileError as error:
            assert str(error).startswith(file.name) and len(str(error)) < 500, number
            str(error).encode()
            outcome["refused"] += 1
        found = results.get(KEY)
        assert found is None or found.record["complete"], number
        assert time.monotonic() - began < LONGEST_SECONDS, number
        if number % 10 == 0:  # whatever lies there is written over
            results[KEY] = erasure
            assert results[KEY].identity == erasure.identity
        for path in loras.rglob("*.safetensors"):
            path.unlink()
    assert outcome["refused"] > 200 and outcome["works"] > 20, outcome
    assert all("can't be used" in text for text in said)


def test_what_was_read_of_language_is_whole_or_absent(tmp_path):
    rows = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    LanguageStore(tmp_path)[KEY] = rows
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    hash_of = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    for number in range(300):
        chance = random.Random(number)
        if number % 4 < 3:
            file.write_bytes((flip, flip_header, cut)[number % 4](chance, whole))
        else:  # another tensor under the hash of this one
            other = chance.choice((rows.half(), rows[0], rows / 0, rows.to(torch.int32), rows[:0]))
            file.write_bytes(save({"moment": other.contiguous()}, metadata=hash_of))
        store = LanguageStore(tmp_path)
        found = store.get(KEY)
        assert found is None or torch.equal(found, rows), number
        if found is None:
            store[KEY] = rows
            assert torch.equal(LanguageStore(tmp_path)[KEY], rows), number


def test_no_name_of_a_weight_that_is_no_matrix_ends_apply(loaded, erasure):
    model = loaded[0]
    keys = [key for key in model.model.state_dict() if key.startswith("diffusion_model.")]
    (basis, *_), (factor, *_) = erasure.bases.values(), erasure.factors.values()
    for key in (next(k for k in keys if k.endswith("bias")), "diffusion_model.out.2.bias"):
        broken = Erasure({key: basis}, {key: factor}, erasure.record)
        with pytest.raises(ApplyError, match="lacks 1 of its 1 matrices"):
            apply_erasure(model, broken, 1.0)


def test_a_matrix_under_two_names_is_refused(loaded, erasure):
    name = next(iter(erasure.factors))
    key = trained_keys(loaded[0])[name].removesuffix(".weight")
    bases = {**erasure.bases, key: erasure.bases[name]}
    factors = {**erasure.factors, key: erasure.factors[name]}
    with pytest.raises(ApplyError, match="under several names"):
        apply_erasure(loaded[0], Erasure(bases, factors, erasure.record), 1.0)
