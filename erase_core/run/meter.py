"""What is needed at every depth of a run: its cost, how far it is, and whether it is to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..model.activations import PLAIN_GRADIENT, BlockRun
from ..model.denoiser import Denoiser
from ..model.low_rank import LowRankEdit
from ..model.memory import ADVICE, out_of_memory
from ..model.prompt import Encoded
from ..model.readers import FoundReaders

# Of a run that predicts something, what reading ordinary language is on a bar. It takes about as
# long as a fifth of a run on a device where both are fast, and is seldom done.
READING_SHARE = 0.2
SMOOTHING = 0.2  # weight of the latest batch in the curve: its noise is that of its noise levels
# How fast predictions go is taken over so much at least, and each such time counts so much.
LEAST_COST, LEAST_SECONDS, PACE_SMOOTHING = 4, 0.5, 0.3
NOTHING_YET = (
    "Stopped before anything was learned: ordinary language was still being read, so there is "
    "nothing to keep. Run it again to start."
)
NOT_A_STEP_YET = (
    "Stopped before the first step of the training. This model has no closed form to start from, "
    "so nothing was learned and there is nothing to keep. Run it again to go on."
)
# What a preview shows.
ERASED, KEPT, DRAWN = "erased", "kept", "drawn"


T = TypeVar("T")


class PredictionError(RuntimeError):
    """The model's predictions can't be used."""


class TrainingError(RuntimeError):
    """Training can't go on, or there is nothing to train."""


class NothingLearnedError(TrainingError):
    """A run was stopped before there was anything to keep."""


class StopAsked(Exception):
    """Somebody asked to stop while nothing was trained; caught by the run itself."""


class CurvePoint(NamedTuple):
    """Where a run stood, smoothed.

    Attributes:
        done: forward-equivalents spent until then.
        left: what is left of the concept, from 1 (all) to 0; may pass either end.
        drift: how far what shall stay moved, relative to itself; None where it isn't known.
    """

    done: int
    left: float
    drift: float | None


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        stage: what it is doing, in words.
        done, total: forward-equivalents spent and planned; the plan shrinks when a stage needs
            less than it might have.
        loss: surgery loss of the latest step, from about 1 (nothing moved) to 0; None before.
        share: of the whole run, from 0 to 1, with what is read of ordinary language; for a bar.
        step, steps: of the training, done and planned; 0 of 0 where nothing trains.
        seconds_left: at most, as fast as it went until now; None where that isn't known yet.
        curve: what is left of the concept and the drift over the run. One list that grows: copy
            what you keep.
        stopping: whether somebody asked to stop.
    """

    stage: str
    done: int
    total: int
    loss: float | None = None
    share: float = 0.0
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    curve: Sequence[CurvePoint] = ()
    stopping: bool = False


@dataclass(frozen=True)
class Preview:
    """What the model makes of a prompt, before and now, at one noisy latent of one seed.

    Predictions that are made anyway, with guidance, on the CPU in the model's scale. A host's
    latent previewer shows them.

    Attributes:
        kind: :data:`ERASED`, :data:`KEPT`, or :data:`DRAWN`, a whole picture of the edited model.
        before: the untouched model's, (channels, height, width); None of a picture that it
            didn't draw.
        now: the edited model's, the same shape.
    """

    kind: str
    before: Tensor | None
    now: Tensor


class Meter:
    """Counts what a run costs, says how far it is, and knows whether it is to stop.

    Every prediction and every batch of prompts that is read comes by here. So whoever hands a
    meter in can end the run from ``report``: what it raises passes through, and nothing is changed.
    :meth:`stop` ends it gently.

    Args:
        report: called with a :class:`Progress` often.
        should_stop: asked before each optimiser step; True ends training early, and what was
            learned so far is measured and returned. Who can should call :meth:`stop` instead,
            which is heard in every stage.
        preview: called with a :class:`Preview` now and then; without one none is made.
        clock: seconds, rising.

    Attributes:
        spent: forward-equivalents until now.
        loss: surgery loss of the latest step.
        reused: whether the result was found among stored ones.
        resumed_at: the step from which an earlier run was gone on with; None if it wasn't.
        resumable: whether the run left a state to go on from.
    """

    def __init__(
        self,
        report: Callable[[Progress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
        preview: Callable[[Preview], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.preview, self.clock = preview, clock
        self.spent = 0
        self.loss: float | None = None
        self.reused = False
        self.resumed_at: int | None = None
        self.resumable = False
        self._report, self._stage = report, ""
        self._should_stop, self._stop_asked, self._breaks = should_stop, False, False
        self._plan: dict[str, int] = {}
        self._step = self._steps = 0
        self._curve: list[CurvePoint] = []
        self._read = 0.0  # share of ordinary language that is read, and what that is of the whole
        self._reading = self._shown = 0.0
        self._pace = Pace(clock)

    def stop(self) -> None:
        """End the run as soon as may be, and keep what was learned. From any thread, any time."""
        self._stop_asked = True

    @property
    def stop_asked(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stop_asked

    def should_stop(self) -> bool:
        """Whether to stop, asked before each optimiser step."""
        return self._stop_asked or self._should_stop()

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """A part of the run that may be left at any prediction, once :meth:`stop` was called.

        Raises:
            StopAsked: it was.
        """
        before, self._breaks = self._breaks, True
        try:
            self._break_if_asked()
            yield
        finally:
            self._breaks = before

    def _break_if_asked(self) -> None:
        if self._breaks and self._stop_asked:
            raise StopAsked

    def plan(self, costs: Mapping[str, int]) -> None:
        """Know what the parts of the run will cost at most; those that aren't named stay."""
        self._plan.update(costs)

    def replan(self, costs: Mapping[str, int]) -> None:
        """The same, and nothing else is to come."""
        self._plan = dict(costs)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the plan: when it ends well, what it cost stands where its plan stood."""
        before = self.spent
        yield
        self._plan[name] = self.spent - before

    def skip(self, cost: int) -> None:
        """What an earlier run spent on what is taken from it, in forward-equivalents."""
        self.spent += cost
        self._pace.skip(cost)

    def read(self, done: int, total: int) -> None:
        """So many prompts of ordinary language are read.

        Raises:
            NothingLearnedError: it is to stop, and there is nothing yet.
        """
        if self._stop_asked:
            raise NothingLearnedError(NOTHING_YET)
        self._read = max(self._read, done / max(1, total))
        self._reading = READING_SHARE if self._plan else 1.0
        self.say(f"Reading ordinary language, {min(done, total)} of {total} prompts")

    def at_step(self, step: int, steps: int) -> None:
        """So many steps of the training are done."""
        self._step, self._steps = step, steps

    def point(self, left: float, drift: float | None = None, smooth: bool = True) -> None:
        """What is left of the concept and the drift, for the curve.

        Args:
            smooth: of one batch, to be drawn towards those before; else as it is.
        """
        last = self._curve[-1] if self._curve and smooth else None
        if last is not None:
            left = last.left + SMOOTHING * (left - last.left)
            if drift is not None and last.drift is not None:
                drift = last.drift + SMOOTHING * (drift - last.drift)
        self._curve.append(CurvePoint(self.spent, left, drift))

    @property
    def curve(self) -> list[CurvePoint]:
        """The curve until now; grows."""
        return self._curve

    def say(self, stage: str) -> None:
        """From here on the run does something else, in words."""
        self._stage = stage
        self.tell()

    def tell(self) -> None:
        """Report how far the run is.

        Raises:
            StopAsked: see :meth:`stoppable`.
        """
        total = max(self.spent, sum(self._plan.values()))
        progress = Progress(
            self._stage,
            self.spent,
            total,
            self.loss,
            self._share(total),
            self._step,
            self._steps,
            self._pace.seconds_left(self.spent, total),
            self._curve,
            self._stop_asked,
        )
        self._report(progress)
        self._break_if_asked()

    def _share(self, total: int) -> float:
        predicted = self.spent / total if total else 0.0
        share = self._reading * self._read + (1 - self._reading) * predicted
        self._shown = max(self._shown, share)  # a bar doesn't go back when a plan grows
        return self._shown


def until_stopped(make: Callable[..., T], *given: Any) -> T | None:
    """What ``make`` gives; None if it is to stop before that is there."""
    try:
        return make(*given)
    except StopAsked:
        return None


class Pace:
    """How fast predictions go, and how long the rest will take.

    Args:
        clock: seconds, rising.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._skipped = 0
        self._before: tuple[int, float] | None = None  # spent, when
        self._seconds: float | None = None  # for a forward-equivalent

    def skip(self, cost: int) -> None:
        """That much took no time."""
        self._skipped += cost

    def seconds_left(self, spent: int, total: int) -> float | None:
        """Of the rest of the plan; None before there is something to go by."""
        now, own = self._clock(), spent - self._skipped
        if not own:
            self._before = (0, now)  # predictions begin after this
            return None
        if self._before is None:
            self._before = (own, now)
        cost, seconds = own - self._before[0], now - self._before[1]
        if cost >= LEAST_COST and seconds >= LEAST_SECONDS:
            each = seconds / cost
            # The first ones take longest; what came lately counts more.
            old = self._seconds
            self._seconds = each if old is None else old + PACE_SMOOTHING * (each - old)
            self._before = (own, now)
        return None if self._seconds is None else (total - spent) * self._seconds


class MeteredDenoiser(Denoiser):
    """A denoiser whose predictions are counted by a meter, in forward-equivalents per image.

    A prediction is 1; one whose gradient is wanted is 3, since a backward costs two forwards, or
    what the way its blocks are run costs (:class:`activations.BlockRun`). What doesn't fit the
    device's memory is predicted in smaller parts, unless its gradient is wanted: then it is the
    caller that must ask for less.
    """

    def __init__(self, denoiser: Denoiser, meter: Meter) -> None:
        self.meter = meter
        self.family, self.device, self.dtype = denoiser.family, denoiser.device, denoiser.dtype
        self._denoiser = denoiser
        self._most: int | None = None  # images at a time, once memory has run out
        self._with_gradient = PLAIN_GRADIENT
        self._own = 0  # of the denoiser's own predictions, what is counted

    @cached_property
    def names(self) -> Collection[str]:
        """As the denoiser's own, like all that follows."""
        names = self._denoiser.names
        self._count_own()
        return names

    @cached_property
    def ways(self) -> Mapping[str, Sequence[str]]:
        ways = self._denoiser.ways
        self._count_own()
        return ways

    @property
    def found_readers(self) -> Sequence[FoundReaders]:  # type: ignore[override]
        return self._denoiser.found_readers

    @property
    def reading_cost(self) -> float:  # type: ignore[override]
        return self._denoiser.reading_cost

    def read(self, prompts: Sequence[Encoded]) -> None:
        self._denoiser.read(prompts)
        self._count_own()

    def _count_own(self) -> None:
        """Count the predictions that the denoiser made by itself, in whole ones."""
        own = ceil(self._denoiser.own_cost)
        self.meter.spent += own - self._own
        self._own = own

    @cached_property
    def base(self) -> Mapping[str, Any]:
        return self._denoiser.base

    @cached_property
    def identity(self) -> str:
        return self._denoiser.identity

    def encode(self, prompts: Sequence[str], together: bool = False) -> list[Encoded]:
        return self._denoiser.encode(prompts, together)

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        return self._denoiser.token_ids(prompts)

    def vocabulary(self) -> Sequence[str]:
        return self._denoiser.vocabulary()

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        return self._denoiser.latent_shape(resolution)

    def sigmas(self, steps: int) -> Tensor:
        return self._denoiser.sigmas(steps)

    def noisy_latent(self, noise: Tensor, sigma: Tensor) -> Tensor:
        return self._denoiser.noisy_latent(noise, sigma)

    def noisy_picture(self, picture: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return self._denoiser.noisy_picture(picture, noise, sigma)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        return self._denoiser.loss_weight(sigma)

    def matrices(self) -> Mapping[str, Tensor]:
        return self._denoiser.matrices()

    def weights(self) -> Iterable[Tensor]:
        return self._denoiser.weights()

    def free_memory(self, wanted: int) -> int:
        return self._denoiser.free_memory(wanted)

    @contextmanager
    def around_blocks(self, run: BlockRun) -> Iterator[None]:
        """As the denoiser's own, and counted for what it costs."""
        before, self._with_gradient = self._with_gradient, run.forward_equivalents
        try:
            with self._denoiser.around_blocks(run):
                yield
        finally:
            self._with_gradient = before

    def predict_x0(
        self,
        x: Tensor,
        sigma: Tensor,
        prompts: Sequence[Encoded],
        edit: LowRankEdit | None = None,
    ) -> Tensor:
        """As the denoiser's own, counted and reported.

        Raises:
            PredictionError: there isn't memory for a single image.
        """
        wants_gradient = edit is not None and torch.is_grad_enabled()
        self.meter.spent += len(x) * (self._with_gradient if wants_gradient else 1)
        if wants_gradient:
            x0 = self._denoiser.predict_x0(x, sigma, prompts, edit)
        else:
            x0 = self._predict_what_fits(x, sigma, prompts, edit)
        self.meter.tell()
        return x0

    def _predict_what_fits(
        self, x: Tensor, sigma: Tensor, prompts: Sequence[Encoded], edit: LowRankEdit | None
    ) -> Tensor:
        while True:
            most = min(len(x), self._most or len(x))
            parts = [slice(i, i + most) for i in range(0, len(x), most)]
            try:
                found = [
                    self._denoiser.predict_x0(x[part], sigma[part], prompts[part], edit)
                    for part in parts
                ]
                return found[0] if len(found) == 1 else torch.cat(found)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if most == 1:
                    raise PredictionError(ADVICE.format(task="predict")) from error
            self._most = (most + 1) // 2
