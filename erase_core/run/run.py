"""The stages of one run, and the record of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..artefact.cautions import harm_warnings, training_warnings, unknown_warnings
from ..artefact.record import NO_HELP, NO_TRAINING, STOPPED, TRAINED, WORSE
from ..files.fingerprint import fingerprint
from ..method.closed_form import ClosedForm, EditRegression
from ..method.collateral import Others
from ..method.encoded import EncodedPrompts
from ..method.language import pooled_moment, read_language
from ..method.pooled import PooledEdit
from ..method.protection import HARM, LEAST_GAIN, RIDGES, Choice, strongest_that_moves
from ..method.reading import Reading
from ..method.subspace import ExactSet
from ..model.activations import Recompute
from ..model.denoiser import Denoiser, LowRankEdit
from ..settings.prompts import name_of, prompt_warnings
from ..settings.settings import EraseSettings
from ..version import VERSION
from .checks import checked_states, spread_over
from .measure import CountedDenoiser, movement_on
from .plan import STOP_EVERY, STOP_STATES, planned_cost, trajectory_counts, tried_states
from .states import Sampling, States, Trajectories, draw_pairs, sample_states
from .trainer import DivergedError, SurgeryTrainer, TrainingError

READING = "Reading ordinary language, {0[0]} of {0[1]} prompts"


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


class Run:
    """The stages of one run with their shared state: settings, random numbers, cost, losses."""

    def __init__(self, settings: EraseSettings, denoiser: Denoiser) -> None:
        self.settings = settings
        self.denoiser = CountedDenoiser(denoiser)
        self.losses: list[float] = []
        self.converged = False
        self.training = NO_TRAINING
        self.gradient_apart: float | None = None
        self._checked_with: bool | None = None  # checkpointing, when the gradient was checked
        self.memory: dict[str, Any] | None = None
        self.ended_by = ""  # what ended training before its time, in words
        self.generator = torch.Generator().manual_seed(settings.seed)
        self._started = time.monotonic()
        self._shape = denoiser.latent_shape(settings.resolution)
        self._plan: dict[str, int] = {}

    @cached_property
    def matrices(self) -> dict[str, Tensor]:
        """The trained matrices. Asked for after the text encoder is done: it loads the model."""
        return dict(self.denoiser.matrices())

    def plan(self, prompts: EncodedPrompts) -> None:
        """Know what the run will cost at most."""
        pooled = prompts.null.pooled is not None
        self._planned = partial(planned_cost, self.settings, pooled, len(prompts.plain))
        self._plan = self._planned()

    def progress(self, stage: str) -> Progress:
        loss = self.losses[-1] if self.losses else None
        done, total = self.denoiser.forward_equivalents, sum(self._plan.values())
        return Progress(stage, done, max(done, total), loss)

    def language(
        self, reading: Reading, cache: MutableMapping[str, Tensor] | None
    ) -> Iterator[Progress]:
        """What the text encoder's ordinary language is."""
        stage = read_language(self.denoiser, reading, cache, self.erased)
        return (yield from self._follow(stage, READING))

    def pooled_language(
        self, prompts: Sequence[str], cache: MutableMapping[str, Tensor] | None
    ) -> Iterator[Progress]:
        """The same of pooled vectors."""
        stage = pooled_moment(self.denoiser, prompts, cache, self.erased)
        return (yield from self._follow(stage, READING))

    @property
    def erased(self) -> list[str]:
        """What is erased; protected, it would hold back what is to move."""
        return [name_of(c.text, self.settings.kind_of(c)) for c in self.settings.concepts]

    @property
    def spoken(self) -> list[str]:
        """What is erased and what takes its place: no words that nobody named."""
        concepts, kind_of = self.settings.concepts, self.settings.kind_of
        return [
            *self.erased,
            *(name_of(c.alternative, kind_of(c)) for c in concepts if c.alternative),
        ]

    def held_out_states(self, prompts: EncodedPrompts) -> Iterator[Progress]:
        """States to check on; None where nothing is sampled."""
        if not self.settings.samples:
            return None
        _, checking = trajectory_counts(self.settings)
        states = yield from self._pairs(prompts, checking, "Sampling states to check on")
        _refuse_if_nothing_to_move(self.settings, states)
        return states

    def training_states(self, prompts: EncodedPrompts, count: int) -> Iterator[Progress]:
        """States to train on, from ``count`` trajectories for each concept."""
        most, _ = trajectory_counts(self.settings)
        count = min(most, count * len(self.settings.concepts))
        return (yield from self._pairs(prompts, count, "Sampling states"))

    def all_training_states(
        self, prompts: EncodedPrompts, sampled: States | None
    ) -> Iterator[Progress]:
        """All states to train on, those among them that are sampled already."""
        most, _ = trajectory_counts(self.settings)
        if sampled is not None:
            most -= len(sampled) // self.settings.sampling_steps
        if not most:
            return sampled
        more = yield from self._pairs(prompts, most, "Sampling states")
        return more if sampled is None else States.join([sampled, more])

    def kept_states(self, prompts: EncodedPrompts) -> Iterator[Progress]:
        """States of what the soft form holds; None in the hard form."""
        kept = prompts.held
        if self.settings.form != "soft" or not kept:
            return None
        noise = torch.randn(len(kept), *self._shape, generator=self.generator)
        wanted = Trajectories([[k] for k in kept], [0] * len(kept), range(len(kept)), noise)
        return (yield from self._sample(prompts, wanted, "Sampling states to keep"))

    def choose(
        self,
        regression: EditRegression,
        prompts: EncodedPrompts,
        held_out: States | None,
        readers: dict[str, Tensor],
        pooled: PooledEdit | None,
        others: Others,
    ) -> Iterator[Progress]:
        """The closed form with the user's ridge, or with the strongest that moves far enough.

        Args:
            pooled: the edit that goes with it.
            others: words that the ridge doesn't protect.
        """
        settings = self.settings

        def moves(solution: ClosedForm) -> Iterator[int]:
            edit = LowRankEdit.shared(solution.basis.float(), solution.factors(readers))
            edit = edit.with_more(pooled.edit()) if pooled else edit
            return (yield from self._tried(edit.to(self.denoiser.device), prompts, held_out))

        measured = None if held_out is None else moves
        ridges = RIDGES if settings.protection is None else (settings.protection,)
        stage = strongest_that_moves(regression, settings.rank, measured, others, ridges)
        return (yield from self.follow_stage("protection", stage, "Choosing the protection"))

    def _tried(self, edit: LowRankEdit, prompts: EncodedPrompts, held_out: States) -> Iterator[int]:
        """Movement on the few held-out states that edits are compared on."""
        checked = spread_over(held_out, prompts.pairs, tried_states(self.settings))
        return (yield from self._movement(edit, prompts, checked))

    def try_training(
        self,
        trainer: SurgeryTrainer,
        prompts: EncodedPrompts,
        held_out: States,
        choice: Choice,
        should_stop: Callable[[], bool],
    ) -> Iterator[Progress]:
        """Whether a few steps bring the concept that moves least nearer on held-out states.

        Steps that diverge don't help. What came of it stands in the record.
        """
        yield from self.check_gradient(trainer)
        before = self.denoiser.forward_equivalents
        self.training = NO_HELP
        steps, number = islice(trainer.run(should_stop), self.settings.trial_steps), 0
        try:
            for number, _ in enumerate(steps, start=1):
                yield self.progress(f"Trying whether training helps, step {number}")
        except DivergedError as error:
            self.ended_by = str(error)
            return False
        if number < self.settings.trial_steps:
            self.training = STOPPED
            return False
        after = yield from self._follow(
            self._tried(trainer.result(), prompts, held_out), "Trying whether training helps"
        )
        self._plan["trial"] = self.denoiser.forward_equivalents - before
        return min(after.concepts) >= min(choice.moved) + LEAST_GAIN

    def only_checks_left(self, held_out: States | None, measured: bool) -> None:
        """Of the plan the checks are left, without the movement where that is measured."""
        if held_out is None:
            return
        known = checked_states(self.settings, len(held_out)) if measured else 0
        self._plan = {
            "until here": self.denoiser.forward_equivalents,
            "checks": self._plan["checks"] - known,
        }

    def got_worse(
        self,
        edit: LowRankEdit,
        prompts: EncodedPrompts,
        held_out: States,
        choice: Choice,
        others: Others,
    ) -> Iterator[Progress]:
        """Whether training ended behind where it began, or at the cost of others."""
        ended = yield from self._follow(
            self._tried(edit, prompts, held_out), "Comparing with the start"
        )
        harmed = others.of_edit(edit, others.witnesses).mean > max(HARM, 2 * choice.others.mean)
        return harmed or min(ended.concepts) < min(choice.moved) - LEAST_GAIN

    def check_gradient(self, trainer: SurgeryTrainer) -> Iterator[Progress]:
        """Before the first step: what fits the memory, and is the gradient the loss's?"""
        yield self.progress("Checking the gradient")
        before = self.denoiser.forward_equivalents
        trainer.fit_to_memory()
        # A trial's stands for the training after it, where both compute it in the same way.
        if self._checked_with != trainer.fit.checkpointing:
            self.gradient_apart = trainer.check_gradient()
            self._checked_with = trainer.fit.checkpointing
        self._plan["gradient"] = self.denoiser.forward_equivalents - before
        if trainer.fit.checkpointing:
            planned = self._planned(with_gradient=Recompute.forward_equivalents)
            self._plan["training"] = planned["training"]

    def train(
        self,
        trainer: SurgeryTrainer,
        prompts: EncodedPrompts,
        held_out: States,
        should_stop: Callable[[], bool],
    ) -> Iterator[Progress]:
        """All steps, unless the caller stops or the held-out residual stays under the threshold.

        Training that diverges ends there, and what was learned before is kept.
        """
        before, low = self.denoiser.forward_equivalents, 0
        checked = spread_over(held_out, prompts.pairs, STOP_STATES * len(self.settings.concepts))
        for loss in self._until_it_diverges(trainer.run(should_stop)):
            self.losses.append(loss)
            yield self.progress(f"Training, step {len(self.losses)} of {self.settings.steps}")
            if self.settings.stop_below and len(self.losses) % STOP_EVERY == 0:
                movement = yield from self._follow(
                    self._movement(trainer.result(), prompts, checked),
                    "Checking on held-out states",
                )
                low = low + 1 if 1 - min(movement.concepts) < self.settings.stop_below else 0
                if low == 2:
                    self.converged = True
                    break
        self.memory = trainer.memory()
        self._plan["training"] = self.denoiser.forward_equivalents - before

    def _until_it_diverges(self, losses: Iterator[float]) -> Iterator[float]:
        try:
            yield from losses
        except DivergedError as error:
            if not self.losses:
                raise
            self.ended_by = str(error)

    def record(
        self,
        prompts: EncodedPrompts,
        exact: ExactSet,
        choice: Choice | None,
        edit: LowRankEdit,
        measures: dict[str, Any],
        others: dict[str, Any] | None,
        unknown: float,
    ) -> dict[str, Any]:
        """What the artefact says about itself.

        Args:
            others: what else it changes, see :meth:`collateral.Others.report`.
            unknown: share of the plain captions that the text encoder doesn't know.
        """
        settings, steps = self.settings, len(self.losses)
        trained = self.training in (TRAINED, WORSE, STOPPED)
        solution = choice.solution if choice else None
        values = [*edit.factors.values()]
        values += edit.bases.values() if settings.form == "soft" else []
        return {
            "version": VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017
            "family": self.denoiser.family,
            "base": dict(self.denoiser.base),
            "text_encoder": fingerprint({"null prompt": prompts.null.tokens}),
            "settings": settings.as_dict(),
            "form": settings.form,
            "concepts": _concepts(settings, exact, solution, measures),
            "matrices": len(edit.factors),
            "rank": max(factor.shape[1] for factor in edit.factors.values()),
            "values_trained": sum(t.numel() for t in values) if self.training == TRAINED else 0,
            "subspace": {"exact_rank": exact.basis.shape[1], "share_left": exact.share_left},
            "protection": choice.ridge if choice else 0.0,
            "harm": solution.harm if solution else None,
            "measures": measures,
            "others": others,
            "warnings": [
                *harm_warnings(settings, measures, others),
                *training_warnings(settings, self.training),
                *unknown_warnings(unknown),
                *prompts.warnings,
                *prompt_warnings(settings),
            ],
            "training": self.training,
            "losses": self.losses,
            "steps_done": steps,
            "converged": self.converged,
            "complete": self.converged or not trained or steps == settings.steps,
            "stopped_early": trained and steps < settings.steps,
            "ended_by": self.ended_by,
            "gradient_apart": self.gradient_apart,
            "memory": self.memory,
            "forward_equivalents": self.denoiser.forward_equivalents,
            "seconds": round(time.monotonic() - self._started, 2),
        }

    def follow_stage(
        self, name: str, stage_run: Iterator, stage: str = "{0}"
    ) -> Iterator[Progress]:
        """Run a stage to its end and put what it cost in the place of what was planned for it."""
        before = self.denoiser.forward_equivalents
        result = yield from self._follow(stage_run, stage)
        self._plan[name] = self.denoiser.forward_equivalents - before
        return result

    def _movement(
        self, edit: LowRankEdit, prompts: EncodedPrompts, states: States
    ) -> Iterator[int]:
        batch = 3 * self.settings.batch  # what the pool was sampled with fits the device
        return movement_on(self.denoiser, prompts.pairs, states, edit, self.settings.eta, batch)

    def _pairs(self, prompts: EncodedPrompts, count: int, stage: str) -> Iterator[Progress]:
        driven_by = self.settings.driven_by
        wanted = draw_pairs(prompts.pairs, count, self._shape, self.generator, driven_by)
        return (yield from self._sample(prompts, wanted, stage))

    def _sample(
        self, prompts: EncodedPrompts, wanted: Trajectories, stage: str
    ) -> Iterator[Progress]:
        sampling = Sampling(
            self.denoiser.sigmas(self.settings.sampling_steps).cpu(), self.settings.guidance_scale
        )
        parts = []
        for start in range(0, len(wanted), self.settings.batch):
            part = wanted[start : start + self.settings.batch]
            states = sample_states(self.denoiser, prompts.null, part, sampling)
            parts.append((yield from self._follow(states, stage)))
        return States.join(parts)

    def _follow(self, stage_run: Iterator, stage: str) -> Iterator[Progress]:
        """Run a stage to its end, turning what it yields into progress.

        Args:
            stage: its name; ``{0}`` in it stands for what was yielded.
        """
        while True:
            try:
                item = next(stage_run)
            except StopIteration as end:
                return end.value
            yield self.progress(stage.format(item))


def _refuse_if_nothing_to_move(settings: EraseSettings, states: States) -> None:
    distance = (states.g_erased - states.g_alternative).double().square().sum()
    if distance <= 1e-12 * states.g_erased.double().square().sum():
        raise TrainingError(
            f"The model already draws {settings.concepts[0].text!r} like its replacement: there is "
            "no guidance to change. Check the spelling, or name a different alternative."
        )


def _concepts(
    settings: EraseSettings, exact: ExactSet, solution: ClosedForm | None, measures: dict[str, Any]
) -> list[dict[str, Any]]:
    """What became of each concept."""
    held_out = measures["moved_held_out"]
    return [
        {
            **dataclasses.asdict(concept),
            "share_left": exact.shares_left[index],
            "keys_and_values_moved": solution.moved[index] if solution else None,
            "moved": held_out["concepts"][index] if held_out else None,
            "columns": list(solution.columns[index])
            if solution and settings.form == "hard"
            else None,
        }
        for index, concept in enumerate(settings.concepts)
    ]
