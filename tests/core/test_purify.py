"""Inversion leads back to the picture, and only what shows the concept is drawn again."""

from __future__ import annotations

import pytest
import torch
from concept_surgery.erase_core import Erasure, Meter, SettingsError, erase, preset_settings
from concept_surgery.erase_core.method.inversion import (
    evidence,
    inverted,
    places,
    psnr,
    sampled,
)
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.run import purify as module
from concept_surgery.erase_core.run.purify import purify, reconstructed, schedule
from concept_surgery.erase_core.settings.purification import Purification, asked_prompts

from .toy import CHANNELS, ToyDenoiser

QUICK = {"resolution": 32, "captions": 40, "templates": "a photo of a {}\n{} in a garden"}


class FlowToy(ToyDenoiser):
    """The same network, taken for the velocity of a flow."""

    def sigmas(self, steps):
        return torch.linspace(1, 0, steps + 1)

    def noisy_latent(self, noise, sigma):
        return noise * sigma

    def noisy_picture(self, picture, noise, sigma):
        return (1 - sigma) * picture + sigma * noise


class CurvedToy(ToyDenoiser):
    """Its noise depends on the latent so much that plain DDIM inversion misses."""

    def predict_x0(self, x, sigma, prompts, edit=None):
        level = sigma.view(-1, 1, 1, 1)
        curve = 0.4 * torch.sin(x / (1 + level**2).sqrt())
        return super().predict_x0(x, sigma, prompts, edit) - level * curve


@pytest.fixture(scope="module")
def erasure() -> Erasure:
    return erase(preset_settings("instant", concepts="cat => dog", **QUICK), ToyDenoiser())


def picture(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, CHANNELS, 8, 12, generator=torch.Generator().manual_seed(seed))


def under_null(denoiser):
    (null,) = denoiser.encode([""])

    @torch.no_grad()
    def predict(x, sigma):
        return denoiser.predict_x0(x, torch.full((len(x),), sigma), [null] * len(x))

    return predict


@pytest.mark.parametrize("kind", [ToyDenoiser, FlowToy, CurvedToy])
def test_inversion_leads_back_to_the_picture(kind):
    denoiser, batch = kind(), torch.cat([picture(1), picture(2)])
    sigmas = denoiser.sigmas(12).tolist()
    way = inverted(batch, sigmas, under_null(denoiser))
    assert len(way) == 13 and torch.equal(way[-1], batch)
    assert not torch.allclose(way[0], batch)
    again = sampled(way[0], sigmas, under_null(denoiser))
    assert torch.equal(inverted(batch, sigmas, under_null(denoiser))[0], way[0])
    plain = sampled(
        inverted(batch, sigmas, under_null(denoiser), 1)[0], sigmas, under_null(denoiser)
    )
    lost, lost_plainly = ((x - batch).norm() / batch.norm() for x in (again, plain))
    assert lost < 0.01
    if kind is CurvedToy:
        assert lost_plainly > 10 * lost


def test_guesses_that_lead_away_end():
    def wild(x, sigma):
        return x - sigma * 50 * x

    way = inverted(picture(), [10.0, 0.1, 0.0], wild)
    assert all(state.isfinite().all() for state in way)


def test_the_erased_model_reconstructs_the_same_under_the_null_prompt(erasure):
    asked = Purification(steps=8, start_level=1.0, strength=2.0)
    own, others = reconstructed(picture(), asked, erasure, ToyDenoiser())
    assert (own - others).norm() / own.norm() < 1e-5
    # It isn't for want of an edit.
    denoiser = ToyDenoiser()
    (cat,) = denoiser.encode(["a photo of a cat"])
    x0 = [
        denoiser.predict_x0(picture(), torch.tensor([2.0]), [cat], edit)
        for edit in (None, erasure.edit())
    ]
    assert (x0[0] - x0[1]).norm() / x0[0].norm() > 1e-3


def test_only_the_marked_part_is_drawn_again(erasure, monkeypatch):
    mask = torch.zeros(1, 1, 8, 12)
    mask[..., :5] = 1
    monkeypatch.setattr(module, "places", lambda found, left: mask)
    asked = Purification(steps=6, start_level=1.0, guidance=6.0)
    found = purify(picture(), asked, erasure, ToyDenoiser())
    assert torch.equal(found.latent[..., 5:], picture()[..., 5:])
    assert (found.latent - picture())[..., :5].norm() > 10 * (
        found.reconstruction - picture()
    ).norm()
    assert torch.equal(found.mask, mask)
    assert found.shares == {"a photo of a cat": pytest.approx(5 / 12)}
    again = purify(picture(), asked, erasure, ToyDenoiser())
    assert torch.equal(found.latent, again.latent)


def test_where_nothing_is_seen_the_picture_stays_bit_for_bit(erasure, monkeypatch):
    monkeypatch.setattr(module, "places", lambda found, left: torch.zeros(1, 1, 8, 12))
    found = purify(picture(), Purification(steps=3), erasure, ToyDenoiser())
    assert torch.equal(found.latent, picture()) and not found.mask.any()


def test_at_level_0_nothing_is_predicted(erasure):
    denoiser = ToyDenoiser()
    found = purify(picture(), Purification(start_level=0.0), erasure, denoiser)
    assert torch.equal(found.latent, picture()) and torch.equal(found.reconstruction, picture())
    assert not denoiser.calls


def test_the_schedule_is_the_end_of_a_longer_one_that_ends_finely():
    toy = ToyDenoiser()
    half = schedule(toy, Purification(steps=4, start_level=0.5))
    assert half[:4] == toy.sigmas(8)[-5:-1].tolist()
    assert half[4:] == [pytest.approx(half[3] / 2), pytest.approx(half[3] / 4), 0.0]
    for steps, level in ((1, 0.8), (3, 0.01), (20, 1.0)):
        sigmas = schedule(FlowToy(), Purification(steps=steps, start_level=level))
        assert len(sigmas) > steps and sigmas[-1] == 0 and 0.01 < sigmas[-2] <= 0.03 or level < 0.1
        assert sigmas == sorted(sigmas, reverse=True)


def test_a_picture_that_the_model_does_not_find_perfect_is_reconstructed_in_few_steps():
    class Strict(FlowToy):
        """Takes whatever is beside its own idea of the picture for noise, down to low levels."""

        def predict_x0(self, x, sigma, prompts, edit=None):
            level = sigma.view(-1, 1, 1, 1)
            return x * (1 - level) / ((1 - level) ** 2 + (6 * level) ** 2)

    strict, asked = Strict(), Purification(steps=4, start_level=1.0)
    sigmas, predict = schedule(strict, asked), under_null(strict)

    def lost(levels, **how):
        way = inverted(picture(), levels, predict, **how)
        return (sampled(way[0], levels, predict) - picture()).norm() / picture().norm()

    plain = strict.sigmas(4).tolist()
    # By guesses that are merely inserted again; mixed ones solve this model at once.
    assert lost(sigmas, guesses=2) < 0.5 * lost(plain, guesses=2)
    assert lost(sigmas) < 1e-3


def test_guesses_that_swing_back_and_forth_are_mixed():
    """What inserting them again makes ever worse: a picture that the model finds unlikely."""

    def swinging(x, sigma):
        turned = torch.cat([x[:, 2:], -x[:, :2]], 1)
        return x - sigma * (1.3 * turned + 0.1 * torch.sin(x))

    batch, sigmas = torch.cat([picture(1), 3 * picture(2)]), [2.0, 1.0, 0.0]
    way = inverted(batch, sigmas, swinging)
    again = sampled(way[0], sigmas, swinging)
    for one, other in zip(again, batch, strict=True):
        assert (one - other).norm() / other.norm() < 5e-3
    # What is found of one doesn't depend on what lies beside it.
    assert torch.allclose(inverted(batch[:1], sigmas, swinging)[0], way[0][:1], rtol=1e-2)


def test_evidence_has_to_beat_every_other_text():
    told, other = torch.zeros(1, 4, 16, 16), torch.ones(1, 4, 16, 16)
    null = torch.ones(1, 4, 16, 16)
    null[..., 8:] = 0  # without a prompt the right half is explained as well
    found, left = evidence(torch.zeros(1, 4, 16, 16), told, [other, null])
    mask = places(found, left)
    assert mask[..., :8].all() and not mask[..., 10:].any()
    assert not places(-found - 0.1, left).any()
    assert not places(torch.zeros(1, 16, 16), left).any()
    faint = torch.ones(1, 16, 16)  # as much evidence as error is left: seen; a tenth of it: not
    assert places(faint, faint).all() and not places(faint / 10, faint).any()


def test_a_style_is_all_over_the_picture_and_a_person_may_choose(erasure):
    style = {**erasure.record, "concepts": [{"text": "ink", "kind": "style"}]}
    assert Purification().everywhere(style) and not Purification().everywhere(erasure.record)
    assert Purification(area="everywhere").everywhere(erasure.record)
    assert not Purification(area="where it is seen").everywhere(style)
    with pytest.raises(SettingsError, match="a house in ink style") as refused:
        asked_prompts(Purification(), style)
    assert refused.value.setting == "prompt"
    assert asked_prompts(Purification(prompt="an ink house"), style) == ["an ink house"]
    found = purify(picture(), Purification(steps=2, area="everywhere"), erasure, ToyDenoiser())
    assert found.mask.all()


def test_every_name_of_a_concept_is_looked_for_unless_a_prompt_is_given(erasure):
    record = {**erasure.record, "concepts": [{"text": "cat", "kind": None, "also": ["kitten"]}]}
    assert asked_prompts(Purification(), record) == ["a photo of a cat", "a photo of a kitten"]
    assert asked_prompts(Purification(prompt=" a cat on a bench "), record) == ["a cat on a bench"]


def test_it_is_reported_how_far_it_is_and_a_cancel_passes(erasure):
    seen = []
    purify(picture(), Purification(steps=5), erasure, ToyDenoiser(), Meter(seen.append))
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    assert len(stages) == 5 and stages[1] == "inverting the picture"
    assert all(progress.done <= progress.total for progress in seen)
    assert seen[-1].done > 0.5 * seen[0].total

    class Cancelled(Exception):
        pass

    def cancel(progress):
        if progress.stage == stages[-1]:
            raise Cancelled

    with pytest.raises(Cancelled):
        purify(picture(), Purification(steps=5), erasure, ToyDenoiser(), Meter(cancel))


@pytest.mark.parametrize(
    "values, setting",
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"start_level": -0.1}, "start_level"),
        ({"start_level": 0.001}, "start_level"),
        ({"start_level": float("nan")}, "start_level"),
        ({"guidance": 1e9}, "guidance"),
        ({"strength": -1}, "strength"),
        ({"area": "here"}, "area"),
        ({"prompt": "x" * 5001}, "prompt"),
        ({"prompt": "a \ud83d cat"}, "prompt"),
    ],
)
def test_what_cannot_work_is_refused_at_its_setting(values, setting):
    with pytest.raises(SettingsError) as refused:
        Purification(**values)
    assert refused.value.setting == setting


def test_psnr():
    assert psnr(torch.zeros(3), torch.zeros(3)) == float("inf")
    assert psnr(torch.zeros(4), torch.full((4,), 0.1)) == pytest.approx(20)


def test_an_edit_is_scaled_by_the_strength(erasure):
    edit = module._scaled(erasure.edit(), 0.5)
    assert isinstance(edit, LowRankEdit)
    for name, factor in erasure.factors.items():
        assert torch.equal(edit.factors[name], 0.5 * factor)
