"""The gradient check: passes where the gradient is right, and ends the run where it isn't."""

from statistics import median

import pytest
import torch
from concept_surgery.erase_core import GradientError, Meter, erase, preset_settings
from concept_surgery.erase_core.model.gradient import MOST_APART, check_gradient
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.run import trainer

from .toy import ToyDenoiser

SMALL = {"resolution": 32, "captions": 40, "trajectories": 8, "sampling_steps": 4, "steps": 2}


def record_of(toy, **values):
    settings = preset_settings("balanced", **{"concepts": "cat => dog", **SMALL, **values})
    return erase(settings, toy).record


class ScaledGradient(torch.autograd.Function):
    """The identity, with a backward that is off by a factor."""

    @staticmethod
    def forward(context, x, factor):
        context.factor = factor
        return x

    @staticmethod
    def backward(context, gradient):
        return context.factor * gradient, None


def on_output(layer, change):
    """Pass what a layer gives, side path included, through a function."""
    layer.register_forward_hook(lambda _layer, _inputs, output: change(output))


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"concepts": "cat => dog\npizza"},
        {"form": "soft", "keep": ("a tree",)},
        {"form": "soft", "layers": "cross-attention"},
    ],
    ids=["hard", "two concepts", "soft", "other layers"],
)
def test_an_honest_gradient_agrees_with_the_difference(values, warm_start):
    toy = ToyDenoiser(values.get("layers", "key-value"))
    apart = record_of(toy, warm_start=warm_start, **values)["gradient_apart"]
    assert 0 <= apart <= 0.02


@pytest.mark.parametrize("layer", ["key", "value"])
def test_a_layer_that_detaches_ends_the_run(layer):
    toy = ToyDenoiser()
    on_output(getattr(toy, layer), torch.Tensor.detach)
    with pytest.raises(GradientError, match="No gradient reaches 1 of the trained matrices.*to_"):
        record_of(toy, protection=1.0)


@pytest.mark.parametrize("factor", [0.9, 1.1, -1.0])
def test_a_gradient_of_the_wrong_size_ends_the_run(factor):
    toy = ToyDenoiser()
    on_output(toy.value, lambda output: ScaledGradient.apply(output, factor))
    on_output(toy.key, lambda output: ScaledGradient.apply(output, factor))
    # Not the first seed: at its state the loss bends so that the longest step hides a tenth.
    with pytest.raises(GradientError, match="gradient is wrong: along a test direction"):
        record_of(toy, protection=1.0, seed=1)


def test_one_layer_in_many_that_is_wrong_ends_the_run():
    toy = ToyDenoiser("cross-attention")
    on_output(toy.out, lambda output: ScaledGradient.apply(output, 3.0))
    with pytest.raises(GradientError, match="gradient is wrong"):
        record_of(toy, form="soft", layers="cross-attention", protection=1.0)


def test_a_matrix_that_does_not_matter_may_have_no_gradient():
    toy = ToyDenoiser()
    toy.query.weight.zero_()  # attention is even whatever the keys are
    toy.query.bias.zero_()
    on_output(toy.key, torch.Tensor.detach)
    assert record_of(toy, protection=1.0)["gradient_apart"] <= 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_told_from_a_wrong_gradient(dtype):
    class HalfToy(ToyDenoiser):
        def predict_x0(self, x, sigma, prompts, edit=None):
            eps = (x - super().predict_x0(x, sigma, prompts, edit)) / sigma.view(-1, 1, 1, 1)
            return x - sigma.view(-1, 1, 1, 1) * eps.to(self.dtype).float()

    def apart(seed, factor=1.0):
        toy = HalfToy()
        toy.dtype = dtype
        on_output(toy.value, lambda output: ScaledGradient.apply(output, factor))
        on_output(toy.key, lambda output: ScaledGradient.apply(output, factor))
        return record_of(toy, seed=seed)["gradient_apart"]

    # Rounding differs from state to state: on none is a right gradient refused, on most it is near.
    found = [apart(seed) for seed in range(7)]
    assert median(found) <= MOST_APART / 2 and max(found) <= MOST_APART
    for seed in range(7):
        with pytest.raises(GradientError, match="gradient is wrong"):
            apart(seed, 0.8)


class RoundingToy(ToyDenoiser):
    """Its network puts out half precision."""

    def __init__(self, dtype, layers="key-value"):
        super().__init__(layers)
        self.dtype = dtype

    def predict_x0(self, x, sigma, prompts, edit=None):
        sigmas = sigma.view(-1, 1, 1, 1)
        eps = (x - super().predict_x0(x, sigma, prompts, edit)) / sigmas
        return x - sigmas * eps.to(self.dtype).float()


class Checked(Exception):
    """The end of a run whose gradient is asked for."""


def asked(monkeypatch, dtype, **values):
    """What a run asks of the check: a function of how wrong the gradients of B and of R are."""
    given = {}

    def note(loss, start, dtype, scale, bases_too, elsewhere):
        given.update(losses=[loss, *elsewhere], start=start, more=(dtype, scale, bases_too))
        raise Checked

    monkeypatch.setattr(trainer, "check_gradient", note)
    with pytest.raises(Checked):
        record_of(RoundingToy(dtype, values.get("layers", "key-value")), **values)

    def check(of_factors=1.0, of_bases=1.0):
        def scaled(tensors, factor):
            return {
                name: ScaledGradient.apply(tensor, factor) if tensor.requires_grad else tensor
                for name, tensor in tensors.items()
            }

        def wrong(loss):
            return lambda edit: loss(
                LowRankEdit(scaled(edit.bases, of_bases), scaled(edit.factors, of_factors))
            )

        loss, *elsewhere = map(wrong, given["losses"])
        return check_gradient(loss, given["start"], *given["more"], elsewhere)

    return check


FORMS = {
    "hard": {},
    "strong": {"protection": 1.0},
    "from nothing": {"warm_start": False},
    "soft": {"form": "soft"},
    "soft, other layers": {"form": "soft", "layers": "cross-attention", "warm_start": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_twentieth_is_refused_at_every_state_and_a_right_gradient_at_none(
    monkeypatch, form, dtype
):
    for seed in range(5):
        check = asked(monkeypatch, dtype, seed=seed, **FORMS[form])
        assert check() <= MOST_APART
        wrong = [{"of_factors": factor} for factor in (0.95, 1.05)]
        if form.startswith("soft"):
            wrong += [{"of_bases": factor} for factor in (0.95, 1.05)]
        for one in wrong:
            with pytest.raises(GradientError, match="gradient is wrong"):
                check(**one)


@pytest.mark.parametrize("form", ["hard", "from nothing", "soft"])
def test_the_coarsest_rounding_hides_less_than_a_tenth(monkeypatch, form):
    for seed in range(4):
        check = asked(monkeypatch, torch.bfloat16, seed=seed, **FORMS[form])
        check()
        for factor in (0.9, 1.12):
            with pytest.raises(GradientError, match="gradient is wrong"):
                check(of_factors=factor)


def test_the_soft_form_needs_the_gradient_of_the_bases_too():
    class Detaching(ToyDenoiser):
        def predict_x0(self, x, sigma, prompts, edit=None):
            if edit is not None:
                cut = {name: self.cut(name, basis) for name, basis in edit.bases.items()}
                edit = LowRankEdit(cut, edit.factors)
            return super().predict_x0(x, sigma, prompts, edit)

        def cut(self, name, basis):
            return basis.detach() if name.endswith("to_v") else basis

    assert record_of(Detaching(), protection=1.0)["gradient_apart"] <= 0.02
    with pytest.raises(GradientError, match="No gradient reaches 1 of the trained matrices.*to_v"):
        record_of(Detaching(), form="soft", protection=1.0)


def test_the_check_costs_five_after_one_for_the_memory_and_touches_nothing():
    # At this seed's state the first step of the difference will do.
    settings = preset_settings("balanced", concepts="cat => dog", seed=1, **SMALL)
    toy, spent = ToyDenoiser(), {}
    report = lambda progress: spent.setdefault(progress.stage, toy.calls)  # noqa: E731
    record = erase(settings, toy, meter=Meter(report)).record
    assert spent["Training, step 1 of 2"] - spent["Checking the gradient"] == 1 + 5
    assert spent["Training, step 2 of 2"] - spent["Training, step 1 of 2"] == 3 * settings.batch
    assert record["forward_equivalents"] == toy.calls


def test_overflow_of_scaled_gradients_is_scaled_down():
    class Overflowing(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient.half().float() if gradient.abs().max() < 60 else gradient / 0

    from concept_surgery.erase_core.model.denoiser import LowRankEdit

    weight = torch.randn(6, 4)
    start = LowRankEdit({"m": torch.eye(4)}, {"m": torch.randn(6, 4)})

    def loss(edit):
        return (Overflowing.apply(edit.factors["m"]) - weight).square().sum()

    assert check_gradient(loss, start, torch.float16, scale=1024.0) <= 0.01
