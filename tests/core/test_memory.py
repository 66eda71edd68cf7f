"""Checkpointing, what a step needs of the memory, and what is done where that is too little."""

import pytest
import torch
from concept_surgery.erase_core import (
    GradientError,
    Meter,
    Progress,
    TrainingError,
    erase,
    preset_settings,
    report_text,
)
from concept_surgery.erase_core.model.activations import Recompute, SavedBytes
from concept_surgery.erase_core.model.memory import Fit, Need
from concept_surgery.erase_core.run.trainer import SurgeryTrainer

from .deep_toy import DeepToy
from .small_device import SmallDevice
from .toy import watched

SMALL = {"resolution": 128, "captions": 40, "trajectories": 4, "sampling_steps": 4, "steps": 6}
SOFT = {"form": "soft", "keep": ("a tree",)}
EVERY_FORM = pytest.mark.parametrize("values", [{}, SOFT], ids=["hard", "soft"])


def run(toy, **values):
    given = {"concepts": "cat => dog", "protection": 1.0, **SMALL, **values}
    return watched(preset_settings("balanced", **given), toy)


@pytest.fixture
def trainers(monkeypatch):
    """Trainers of the runs, as they were made."""
    made, prepare = [], SurgeryTrainer.fit_to_memory
    monkeypatch.setattr(
        SurgeryTrainer, "fit_to_memory", lambda self: (made.append(self), prepare(self))
    )
    return made


def trainer_of(trainers, **values):
    run(DeepToy(), **{"steps": 1, **values})
    return trainers.pop()


def gradients(trainer, fit):
    trainer.fit = fit
    index = torch.arange(2)
    trainer._backward(index, torch.zeros(2, dtype=torch.long))
    return [tensor.grad.clone() for tensor in trainer._values]


@EVERY_FORM
def test_checkpointing_gives_the_same_gradient(trainers, values):
    trainer = trainer_of(trainers, **values)
    whole = gradients(trainer, Fit())
    assert all(gradient.any() for gradient in whole)
    for ours, plain in zip(gradients(trainer, Fit(1, True)), whole, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))


def peak(trainer, fit, states):
    """Bytes alive at the most in one backward, beside what was there before."""
    trainer.fit = fit
    with SmallDevice() as device:
        trainer._backward(torch.arange(states), torch.zeros(states, dtype=torch.long))
    return device.peak


@EVERY_FORM
@pytest.mark.parametrize("states", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_a_backward_takes(trainers, values, states, checkpointing):
    trainer = trainer_of(trainers, batch=states, **values)
    taken = peak(trainer, Fit(1, checkpointing), states)
    trainer._denoiser._denoiser.free = 1 if checkpointing else 10**12
    trainer._settings = preset_settings("balanced", concepts="cat", batch=states)
    trainer.fit_to_memory()
    parts, memory = trainer.fit.parts, trainer.memory()
    assert parts == (states if checkpointing else 1)
    assert memory["needed"] * parts == pytest.approx(taken, rel=0.25)


def test_checkpointing_keeps_several_times_less(trainers):
    trainer = trainer_of(trainers)
    assert peak(trainer, Fit(), 4) > 2.5 * peak(trainer, Fit(1, True), 4)


def saved_by(forward, resident=()):
    saved = SavedBytes(resident)
    with saved.counting():
        forward(saved)
    return saved


def test_what_is_counted_is_what_is_kept_once_and_without_weights():
    weight, x = torch.randn(8, 8), torch.randn(4, 8, requires_grad=True)
    size, kept_weight = 4 * 4 * 8, 4 * 8 * 8

    def block(x):
        return (x @ weight).sin().cos().exp()  # keep W and three results

    def forward(run):
        for _ in range(3):
            run(block, x.exp())  # and the result before the block, which is its first

    saved = saved_by(forward, [weight])
    assert saved.kept == 3 * 4 * size
    assert saved.needed == (3 * 4 + 1.5) * size  # half a block in passing
    assert saved.needed_checkpointed == (3 + 1.5 * 3) * size
    assert saved.kept_checkpointed == 3 * size
    assert saved_by(forward).kept == saved.kept + kept_weight
    with pytest.raises(RuntimeError, match="only counted"), saved.counting():
        x.exp().sum().backward()


def test_less_is_taken_in_the_order_that_costs_least():
    need, fits = Need(plain=100, checkpointed=30), []
    fit = Fit()
    while fit is not None:
        fits.append((fit.parts, fit.checkpointing, fit.needs(need, 4)))
        fit = fit.smaller(4)
    assert fits == [(1, False, 400), (2, False, 200), (4, False, 100), (4, True, 30)]
    chosen = [Fit.into(free, need, 4) for free in (500, 300, 120, 90, 1)]
    assert chosen == [Fit(1), Fit(2), Fit(4), Fit(4, True), Fit(4, True)]


def test_the_estimate_chooses_and_the_report_says_why_and_what_it_costs():
    usual, tight = DeepToy(), DeepToy()
    *_, plain = run(usual, batch=4)
    tight.free = 1
    *progress, recomputed = run(tight, batch=4)
    assert recomputed.record["losses"] == pytest.approx(plain.record["losses"], rel=1e-3)
    for name in plain.factors:
        ours, theirs = recomputed.delta(name), plain.delta(name)
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
    record, before = recomputed.record, plain.record
    more = record["forward_equivalents"] - before["forward_equivalents"]
    assert more == 1 + 6 * 4  # one more forward for every gradient: the check's and the steps'
    assert record["forward_equivalents"] == tight.calls
    last = [event for event in progress if isinstance(event, Progress)][-1]
    assert last.done == last.total == tight.calls
    assert record["memory"]["checkpointing"] and not before["memory"]["checkpointing"]
    text = report_text(record)
    assert "Memory beside the weights: a training step needs about" in text
    assert "as a whole it would need" in text
    assert "so it trained 1 at a time with gradient checkpointing, which costs a third" in text
    assert "checkpointing" not in report_text(before)
    del before["memory"]  # as in an older file
    assert "Memory" not in report_text(before)


@pytest.fixture
def device(monkeypatch):
    """A device in which every backward and its forward take place."""
    small, step = SmallDevice(), SurgeryTrainer._backward_in_parts

    def limited(self, *given):
        with small:
            return step(self, *given)

    monkeypatch.setattr(SurgeryTrainer, "_backward_in_parts", limited)
    return small


def test_memory_that_runs_out_halves_the_batch_then_recomputes_then_advises(device, trainers):
    whole = run(DeepToy(), batch=4, steps=3)[-1]
    needs = {fit: peak(trainers[0], fit, 4) for fit in (Fit(), Fit(2), Fit(4), Fit(4, True))}
    assert sorted(needs.values(), reverse=True) == list(needs.values())
    fits = list(needs)
    for fit, wanted in zip(fits, (0, 1, 2, 3), strict=True):
        device.size, device.failures = 1.02 * needs[fit], 0
        finished = run(DeepToy(), batch=4, steps=3)[-1]
        memory = finished.record["memory"]
        assert trainers[-1].fit == fit
        assert device.failures == memory["ran_out"] == wanted
        assert ("memory ran out on the way" in report_text(finished.record)) == (wanted > 0)
        assert finished.record["losses"] == pytest.approx(whole.record["losses"], rel=1e-3)
    device.size = 0.9 * needs[Fit(4, True)]
    with pytest.raises(TrainingError, match="not enough memory to train, even one picture"):
        run(DeepToy(), batch=4, steps=3)


@pytest.mark.parametrize("when", ["Checking the gradient", "Training, step 2 of 6"])
def test_the_gradient_is_checked_as_it_is_computed(monkeypatch, when):
    """Recomputing that gives another gradient is found, whenever it begins."""

    class Full(DeepToy):
        full = False

        def network(self, pixels, tokens, run):
            if self.full and torch.is_grad_enabled() and self._run is None:
                raise RuntimeError("out of memory")
            return super().network(pixels, tokens, run)

        def fill_up(self, progress):
            self.full |= progress.stage == when

    def change(self, block, *inputs):
        result = recompute(self, block, *inputs)
        result.register_hook(lambda gradient: 1.1 * gradient)
        return result

    recompute, toy = Recompute.__call__, Full()
    monkeypatch.setattr(Recompute, "__call__", change)
    settings = preset_settings("balanced", concepts="cat => dog", protection=1.0, **SMALL)
    with pytest.raises(GradientError, match="gradient is wrong"):
        erase(settings, toy, meter=Meter(toy.fill_up))
