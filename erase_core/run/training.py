"""Training, where it helps: tried with a few steps, run to its end, compared with its start."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor

from ..artefact.record import NO_HELP, NO_TRAINING, NOT_NEEDED, STOPPED, TRAINED, WORSE
from ..artefact.unfinished import Part
from ..method.closed_form import ClosedForm
from ..method.collateral import Others
from ..method.guidance import Movement
from ..method.protection import AIM, HARM, LEAST_GAIN, RidgeChoice
from ..model.activations import Recompute
from ..model.low_rank import LowRankEdit
from .given import Given
from .measure import movement_on
from .meter import NOT_A_STEP_YET, CurvePoint, NothingLearnedError, until_stopped
from .plan import STOP_EVERY, STOP_STATES, TRIAL_TRAJECTORIES, tried_states
from .ridge import Ridge, drift_of
from .states import States, balanced_states, sample_kept, sample_to_train_on
from .trainer import DivergedError, Pool, SurgeryTrainer
from .watch import Watch, show_measured


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
        NothingLearnedError: it was stopped, and there was nothing to start from.
    """
    _draw_start(given, start)
    trained = None
    if not given.settings.samples or start.held_out is not None:
        trained = until_stopped(_trained_where_it_helps, given, start)
    if trained is None:
        refuse_nothing(given, start)
        return Trained(start.edit, STOPPED)
    return trained


def refuse_nothing(given: Given, start: Start) -> None:
    """What was stopped before its first step must have had something to start from.

    Raises:
        NothingLearnedError: it hasn't.
    """
    if start.choice is None or not given.settings.warm_start:
        raise NothingLearnedError(NOT_A_STEP_YET)


def _draw_start(given: Given, start: Start) -> None:
    """The first points of the curve: the untouched model, and the closed form where there is one.

    How far the closed form moves is known by now, and what it changes needs no prediction.
    """
    meter = given.meter
    meter.point(1.0, 0.0, smooth=False)
    if start.choice is not None and given.settings.warm_start:
        meter.point(1 - min(start.choice.moved), drift_of(start.ridges, start.edit), smooth=False)


def _trained_where_it_helps(given: Given, start: Start) -> Trained:
    settings, choice = given.settings, start.choice
    if not settings.steps:
        return Trained(start.edit)
    solved = choice is not None and settings.warm_start
    gradient, states = None, start.sampled
    if choice is not None and solved and settings.trial_steps:
        if min(choice.moved) >= AIM:
            return Trained(start.edit, NOT_NEEDED)
        states = sample_to_train_on(given, per_concept=TRIAL_TRAJECTORIES)
        tried = _known_or_tried(given, start, choice, states)
        if tried.outcome != TRAINED:
            return tried
        gradient = tried.gradient
    states = sample_to_train_on(given, states)
    trained = _train(given, start, states, gradient)
    if choice is not None and solved and settings.form == "hard":
        if _is_worse(given, start, choice, trained.edit):
            return replace(trained, edit=start.edit, outcome=WORSE)
    return trained


def _known_or_tried(given: Given, start: Start, choice: RidgeChoice, states: States) -> Trained:
    """What a trial says, or said in an earlier run."""
    known = given.journal.known("trial")
    if known is not None:
        gradient = Checked(**known["gradient"])
        return Trained(start.edit, known["outcome"], ended_by=known["ended_by"], gradient=gradient)
    before = given.meter.spent
    tried = _try(given, start, choice, states)
    if tried.outcome != STOPPED and tried.gradient is not None:
        said: dict[str, Any] = {"outcome": tried.outcome, "ended_by": tried.ended_by}
        said["gradient"] = asdict(tried.gradient)
        given.journal.note("trial", said, given.meter.spent - before)
    return tried


def _try(given: Given, start: Start, choice: RidgeChoice, states: States) -> Trained:
    """Whether a few steps bring the concept that moves least nearer on held-out states.

    Steps that diverge don't help.

    Returns:
        With the outcome :data:`record.TRAINED` if they do; else with the start's edit.
    """
    meter, wanted, done = given.meter, given.settings.trial_steps, 0
    trainer = _trainer(given, start, states, None)
    gradient = _check_gradient(given, trainer, None)
    watch = Watch(given, states, trainer)
    with meter.part("trial"):
        try:
            for index in islice(trainer.batches(), wanted):
                if meter.should_stop():
                    break
                done += 1
                meter.say(f"Trying whether training helps, step {done}")
                trainer.step(index)
                watch.show()
        except DivergedError as error:
            return Trained(start.edit, NO_HELP, ended_by=str(error), gradient=gradient)
        if done < wanted:
            return Trained(start.edit, STOPPED, gradient=gradient)
        meter.say("Trying whether training helps")
        after = tried_movement(given, trainer.result(), start.held_out)
    helps = min(after.concepts) >= min(choice.moved) + LEAST_GAIN
    return Trained(start.edit, TRAINED if helps else NO_HELP, gradient=gradient)


@dataclass
class Course:
    """How far a training is.

    Attributes:
        gradient: what its check found.
        losses: surgery loss of every step.
        asked_at: the step after which held-out states were asked last.
        low: how often in a row they said that little is left.
        converged: whether that ended it.
        ended_by: what ended it before its time, in words.
        checked: forward-equivalents of the gradient's check.
        cost: of the training until then.
    """

    gradient: Checked
    losses: list[float] = field(default_factory=list)
    asked_at: int = 0
    low: int = 0
    converged: bool = False
    ended_by: str = ""
    checked: int = 0
    cost: int = 0

    def kept(self, trainer: SurgeryTrainer, curve: Sequence[CurvePoint]) -> Part:
        """All that another run needs to go on."""
        state = trainer.state()
        own = {"course": asdict(self), "curve": [list(point) for point in curve]}
        return Part({**state.values, **own}, state.tensors)

    @classmethod
    def of(cls, part: Part) -> Course | None:
        """As it was kept; None if the part isn't what it says."""
        try:
            values = copy.deepcopy(part.values["course"])
            course = cls(**{**values, "gradient": Checked(**values["gradient"])})
        except (KeyError, TypeError, ValueError):
            return None
        return course if len(course.losses) == part.values.get("steps") else None


def _train(given: Given, start: Start, states: States, gradient: Checked | None) -> Trained:
    """All steps, unless the caller stops or the held-out residual stays under the threshold.

    Training that diverges ends there, and what was learned before is kept.
    """
    meter = given.meter
    trainer = _trainer(given, start, states, sample_kept(given))
    course = _gone_on(given, trainer) or _begun(given, trainer, gradient)
    batches, watch = trainer.batches(), Watch(given, states, trainer)
    before = meter.spent
    with meter.part("training"):
        meter.skip(course.cost)
        while not _is_enough(given, start, trainer, course):
            course.cost = meter.spent - before
            given.journal.progressed(trainer.state_size, partial(course.kept, trainer, meter.curve))
            index = next(batches, None)
            if index is None or meter.should_stop():
                break
            if not _step(given, trainer, course, index):
                break
            meter.point(*trainer.left_and_drift())
            watch.show()
    if not course.losses:
        refuse_nothing(given, start)
    return Trained(
        trainer.result(),
        TRAINED,
        course.losses,
        course.converged,
        course.ended_by,
        course.gradient,
        trainer.memory(),
    )


def _gone_on(given: Given, trainer: SurgeryTrainer) -> Course | None:
    """Where an earlier run was, its cost on the meter; None if there is none to go on with."""
    meter, part = given.meter, given.journal.progress()
    course = Course.of(part) if part is not None else None
    if part is None or course is None or not trainer.go_on(part):
        return None
    with meter.part("gradient"):
        meter.skip(course.checked)
    meter.resumed_at = len(course.losses)
    meter.loss = course.losses[-1] if course.losses else None
    meter.curve[:] = [CurvePoint(*point) for point in part.values["curve"]]
    _plan_training(given, trainer)
    meter.at_step(len(course.losses), given.settings.steps)
    meter.say(f"Going on from step {len(course.losses)} of {given.settings.steps}")
    return course


def _begun(given: Given, trainer: SurgeryTrainer, gradient: Checked | None) -> Course:
    before = given.meter.spent
    gradient = _check_gradient(given, trainer, gradient)
    return Course(gradient, checked=given.meter.spent - before)


def _step(given: Given, trainer: SurgeryTrainer, course: Course, index: Tensor) -> bool:
    """A step; returns whether there may be another."""
    meter, steps = given.meter, given.settings.steps
    meter.at_step(len(course.losses), steps)
    meter.say(f"Training, step {len(course.losses) + 1} of {steps}")
    try:
        loss = trainer.step(index)
    except DivergedError as error:
        if not course.losses:
            raise
        course.ended_by = str(error)
        return False
    course.losses.append(loss)
    meter.loss = loss
    meter.at_step(len(course.losses), steps)
    return True


def _is_enough(given: Given, start: Start, trainer: SurgeryTrainer, course: Course) -> bool:
    """Whether held-out states have said twice in a row that little is left; asked now and then."""
    settings, done = given.settings, len(course.losses)
    if not settings.stop_below or done % STOP_EVERY or course.asked_at == done:
        return course.converged
    given.meter.say("Checking on held-out states")
    assert start.held_out is not None  # settings with steps sample
    checked = balanced_states(
        start.held_out, given.prompts.pairs, STOP_STATES * len(settings.concepts)
    )
    movement = _movement(given, trainer.result(), checked)
    course.low = course.low + 1 if 1 - min(movement.concepts) < settings.stop_below else 0
    course.asked_at, course.converged = done, course.low == 2
    return course.converged


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
    with meter.part("gradient"), meter.stoppable():
        trainer.fit_to_memory()
        if before is None or before.checkpointing != trainer.fit.checkpointing:
            apart = trainer.check_gradient()
            before = Checked(apart, trainer.fit.checkpointing)
    _plan_training(given, trainer)
    return before


def _plan_training(given: Given, trainer: SurgeryTrainer) -> None:
    """Recomputing the blocks costs more than was planned."""
    if trainer.fit.checkpointing:
        training = given.planned(Recompute.forward_equivalents)["training"]
        given.meter.plan({"training": training})


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


def known_movement(given: Given, name: str, edit: LowRankEdit, held_out: States | None) -> Movement:
    """The same as a fact that is kept.

    Args:
        name: of the fact.

    Raises:
        StopAsked: it is to stop.
    """
    with given.meter.stoppable():
        found = given.journal.fact(name, lambda: asdict(tried_movement(given, edit, held_out)))
    return Movement(**found)


def _movement(given: Given, edit: LowRankEdit, states: States) -> Movement:
    pairs, eta, at_once = given.prompts.pairs, given.settings.eta, given.checked_at_once
    return movement_on(given.model, pairs, states, edit, eta, at_once, show_measured(given))
