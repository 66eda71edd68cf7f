"""Files under the names that diffusers reads, in the host; diffusers itself: test_diffusers.py."""

from __future__ import annotations

import comfy.lora
import pytest
import torch
from concept_surgery.erase_core import Erasure, erase, preset_settings
from concept_surgery.erase_core.artefact.saving import save_erasure
from concept_surgery.nodes.apply import apply_erasure
from concept_surgery.nodes.files import SaveErasure
from concept_surgery.nodes.matrices import kohya_keys, original_weights, trained_keys
from safetensors.torch import load_file

from ..core.toy import ToyDenoiser
from .small import built_model

RANK = 3


@pytest.fixture(scope="module")
def record():
    """That of some erasure; what it is of doesn't matter here."""
    values = {"captions": 40, "trajectories": 0, "steps": 0, "resolution": 32}
    last = erase(preset_settings("instant", concepts="cat", **values), ToyDenoiser())
    return {**last.record, "rank": RANK}


def random_erasure(shapes, family: str, record) -> Erasure:
    """An erasure of matrices of the given shapes, by kohya name."""
    generator = torch.Generator().manual_seed(0)
    bases, factors = {}, {}
    for name, (rows, width) in shapes.items():
        bases[name] = torch.linalg.qr(torch.randn(width, RANK, generator=generator))[0]
        factors[name] = torch.randn(rows, RANK, generator=generator)
    return Erasure(bases, factors, {**record, "family": family})


@pytest.fixture(scope="module", params=["SD3", "Flux"])
def joint(request, record):
    """A MODEL of the host, and an erasure of the matrices that the family trains by itself."""
    model, _ = built_model(request.param.lower())
    shapes = {n: w.shape for n, w in original_weights(model, trained_keys(model)).items()}
    assert len(shapes) == 2
    return model, random_erasure(shapes, request.param, record)


def test_the_host_reads_both_spellings_alike(joint, tmp_path):
    model, erasure = joint
    keys, patched = kohya_keys(model), {}
    for names in ("kohya", "diffusers"):
        file = load_file(save_erasure(erasure, tmp_path, "cat", names))
        patched[names] = comfy.lora.load_lora(file, keys)
    assert (
        patched["kohya"].keys() == patched["diffusers"].keys() == set(trained_keys(model).values())
    )
    for key, weight in original_weights(model, trained_keys(model)).items():
        host_key = trained_keys(model)[key]
        first, second = (
            comfy.lora.calculate_weight(
                [(1.0, patched[names][host_key], 1.0, None, None)], weight.float().clone(), host_key
            )
            for names in ("kohya", "diffusers")
        )
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
        torch.testing.assert_close(first - weight, erasure.delta(key), rtol=1e-4, atol=1e-5)


def test_a_file_for_diffusers_is_loaded_and_applied_here_too(joint, tmp_path):
    model, erasure = joint
    path = save_erasure(erasure, tmp_path, "cat", "diffusers")
    again = Erasure.load(path)
    assert again.identity == erasure.identity
    assert apply_erasure(model, again, 1.0).patches.keys() == set(trained_keys(model).values())


def test_both_spellings_lie_beside_each_other_and_each_is_written_once(joint, tmp_path):
    _, erasure = joint
    first = save_erasure(erasure, tmp_path, "cat")
    second = save_erasure(erasure, tmp_path, "cat", "diffusers")
    assert first != second
    assert save_erasure(erasure, tmp_path, "cat") == first
    assert save_erasure(erasure, tmp_path, "cat", "diffusers") == second


def test_the_choice_is_an_input_of_save_that_older_graphs_lack():
    (choice,) = [one for one in SaveErasure.define_schema().inputs if one.id == "names"]
    assert (choice.options, choice.default, choice.optional) == (
        ["kohya", "diffusers"],
        "kohya",
        True,
    )
