"""Training, where it helps: tried with a few steps, run to its end, compared with its start."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from ..artefact.record import NO_HELP, NO_TRAINING, NOT_NEEDED, STOPPED, TRAINED, WORSE
from ..method.closed_form import ClosedForm
from ..method.collateral import Others
from ..method.guidance import Movement
from ..method.protection import AIM, HARM, LEAST_GAIN, RidgeChoice
from ..model.activations import Recompute
from ..model.low_rank import LowRankEdit
from .given import Given
from .measure import movement_on
from .plan import STOP_EVERY, STOP_STATES, TRIAL_TRAJECTORIES, tried_states
from .states import States, balanced_states, sample_kept, sample_to_train_on
from .trainer import DivergedError, Pool, Ridge, SurgeryTrainer


@dataclass(frozen=True)
class Start:
    """What training starts from, and what it is judged by.

    Attributes:
        edit: the closed form, or no change where there is none.
        choice: how the closed form was chosen; None where there is none.
        ridges: what protects ordinary language.
        others: words that nothing protects; None where they aren't known.
        held_out: states to check on; None where nothing is sampled.
        sampled: states to train on, as far as they are sampled already.
    """

    edit: LowRankEdit
    choice: RidgeChoice | None
    ridges: list[Ridge]
    others: Others | None
    held_out: States | None
    sampled: States | None = None

    @property
    def solution(self) -> ClosedForm | None:
        """The closed form of the tokens; None where there is none."""
        return self.choice.solution if self.choice else None


@dataclass(frozen=True)
class Checked:
    """What the gradient's check found.

    Attributes:
        apart: how far gradient and difference are apart, relative.
        checkpointing: whether the gradient was computed with blocks run again.
    """

    apart: float
    checkpointing: bool


@dataclass(frozen=True)
class Trained:
    """What became of the training.

    Attributes:
        edit: the edit to hand on.
        outcome: one of the words in :mod:`record`, :data:`record.TRAINED` for example.
        losses: surgery loss of every step of the training proper.
        converged: whether it ended as little was left to go.
        ended_by: what ended it before its time, in words; "" for nothing.
        gradient: what its check found; None where it wasn't needed.
        memory: how a batch went through the model; None without training.
    """

    edit: LowRankEdit
    outcome: str = NO_TRAINING
    losses: list[float] = field(default_factory=list)
    converged: bool = False
    ended_by: str = ""
    gradient: Checked | None = None
    memory: dict[str, Any] | None = None


def train_where_it_helps(given: Given, start: Start) -> Trained:
    """The edit after training, where held-out states say that training helps; else the start.

    A closed form that moves the guidance far enough is left as it is. One that doesn't is tried
    with a few steps on a few states first: on the models that this was measured on, more of them
    seldom helped where those didn't.

    Raises:
        GradientError, PredictionError, TrainingError: see there.
    """
    settings, choice = given.settings, start.choice
    if not settings.steps:
        return Trained(start.edit)
    solved = choice is not None and settings.warm_start
    gradient, states = None, start.sampled
    if choice is not None and solved and settings.trial_steps:
        if min(choice.moved) >= AIM:
            return Trained(start.edit, NOT_NEEDED)
        states = sample_to_train_on(given, per_concept=TRIAL_TRAJECTORIES)
        tried = _try(given, start, choice, states)
        if tried.outcome != TRAINED:
            return tried
        gradient = tried.gradient
    states = sample_to_train_on(given, states)
    trained = _train(given, start, states, gradient)
    if choice is not None and solved and settings.form == "hard":
        if _is_worse(given, start, choice, trained.edit):
            return replace(trained, edit=start.edit, outcome=WORSE)
    return trained


def _try(given: Given, start: Start, choice: RidgeChoice, states: States) -> Trained:
    """Whether a few steps bring the concept that moves least nearer on held-out states.

    Steps that diverge don't help.

    Returns:
        With the outcome :data:`record.TRAINED` if they do; else with the start's edit.
    """
    meter, wanted, done = given.meter, given.settings.trial_steps, 0
    trainer = _trainer(given, start, states, None)
    gradient = _check_gradient(given, trainer, None)
    with meter.part("trial"):
        try:
            for index in islice(trainer.batches(), wanted):
                if meter.should_stop():
                    break
                done += 1
                meter.say(f"Trying whether training helps, step {done}")
                trainer.step(index)
        except DivergedError as error:
            return Trained(start.edit, NO_HELP, ended_by=str(error), gradient=gradient)
        if done < wanted:
            return Trained(start.edit, STOPPED, gradient=gradient)
        meter.say("Trying whether training helps")
        after = tried_movement(given, trainer.result(), start.held_out)
    helps = min(after.concepts) >= min(choice.moved) + LEAST_GAIN
    return Trained(start.edit, TRAINED if helps else NO_HELP, gradient=gradient)


def _train(given: Given, start: Start, states: States, gradient: Checked | None) -> Trained:
    """All steps, unless the caller stops or the held-out residual stays under the threshold.

    Training that diverges ends there, and what was learned before is kept.
    """
    settings, meter = given.settings, given.meter
    trainer = _trainer(given, start, states, sample_kept(given))
    gradient = _check_gradient(given, trainer, gradient)
    losses: list[float] = []
    converged, ended_by, low = False, "", 0
    assert start.held_out is not None  # settings with steps sample
    checked = balanced_states(
        start.held_out, given.prompts.pairs, STOP_STATES * len(settings.concepts)
    )
    with meter.part("training"):
        for index in trainer.batches():
            if meter.should_stop():
                break
            meter.say(f"Training, step {len(losses) + 1} of {settings.steps}")
            try:
                loss = trainer.step(index)
            except DivergedError as error:
                if not losses:
                    raise
                ended_by = str(error)
                break
            losses.append(loss)
            meter.loss = loss
            if settings.stop_below and len(losses) % STOP_EVERY == 0:
                meter.say("Checking on held-out states")
                movement = _movement(given, trainer.result(), checked)
                low = low + 1 if 1 - min(movement.concepts) < settings.stop_below else 0
                converged = low == 2
                if converged:
                    break
    return Trained(
        trainer.result(), TRAINED, losses, converged, ended_by, gradient, trainer.memory()
    )


def _trainer(
    given: Given, start: Start, states: States, kept_states: States | None
) -> SurgeryTrainer:
    prompts = given.prompts
    pool = Pool(prompts.pairs, states, prompts.null, prompts.held, kept_states)
    columns = start.solution.columns if start.solution else []
    return SurgeryTrainer(given.model, pool, start.edit, columns, start.ridges, given.settings)


def _check_gradient(given: Given, trainer: SurgeryTrainer, before: Checked | None) -> Checked:
    """Before the first step: what fits the memory, and is the gradient the loss's?

    Args:
        before: the check of a trial, which stands for the training after it where both compute
            the gradient in the same way.
    """
    meter = given.meter
    meter.say("Checking the gradient")
    with meter.part("gradient"):
        trainer.fit_to_memory()
        if before is None or before.checkpointing != trainer.fit.checkpointing:
            apart = trainer.check_gradient()
            before = Checked(apart, trainer.fit.checkpointing)
    if trainer.fit.checkpointing:
        meter.plan({"training": given.planned(Recompute.forward_equivalents)["training"]})
    return before


def _is_worse(given: Given, start: Start, choice: RidgeChoice, edit: LowRankEdit) -> bool:
    """Whether training ended behind where it began, or at the cost of others."""
    given.meter.say("Comparing with the start")
    ended = tried_movement(given, edit, start.held_out)
    harmed = False
    if start.others is not None:
        changes = start.others.of_edit(edit, start.others.witnesses)
        harmed = changes.mean > max(HARM, 2 * choice.others.mean)
    return harmed or min(ended.concepts) < min(choice.moved) - LEAST_GAIN


def tried_movement(given: Given, edit: LowRankEdit, held_out: States | None) -> Movement:
    """Movement on the few held-out states that edits are compared on."""
    assert held_out is not None  # who compares predictions has sampled
    checked = balanced_states(held_out, given.prompts.pairs, tried_states(given.settings))
    return _movement(given, edit, checked)


def _movement(given: Given, edit: LowRankEdit, states: States) -> Movement:
    pairs, eta = given.prompts.pairs, given.settings.eta
    return movement_on(given.model, pairs, states, edit, eta, given.checked_at_once)
