"""The key of a result: it changes if and only if an ingredient does; and reuse by the engine."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from concept_surgery.erase_core import (
    EraseSettings,
    Meter,
    PredictionError,
    erase,
    preset_settings,
)
from concept_surgery.erase_core.artefact import identity
from concept_surgery.erase_core.artefact.identity import (
    REUSE,
    SUMMED_WORDS,
    NoStoredResultError,
    bytes_on_cpu,
    middle_bytes,
    result_key,
    stored_result,
    tensor_bytes,
    word_sums,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from .toy import ToyDenoiser

SMALL = {"resolution": 32, "captions": 40, "trajectories": 8, "sampling_steps": 4, "steps": 6}

words = st.text(alphabet="abcdefgh", min_size=1, max_size=6)
wanted = st.fixed_dictionaries(
    {
        "concepts": st.builds("c {} => a {}".format, words, words),
        "keep": st.lists(words, max_size=2).map(tuple),
        "kind": st.sampled_from(["object", "style"]),
        "eta": st.sampled_from([0.0, 0.5, 1, 1.0]),
        "protection": st.sampled_from([None, 1, 1.0, 1e-3]),
        "steps": st.integers(1, 3),
        "seed": st.sampled_from([0, 1, 2**64 - 1]),
    }
)
embeddings = st.lists(
    st.lists(st.integers(-2, 2), min_size=1, max_size=3).map(lambda v: torch.tensor(v).float()),
    max_size=3,
)
ingredients = st.tuples(
    wanted, embeddings, st.sampled_from(["aa", "bb"]), st.sampled_from(["1", "2"])
)


def key(wanted, embeddings, model, version):
    return result_key(preset_settings("balanced", **wanted), embeddings, model, version)


def same(one, other):
    asked = [preset_settings("balanced", **which[0]).as_dict() for which in (one, other)]
    rows = [[tuple(tensor.tolist()) for tensor in which[1]] for which in (one, other)]
    return asked[0] == asked[1] and rows[0] == rows[1] and one[2:] == other[2:]


@settings(max_examples=300, deadline=None)
@given(ingredients, ingredients)
def test_keys_are_equal_if_and_only_if_the_ingredients_are(one, other):
    assert (key(*one) == key(*other)) == same(one, other)
    assert key(*one) == key(one[0], [rows.clone() for rows in one[1]], *one[2:])


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EraseSettings)])
def test_every_setting_counts(name):
    asked = preset_settings("balanced", concepts="cat", form="soft", protection=1.0)
    others = {
        "concepts": "dog",
        "keep": "a tree",
        "negative_prompts": "a tree",
        "templates": "a photo of {}",
        "kind": "style",
        "form": "hard",
        "layers": "attention",
        "null_score": "student",
        "weighting": "image",
        "driven_by": "erased",
        "warm_start": False,
        "stop_below": 0.1,
        "resolution": 256,
        "keep_room": 0.1,
    }
    new = others[name] if name in others else getattr(asked, name) + 1
    changed = dataclasses.replace(asked, **{name: new})
    assert result_key(asked, [], "aa", "1") != result_key(changed, [], "aa", "1")


def test_the_key_is_the_same_on_every_machine():
    """Values written down: a change of one makes everybody train again."""
    asked = SimpleNamespace(as_dict=lambda: {"concept": "cat", "keep": ["é"], "eta": 0.0})
    rows = torch.arange(6).reshape(2, 3).float()
    assert result_key(asked, [rows, rows], "ab", "1") == "f6654bdc5aa7e269d5d4ff20125d1fb43c11bef8"
    sums = word_sums(torch.arange(SUMMED_WORDS + 2, dtype=torch.int32))
    assert sums.tolist() == [2930332852026860, -7336156495123184023]


sizes = st.sampled_from([0, 1, 2, 3, 5, SUMMED_WORDS - 1, SUMMED_WORDS, 2 * SUMMED_WORDS + 3])
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.uint8])


def numbers(size, dtype):
    generator = torch.Generator().manual_seed(size)
    return (torch.rand(size, generator=generator) * 200).to(dtype)


@settings(max_examples=60, deadline=None)
@given(sizes, dtypes, st.data())
def test_sums_show_any_single_change_and_nothing_else(size, dtype, data):
    tensor = numbers(size, dtype)
    before = word_sums(tensor)
    shifted = torch.cat([tensor[:1], tensor])[1:]  # the same values at an odd address
    assert torch.equal(word_sums(shifted), before)
    assert torch.equal(word_sums(tensor.reshape(1, -1)), before)
    if size:
        place = data.draw(st.integers(0, size - 1))
        changed = tensor.clone()
        changed.view(torch.uint8)[place * tensor.element_size()] ^= 1 << data.draw(
            st.integers(0, 7)
        )
        assert not torch.equal(word_sums(changed), before)


def test_sums_show_what_simple_sums_would_miss():
    tensor = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    before = word_sums(tensor)
    swapped = tensor.clone()
    swapped[[0, 1]] = tensor[[1, 0]]
    for other in (swapped, -tensor, tensor.T, tensor.flip(0), tensor.roll(1, 1)):
        assert not torch.equal(word_sums(other), before)
    assert torch.equal(word_sums(tensor.T.contiguous()), word_sums(tensor.T))


def test_two_ways_to_sum_agree():
    """Accelerators take the other way; the result must not tell which it was."""
    tensor = numbers(3 * SUMMED_WORDS, torch.int32)
    sums = (tensor.view(3, -1) * identity._sum_keys()).sum(dim=1)
    assert torch.equal(sums, word_sums(tensor))


def test_samples_are_from_the_middle_and_come_over_together():
    tensor = torch.arange(1000, dtype=torch.int16)
    sample = middle_bytes(tensor, 20)
    assert sample.view(torch.int16).tolist() == list(range(495, 505))
    assert bytes(tensor_bytes(middle_bytes(tensor[:3], 20))) == bytes(tensor_bytes(tensor[:3]))
    parts = [tensor[:2], tensor[:0], torch.ones(1, 1, dtype=torch.bfloat16), sample]
    assert bytes_on_cpu(parts) == [bytes(tensor_bytes(part)) for part in parts]


def run(toy, results, reuse=REUSE[0], should_stop=lambda: False, **values):
    asked = preset_settings("balanced", **{"concepts": "cat => dog", **SMALL, **values})
    seen, meter = [], Meter(lambda progress: seen.append(progress), should_stop)
    erasure = erase(asked, toy, meter=meter, results=results, reuse=reuse)
    return [*seen, erasure, meter.reused]


def test_the_second_run_makes_no_prediction_and_reads_no_captions():
    results = {}
    *_, first, reused = run(ToyDenoiser(), results)
    assert list(results.values()) == [first] and not reused
    toy = ToyDenoiser()
    *progress, again, reused = run(toy, results)
    assert toy.calls == 0 and len(progress) == 1
    assert again is first and reused
    assert not run(toy, results, seed=1)[-1] and toy.calls and len(results) == 2


def test_another_model_is_trained_on():
    results = {}
    run(ToyDenoiser(), results)
    toy = ToyDenoiser()
    toy.identity = "71"
    assert not run(toy, results)[-1]


def test_train_again_replaces_and_use_only_never_trains():
    results, toy = {}, ToyDenoiser()
    with pytest.raises(NoStoredResultError, match="'use only' forbids to train"):
        run(toy, results, "use only")
    assert toy.calls == 0 and not results
    first = run(toy, results)[-2]
    assert run(toy, results, "use only")[-1]
    calls = toy.calls
    *_, again, reused = run(toy, results, "train again")
    assert toy.calls == 2 * calls and not reused
    (stored,) = results.values()
    assert stored is again is not first
    with pytest.raises(ValueError, match="Unknown choice 'maybe'"):
        run(toy, results, "maybe")


def test_what_was_stopped_before_its_end_is_stored_but_not_served():
    results, toy = {}, ToyDenoiser()
    answers = iter([False] * 2 + [True])
    stopped = run(toy, results, should_stop=lambda: next(answers))[-2]
    assert list(results.values()) == [stopped]
    with pytest.raises(NoStoredResultError):
        run(toy, results, "use only")
    assert not run(toy, results)[-1]
    assert run(toy, results)[-1]


def test_an_error_stores_nothing():
    results, toy = {}, ToyDenoiser()
    toy.out.weight[0, 0] = torch.nan
    with pytest.raises(PredictionError, match="NaN"):
        run(toy, results)
    assert not results and stored_result(None, "aa") is None
