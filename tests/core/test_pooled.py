"""Models with a pooled vector beside the tokens: it is edited, and what comes through measured."""

import pytest
import torch
from concept_surgery.erase_core import Erasure, erase, preset_settings, report_text
from concept_surgery.erase_core.method.encoded import EncodedPair
from concept_surgery.erase_core.model.low_rank import LowRankEdit, LowRankSidePath
from concept_surgery.erase_core.model.prompt import Encoded, stack_pooled
from concept_surgery.erase_core.run.measure import pooled_leak
from concept_surgery.erase_core.run.states import states_at
from concept_surgery.erase_core.settings.families import SDXL
from torch import nn

from .toy import CHANNELS, ToyDenoiser

SIZE, BESIDE = 24, 8
LABEL = SDXL.pooled_matrix
# A fifth of the trajectories is to check on. Of one phrasing alone a sixth may be left, or a
# hundredth: four of them say what is left of the concept.
SMALL = {"resolution": 32, "captions": 40, "trajectories": 20, "sampling_steps": 4, "steps": 20}


class PooledToy(ToyDenoiser):
    """A pooled vector, the mean of the words, is added to every pixel of eps."""

    def __init__(self, effect, layers="key-value"):
        super().__init__(layers)
        self.effect = effect * torch.randn(
            SIZE, CHANNELS, generator=torch.Generator().manual_seed(1)
        )

    def encode(self, prompts, together=False):
        plain = super().encode(prompts)
        return [Encoded(p.tokens, None if together else p.tokens.mean(0)[:SIZE]) for p in plain]

    def predict_x0(self, x, sigma, prompts, edit=None):
        added = self.added(prompts, edit)[:, :, None, None]
        return super().predict_x0(x, sigma, prompts, edit) - sigma.view(-1, 1, 1, 1) * added

    def added(self, prompts, edit):
        return stack_pooled(prompts) @ self.effect


class LabelToy(PooledToy):
    """The pooled vector goes through a matrix that reads other numbers too, as in SDXL."""

    family = "SDXL"

    def __init__(self, effect=0.3, layers="key-value"):
        super().__init__(effect, layers)
        self.label = nn.Linear(SIZE + BESIDE, SIZE, bias=False).requires_grad_(False)
        self._trained[LABEL] = self.label
        self._label_path = LowRankSidePath({LABEL: self.label})

    def added(self, prompts, edit):
        pooled = stack_pooled(prompts)
        read = torch.cat([pooled, pooled.new_full((len(pooled), BESIDE), 0.5)], 1)
        with self._label_path.active(edit, [read]):
            return torch.tanh(self.label(read)) @ self.effect

    def read_by_label(self, edit, prompt):
        """What an edit adds to what the matrix gives for a prompt."""
        return prompt.pooled @ edit.bases[LABEL][:SIZE] @ edit.factors[LABEL].T


def eps(toy, x, sigma, prompt):
    return (x - toy.predict_x0(x, sigma, [prompt] * len(x))) / sigma.view(-1, 1, 1, 1)


def test_the_leak_is_what_the_pooled_vector_alone_brings_back():
    toy = PooledToy(0.05)
    cat, dog, null = toy.encode(["a cat", "a dog", ""])
    generator = torch.Generator().manual_seed(2)
    x, sigma = (
        torch.randn(4, CHANNELS, 4, 4, generator=generator),
        torch.tensor([9.0, 3.0, 1.0, 0.3]),
    )
    prompts = [null] * 4 + [cat] * 4 + [dog] * 4
    x0 = toy.predict_x0(x.repeat(3, 1, 1, 1), sigma.repeat(3), prompts)
    states = states_at(x, sigma, x0, [0] * 4)
    nothing = LowRankEdit(
        {n: torch.eye(w.shape[1])[:, :1] for n, w in toy.matrices().items()},
        {n: torch.zeros(w.shape[0], 1) for n, w in toy.matrices().items()},
    )
    found = pooled_leak(toy, [EncodedPair(cat, dog)], states, nothing, 3)
    way = eps(toy, x, sigma, cat) - eps(toy, x, sigma, dog)
    alone = ((cat.pooled - dog.pooled) @ toy.effect)[None, :, None, None].expand_as(way)
    whole = way.square().sum()
    assert found["leak"] == pytest.approx(float(alone.square().sum() / whole), rel=1e-3)
    assert found["left"] == pytest.approx(found["leak"], rel=1e-3)


def test_the_run_measures_it_and_counts_it():
    record = {}
    for effect in (0.0, 0.02, 0.05):
        values = {**SMALL, "captions": 1000}
        settings = preset_settings("balanced", concepts="cat => dog", keep=("a tree",), **values)
        toy = PooledToy(effect)
        finished = erase(settings, toy)
        record[effect] = finished.record
        assert finished.record["forward_equivalents"] == toy.calls
        assert finished.record["measures"]["null_drift"] <= 1e-5
    assert record[0.0]["measures"]["pooled"]["leak"] == pytest.approx(0, abs=1e-6)
    leaks = [record[effect]["measures"]["pooled"]["leak"] for effect in (0.0, 0.02, 0.05)]
    assert leaks == sorted(leaks) and leaks[2] > 2 * leaks[1]
    assert all(r["measures"]["moved_held_out"]["overall"] >= 0.8 for r in record.values())
    assert "pooled vector goes past" in report_text(record[0.05])


def test_a_kept_prompt_goes_with_its_own_pooled_vector():
    toy = PooledToy(0.05)
    asked = []
    whole = toy.predict_x0

    def predict(x, sigma, prompts, edit=None):
        asked.extend(prompts)
        return whole(x, sigma, prompts, edit)

    toy.predict_x0 = predict
    settings = preset_settings("balanced", concepts="cat => dog", keep=("a tree",), **SMALL)
    finished = erase(settings, toy)
    tree = toy.encode(["a tree"])[0]
    with_its_tokens = [p for p in asked if torch.equal(p.tokens, tree.tokens)]
    assert with_its_tokens and all(torch.equal(p.pooled, tree.pooled) for p in with_its_tokens)
    assert finished.record["measures"]["kept"][0]["drift"] <= 1e-5


def trained(toy, **values):
    settings = preset_settings("balanced", **{"concepts": "cat => dog", **SMALL, **values})
    finished = erase(settings, toy)
    return finished


def test_the_matrix_that_reads_it_is_edited_too():
    toy = LabelToy()
    erasure = trained(toy, keep=("a tree",), negative_prompts=("blurry",))
    measures, edit = erasure.record["measures"], erasure.edit()
    assert measures["pooled"]["leak"] > 0.05
    assert measures["pooled"]["left"] < 0.1 * measures["pooled"]["leak"]
    assert measures["moved_held_out"]["overall"] >= 0.9
    assert erasure.record["forward_equivalents"] == toy.calls
    cat, dog = toy.encode(["a photo of a cat", "a photo of a dog"])
    way = (dog.pooled - cat.pooled) @ toy.label.weight[:, :SIZE].T
    assert (toy.read_by_label(edit, cat) - way).norm() < 0.35 * way.norm()
    for text in ("", "a tree", "blurry"):
        gone = toy.read_by_label(edit, toy.encode([text])[0])
        assert gone.norm() <= 1e-5 * way.norm(), text
    assert float(edit.bases[LABEL][SIZE:].abs().max()) == 0  # the numbers beside it aren't read
    assert measures["null_leakage"] <= 1e-6 and measures["null_drift"] <= 1e-5
    assert "after the erasure" in report_text(erasure.record)


def test_instant_edits_it_without_a_prediction():
    toy = LabelToy()
    settings = preset_settings("instant", concepts="cat => dog", captions=40)
    finished = erase(settings, toy)
    assert toy.calls == 0 and LABEL in finished.factors
    cat, dog = toy.encode(["a photo of a cat", "a photo of a dog"])
    way = (dog.pooled - cat.pooled) @ toy.label.weight[:, :SIZE].T
    left = toy.read_by_label(finished.edit(), cat) - way
    assert left.norm() < 0.35 * way.norm()


def test_each_concept_has_columns_of_its_own_there(tmp_path):
    toy = LabelToy()
    both = trained(toy, concepts="cat => dog\nboat => lamp")
    both.save(tmp_path / "both.safetensors")
    one = Erasure.load(tmp_path / "both.safetensors").without(["boat"])
    cat, boat = toy.encode(["a photo of a cat", "a photo of a boat"])
    whole, alone = both.edit(), one.edit()
    start, end = both.record["concepts"][0]["columns"]
    own = slice(start, end)
    assert torch.equal(alone.factors[LABEL], whole.factors[LABEL][:, own])
    assert torch.equal(alone.bases[LABEL], whole.bases[LABEL][:, own])
    moved = {text: toy.read_by_label(alone, p).norm() for text, p in (("cat", cat), ("boat", boat))}
    assert moved["boat"] < 0.5 * moved["cat"]


@pytest.mark.parametrize("layers", ["key-value", "cross-attention"])
def test_the_soft_form_edits_it_as_well(layers):
    erasure = trained(LabelToy(layers=layers), form="soft", keep=("a tree",), layers=layers)
    pooled = erasure.record["measures"]["pooled"]
    assert LABEL in erasure.factors and pooled["left"] < 0.2 * pooled["leak"]


def test_it_stays_where_what_must_stay_leaves_no_way():
    toy = LabelToy()
    same = toy.encode(["a cat"])[0].pooled
    encode = PooledToy.encode

    def alike(prompts, together=False):
        return [Encoded(p.tokens, None if together else same) for p in encode(toy, prompts)]

    toy.encode = alike
    erasure = trained(toy)
    assert LABEL not in erasure.factors
    assert erasure.record["measures"]["pooled"]["left"] is None


def test_where_no_matrix_reads_tokens_alone_it_trains_from_nothing():
    toy = LabelToy(layers="*_to_out")
    erasure = trained(toy, form="soft", layers="*_to_out", steps=60, learning_rate=0.02)
    pooled = erasure.record["measures"]["pooled"]
    assert LABEL in erasure.factors and pooled["left"] < 0.9 * pooled["leak"]


def test_a_file_can_leave_it_out(tmp_path):
    erasure = trained(LabelToy())
    erasure.without_pooled().save(tmp_path / "cat.safetensors")
    file = Erasure.load(tmp_path / "cat.safetensors")
    assert set(file.factors) == set(erasure.factors) - {LABEL}
    assert all(torch.equal(file.factors[name], erasure.factors[name]) for name in file.factors)
    assert file.record["matrices"] == len(file.factors)
    text = report_text(file.record)
    assert "left out of the file" in text and "pooled vector goes past" in text
    assert file.without_pooled() is file


def test_the_users_protection_holds_it_back_too():
    toy, changes = LabelToy(), []
    cat = toy.encode(["a photo of a cat"])[0]
    for protection in (0.1, 100.0):
        settings = preset_settings(
            "instant", concepts="cat => dog", captions=40, protection=protection
        )
        finished = erase(settings, toy)
        changes.append(float(toy.read_by_label(finished.edit(), cat).norm()))
    assert changes[1] < 0.8 * changes[0]
