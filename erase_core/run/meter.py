"""What is needed at every depth of a run: its cost, how far it is, and whether it is to stop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..model.activations import PLAIN_GRADIENT, BlockRun
from ..model.denoiser import Denoiser
from ..model.low_rank import LowRankEdit
from ..model.memory import ADVICE, out_of_memory
from ..model.prompt import Encoded


class PredictionError(RuntimeError):
    """The model's predictions can't be used."""


class TrainingError(RuntimeError):
    """Training can't go on, or there is nothing to train."""


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        stage: what it is doing, in words.
        done, total: forward-equivalents spent and planned; the plan shrinks when a stage needs
            less than it might have.
        loss: surgery loss of the latest step, from about 1 (nothing moved) to 0; None before.
    """

    stage: str
    done: int
    total: int
    loss: float | None = None


class Meter:
    """Counts what a run costs, says how far it is, and knows whether it is to stop.

    Every prediction and every batch of prompts that is read comes by here. So whoever hands a
    meter in can end the run from ``report``: what it raises passes through, and nothing is changed.

    Args:
        report: called with a :class:`Progress` often.
        should_stop: asked before each optimiser step; True ends training early, and what was
            learned so far is measured and returned.

    Attributes:
        spent: forward-equivalents until now.
        loss: surgery loss of the latest step.
        reused: whether the result was found among stored ones.
    """

    def __init__(
        self,
        report: Callable[[Progress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.should_stop = should_stop
        self.spent = 0
        self.loss: float | None = None
        self.reused = False
        self._report, self._stage = report, ""
        self._plan: dict[str, int] = {}

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

    def say(self, stage: str) -> None:
        """From here on the run does something else, in words."""
        self._stage = stage
        self.tell()

    def tell(self) -> None:
        """Report how far the run is."""
        total = max(self.spent, sum(self._plan.values()))
        self._report(Progress(self._stage, self.spent, total, self.loss))


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

    @cached_property
    def names(self) -> Collection[str]:
        """As the denoiser's own, like all that follows."""
        return self._denoiser.names

    @cached_property
    def ways(self) -> Mapping[str, Sequence[str]]:
        return self._denoiser.ways

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
