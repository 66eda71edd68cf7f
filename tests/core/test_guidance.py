"""The losses against formulas written independently of the code."""

import pytest
import torch
from concept_surgery.erase_core.method.guidance import (
    SigmaWeight,
    guidance_term,
    moved,
    surgery_loss,
    surgical_target,
)

SIGMA = torch.tensor([0.5, 7.0])


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    names = (
        "x",
        "null",
        "erased",
        "alternative",
        "student",
        "student_null",
        "kept",
        "student_kept",
    )
    return {n: torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for n in names}


def x0(scores, name):
    return scores["x"] - SIGMA.view(-1, 1, 1, 1) * scores[name]


def term(scores, name):
    return guidance_term(x0(scores, "null"), x0(scores, name), SIGMA)


def mean_square(value):
    return (value**2).sum() / value.numel()


def test_guidance_term_is_the_difference_of_noise_predictions(scores):
    torch.testing.assert_close(
        term(scores, "erased"), scores["erased"] - scores["null"], rtol=1e-6, atol=1e-6
    )


def test_with_an_alternative_it_is_ileco(scores):
    loss = surgery_loss(term(scores, "student"), term(scores, "alternative"))
    ileco = mean_square(scores["student"] - scores["alternative"])
    torch.testing.assert_close(loss, ileco, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
def test_with_the_null_prompt_and_eta_it_is_esd(scores, eta):
    nothing = torch.zeros_like(scores["null"])
    target = surgical_target(term(scores, "erased"), nothing, eta)
    esd = scores["null"] - eta * (scores["erased"] - scores["null"])
    loss = surgery_loss(term(scores, "student"), target)
    torch.testing.assert_close(loss, mean_square(scores["student"] - esd), rtol=1e-6, atol=1e-6)


def test_with_the_null_prompt_and_no_eta_it_is_sdd(scores):
    loss = surgery_loss(term(scores, "student"), torch.zeros_like(scores["null"]))
    sdd = mean_square(scores["student"] - scores["null"])
    torch.testing.assert_close(loss, sdd, rtol=1e-6, atol=1e-6)


def test_with_frozen_anchor_it_is_concept_ablation_whatever_eta_would_push(scores):
    target = surgical_target(term(scores, "erased"), term(scores, "alternative"), 0.0)
    loss = surgery_loss(term(scores, "student"), target)
    ablation = mean_square(scores["student"] - scores["alternative"])
    torch.testing.assert_close(loss, ablation, rtol=1e-6, atol=1e-6)


def test_all_terms_of_the_soft_form(scores):
    drift = scores["student_null"] - scores["null"]
    kept = scores["student_kept"] - scores["kept"]
    loss = surgery_loss(
        scores["student"] - scores["null"],
        scores["alternative"] - scores["null"],
        drift=drift,
        drift_weight=0.7,
        kept_drifts=[kept],
        keep_weight=0.3,
    )
    expected = (
        mean_square(scores["student"] - scores["alternative"])
        + 0.7 * mean_square(drift)
        + 0.3 * mean_square(kept)
    )
    torch.testing.assert_close(loss, expected)


def test_weights_by_noise_level():
    sigma = torch.tensor([1.0, 4.0, 1.0, 4.0])
    differences = torch.tensor([1.0, 0.1, 3.0, 0.3]).view(4, 1, 1, 1).expand(4, 2, 3, 3)

    def weights(kind):
        return SigmaWeight(kind, sigma, differences, lambda levels: 1 + levels.square())

    torch.testing.assert_close(weights("output")(sigma), torch.tensor([2.0, 17.0, 2.0, 17.0]))
    image = weights("image")(sigma)
    torch.testing.assert_close(image, torch.tensor([1.0, 16.0, 1.0, 16.0]))
    relative = weights("relative")
    shares = relative(sigma) * differences.square().mean((1, 2, 3))
    assert shares[[0, 2]].sum() == pytest.approx(shares[[1, 3]].sum())
    torch.testing.assert_close(relative(torch.tensor([3.9])), relative(sigma[1:2]))
    with pytest.raises(ValueError, match="weighting"):
        weights("none")


def test_weights_act_on_every_term(scores):
    """Each at its own states: kept prompts have their own noise levels."""
    one, other = torch.tensor([2.0, 0.5]), torch.tensor([0.1, 7.0])
    guidance, drift, kept = (torch.randn(2, 4, 3, 3, dtype=torch.float64) for _ in range(3))
    loss = surgery_loss(
        guidance,
        torch.zeros_like(guidance),
        drift=drift,
        drift_weight=0.7,
        kept_drifts=[kept],
        keep_weight=0.3,
        weight=one,
        kept_weight=other,
    )

    def squares(difference):
        return difference.square().mean((1, 2, 3))

    expected = one * (squares(guidance) + 0.7 * squares(drift)) + 0.3 * other * squares(kept)
    torch.testing.assert_close(loss, expected.mean())


@pytest.mark.parametrize(
    "choice, flows", [("frozen", False), ("student", True), ("detached", False)]
)
def test_which_null_score_gets_a_gradient(scores, choice, flows):
    drift = (scores["student_null"] - scores["null"]).requires_grad_()
    guidance = (scores["student"] - scores["null"]).requires_grad_()
    loss = surgery_loss(guidance, scores["alternative"], drift=drift, null_score=choice)
    loss.backward()
    assert guidance.grad.abs().sum() > 0
    assert (drift.grad is not None and bool(drift.grad.abs().sum() > 0)) is flows


def test_drift_term_has_a_gradient(scores):
    drift = (scores["student_null"] - scores["null"]).requires_grad_()
    surgery_loss(scores["student"], scores["erased"], drift=drift, drift_weight=1.0).backward()
    torch.testing.assert_close(drift.grad, 2 * drift.detach() / drift.numel())


def test_a_term_without_its_score_is_refused(scores):
    with pytest.raises(ValueError, match="need the drift"):
        surgery_loss(scores["student"], scores["erased"], drift_weight=1.0)
    with pytest.raises(ValueError, match="frozen"):
        surgery_loss(scores["student"], scores["erased"], null_score="none")


def test_moved_is_none_half_and_all_of_the_way():
    start, goal = torch.ones(3), torch.zeros(3)
    assert moved(start, start, goal) == 0
    assert moved(goal, start, goal) == 1
    assert moved(start / 2, start, goal) == pytest.approx(0.75)
    assert moved(start, goal, goal) == 0


def test_moved_weighs_the_noise_levels_and_nothing_of_nothing_is_none():
    start, goal = torch.ones(2, 4, 2, 2), torch.zeros(2, 4, 2, 2)
    student = torch.cat([goal[:1], start[1:]])  # the first state went all the way
    assert moved(student, start, goal) == pytest.approx(0.5)
    assert moved(student, start, goal, torch.tensor([9.0, 1.0])) == pytest.approx(0.9)
    assert moved(start[:0], start[:0], goal[:0], torch.ones(0)) == 0
