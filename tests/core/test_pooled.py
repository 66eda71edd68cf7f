"""Models with a pooled vector beside the tokens: what goes through it is measured."""

import pytest
import torch
from concept_surgery.erase_core import erase, preset_settings, report_text
from concept_surgery.erase_core.denoiser import Encoded, LowRankEdit, stack_pooled
from concept_surgery.erase_core.measure import pooled_leak
from concept_surgery.erase_core.states import EncodedPair, states_at

from .toy import CHANNELS, ToyDenoiser

SIZE = 24
SMALL = {"resolution": 32, "captions": 40, "trajectories": 8, "sampling_steps": 4, "steps": 20}


class PooledToy(ToyDenoiser):
    """A pooled vector, the mean of the words, is added to every pixel of eps."""

    def __init__(self, effect):
        super().__init__()
        self.effect = effect * torch.randn(
            SIZE, CHANNELS, generator=torch.Generator().manual_seed(1)
        )

    def encode(self, prompts, together=False):
        plain = super().encode(prompts)
        return [Encoded(p.tokens, None if together else p.tokens.mean(0)[:SIZE]) for p in plain]

    def predict_x0(self, x, sigma, prompts, edit=None):
        added = (stack_pooled(prompts) @ self.effect)[:, :, None, None]
        return super().predict_x0(x, sigma, prompts, edit) - sigma.view(-1, 1, 1, 1) * added


def returned(generator):
    """What a generator returns at its end."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


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
    found = returned(pooled_leak(toy, [EncodedPair(cat, dog)], states, nothing, 0.0, 3))
    way = eps(toy, x, sigma, cat) - eps(toy, x, sigma, dog)
    alone = ((cat.pooled - dog.pooled) @ toy.effect)[None, :, None, None].expand_as(way)
    whole = way.square().sum()
    assert found["leak"] == pytest.approx(float(alone.square().sum() / whole), rel=1e-3)
    left = float((way - alone).square().sum() / whole)
    assert found["moved_swapped"] == pytest.approx(1 - left, rel=1e-3)


def test_the_run_measures_it_and_counts_it():
    record = {}
    for effect in (0.0, 0.02, 0.05):
        settings = preset_settings("balanced", concepts="cat => dog", keep=("a tree",), **SMALL)
        toy = PooledToy(effect)
        *_, finished = erase(settings, toy)
        record[effect] = finished.erasure.record
        assert finished.erasure.record["forward_equivalents"] == toy.calls
        assert finished.erasure.record["measures"]["null_drift"] <= 1e-5
    assert record[0.0]["measures"]["pooled"]["leak"] == pytest.approx(0, abs=1e-6)
    leaks = [record[effect]["measures"]["pooled"]["leak"] for effect in (0.0, 0.02, 0.05)]
    assert leaks == sorted(leaks) and leaks[2] > 2 * leaks[1]
    assert all(r["measures"]["moved_held_out"]["overall"] >= 0.8 for r in record.values())
    assert "pooled vector" in report_text(record[0.05])


def test_a_kept_prompt_goes_with_its_own_pooled_vector():
    toy = PooledToy(0.05)
    asked = []
    whole = toy.predict_x0

    def predict(x, sigma, prompts, edit=None):
        asked.extend(prompts)
        return whole(x, sigma, prompts, edit)

    toy.predict_x0 = predict
    settings = preset_settings("balanced", concepts="cat => dog", keep=("a tree",), **SMALL)
    *_, finished = erase(settings, toy)
    tree = toy.encode(["a tree"])[0]
    with_its_tokens = [p for p in asked if torch.equal(p.tokens, tree.tokens)]
    assert with_its_tokens and all(torch.equal(p.pooled, tree.pooled) for p in with_its_tokens)
    assert finished.erasure.record["measures"]["kept"][0]["drift"] <= 1e-5
