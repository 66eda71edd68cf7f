"""What people see of a run: bar, time left, curve and pictures, at no prediction more."""

from __future__ import annotations

import math

import pytest
import torch
from concept_surgery.erase_core import Meter, Preview, Progress, erase, preset_settings
from concept_surgery.erase_core.method import language
from concept_surgery.erase_core.run.recorded import thinned

from .toy import ToyDenoiser, watched

SMALL = {"resolution": 32, "captions": 40, "trajectories": 8, "sampling_steps": 5, "steps": 12}
LANGUAGE = {}


def asked(**values):
    return preset_settings("balanced", **{"concepts": "cat => dog", **SMALL, **values})


def seen_of(form="hard", preview=None, **values):
    toy, seen = ToyDenoiser("cross-attention" if form == "soft" else "key-value"), []
    meter = Meter(seen.append, preview=preview)
    erasure = erase(asked(form=form, **values), toy, LANGUAGE, meter)
    return seen, erasure, toy


def test_the_bar_moves_while_captions_are_read_and_never_back(monkeypatch):
    monkeypatch.setattr(language, "ENCODE_BATCH", 4)
    *progress, _ = watched(asked(captions=8), ToyDenoiser())
    reading = [p.share for p in progress if p.stage.startswith("Reading ordinary language")]
    assert len(set(reading)) > 3 and reading[0] > 0
    shares = [p.share for p in progress]
    assert shares == sorted(shares) and shares[-1] == 1 and 0 < max(reading) < 0.5
    instant = preset_settings("instant", concepts="cat", captions=8, resolution=32)
    *progress, _ = watched(instant, ToyDenoiser())
    reading = [p.share for p in progress if p.stage.startswith("Reading ordinary language")]
    assert max(reading) == 1 and len(set(reading)) > 3


class Clock:
    """Every forward-equivalent takes two seconds, and nothing else takes any."""

    def __init__(self):
        self.meter = None

    def __call__(self):
        return 2.0 * self.meter.spent if self.meter else 0.0


def test_the_time_left_is_that_of_the_rest_of_the_plan():
    clock, seen = Clock(), []
    clock.meter = meter = Meter(seen.append, clock=clock)
    erase(asked(), ToyDenoiser(), LANGUAGE, meter)
    known = [p for p in seen if p.seconds_left is not None]
    assert known and seen[0].seconds_left is None
    for progress in known:
        assert progress.seconds_left == pytest.approx(2 * (progress.total - progress.done))
    assert known[-1].seconds_left == 0


def test_what_an_earlier_run_spent_says_nothing_about_the_pace():
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    said = []
    meter = Meter(said.append, clock=lambda: now[0])
    meter.plan({"all": 1000})
    meter.skip(500)
    for _ in range(20):
        meter.spent += 5
        now[0] += 1.0
        meter.tell()
    assert said[-1].seconds_left == pytest.approx(400 / 5, rel=0.01)


@pytest.mark.parametrize("form", ["hard", "soft"])
def test_the_curve_falls_from_all_to_what_is_left(form):
    progress, erasure, _ = seen_of(form)
    curve = progress[-1].curve
    assert curve[0].left == 1 and curve[0].drift == 0
    assert len(curve) >= 12 and [p.done for p in curve] == sorted(p.done for p in curve)
    assert curve[-1].left < 0.7 and all(math.isfinite(point.left) for point in curve)
    assert all(point.drift is not None and 0 <= point.drift < 1 for point in curve)
    assert curve[-1].drift > 0
    assert erasure.record["curve"] == [list(point) for point in curve]
    steps = [p for p in progress if p.stage.startswith("Training, step")]
    assert {p.steps for p in steps} == {12} and max(p.step for p in steps) == 11


def test_without_smoothing_the_loss_is_what_is_left():
    """In the hard form the loss is the share that is left, so the curve is its running mean."""
    _, erasure, _ = seen_of()
    start, *rest = [left for _, left, _ in erasure.record["curve"][1:]]
    expected = start
    for loss, left in zip(erasure.record["losses"], rest, strict=True):
        expected += 0.2 * (loss - expected)
        assert left == pytest.approx(expected, rel=1e-5)


def test_a_closed_form_alone_has_a_curve_too():
    _, erasure, _ = seen_of(steps=0, trajectories=0)
    (_, all_of_it, none), (_, left, drift) = erasure.record["curve"]
    assert (all_of_it, none) == (1, 0) and left < 0.5 and drift > 0


@pytest.mark.parametrize("form", ["hard", "soft"])
def test_pictures_cost_no_prediction_and_change_nothing(form):
    shown = []
    plain, without, counted = seen_of(form, keep=("a tree",))
    progress, erasure, toy = seen_of(form, shown.append, keep=("a tree",))
    assert toy.calls == counted.calls and erasure.identity == without.identity
    assert [p.stage for p in progress] == [p.stage for p in plain]
    by_kind = {kind: [p for p in shown if p.kind == kind] for kind in ("erased", "kept", "drawn")}
    assert len(by_kind["erased"]) > 2 and len(by_kind["kept"]) == len(by_kind["drawn"]) == 1
    for preview in shown:
        assert isinstance(preview, Preview) and preview.now.shape == (4, 4, 4)
        assert not preview.now.requires_grad and preview.now.isfinite().all()
    last = by_kind["erased"][-1]
    assert not torch.allclose(last.before, last.now, rtol=1e-2)
    kept = by_kind["kept"][0]
    change = (kept.now - kept.before).norm() / (last.now - last.before).norm()
    assert change < (1e-4 if form == "hard" else 0.5)
    assert by_kind["drawn"][0].before is None


def test_a_preview_is_what_the_model_predicts_there_with_guidance():
    """Where an edit moves nothing, both pictures are the untouched model's."""
    shown = []
    seen_of("soft", shown.append, warm_start=False, learning_rate=1e-6)
    last = [p for p in shown if p.kind == "erased"][-1]
    torch.testing.assert_close(last.before, last.now, rtol=1e-3, atol=1e-3)


def test_a_long_curve_is_thinned_to_its_ends():
    curve = [(number, 1 - number / 999, None) for number in range(1000)]
    few = thinned(curve, 50)
    assert len(few) == 50 and few[0] == list(curve[0]) and few[-1] == list(curve[-1])
    assert thinned(curve[:1]) == [list(curve[0])] and thinned([]) == []


def test_progress_has_defaults_for_who_makes_one_by_hand():
    progress = Progress("stage", 1, 2)
    assert progress.share == 0 and progress.curve == () and not progress.stopping
