"""One erasure from settings to artefact: read, solve, sample, train, measure."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..artefact.erasure import Erasure
from ..artefact.identity import USE_IF_THERE, result_key, stored_result
from ..artefact.unfinished import Part
from ..method.already import refuse_already_erased
from ..method.closed_form import ClosedForm
from ..method.collateral import Others
from ..method.encoded import encode_prompts
from ..method.guidance import Movement
from ..method.protection import (
    LEAST_MOVED,
    RIDGES,
    RUIN,
    Moves,
    RidgeChoice,
    strongest_that_moves,
)
from ..method.subspace import ExactSet, SubspaceError
from ..method.ways import WayIn, exact_prompts, ways_in
from ..model.denoiser import Denoiser
from ..model.low_rank import LowRankEdit
from ..model.prompt import TOKENS
from ..settings.settings import EraseSettings
from ..settings.texts import SettingsError
from ..version import VERSION
from .checks import measure
from .given import Given
from .heard import Heard, hear
from .meter import Meter, MeteredDenoiser, until_stopped
from .plan import checked_states
from .recorded import record_of
from .resume import journal_of, left_run
from .ridge import Ridge
from .states import States, sample_held_out, sample_to_train_on
from .training import Start, Trained, known_movement, train_where_it_helps


def erase(
    settings: EraseSettings,
    denoiser: Denoiser,
    language_cache: MutableMapping[str, Tensor] | None = None,
    meter: Meter | None = None,
    results: MutableMapping[str, Erasure] | None = None,
    reuse: str = USE_IF_THERE,
    unfinished: MutableMapping[str, Part] | None = None,
) -> Erasure:
    """Train one erasure.

    The denoiser's weights are read, never written. The same settings, model and machine give the
    same result.

    Args:
        language_cache: what was read of ordinary language by key, kept by the caller.
        meter: what it costs, how far it is, and whether to stop, for the caller to look at.
        results: finished erasures by key, kept by the caller. A complete one with the key of this
            run is returned without any prediction; a new one is put in before it is returned.
        reuse: what to do about a stored result, one of :data:`identity.REUSE`.
        unfinished: what runs leave that end before their time, by name, kept by the caller. The
            same run goes on from there, to the same result.

    Raises:
        SettingsError, LayerRuleError, NoStoredResultError, NothingToResumeError,
            NothingLearnedError, SubspaceError, PredictionError, GradientError, TrainingError: see
            there.
    """
    given = _given(settings, denoiser, meter or Meter())
    key = "" if results is None and unfinished is None else _key(given)
    stored = stored_result(results, key, reuse)
    if stored is not None:
        return _reused(given, stored)
    left = left_run(unfinished, given, key, reuse)
    if left.key != key and (stored := stored_result(results, left.key)) is not None:
        return _reused(given, stored)
    with journal_of(unfinished, given, left) as journal:
        given = replace(given, journal=journal)
        erasure = _learned(given, language_cache)
        if results is not None:
            results[left.key] = erasure
        journal.end(erasure.record)
    return erasure


def _learned(given: Given, language_cache: MutableMapping[str, Tensor] | None) -> Erasure:
    """The erasure, from reading to record."""
    settings = given.settings
    given.prompts.read_by(given.model)
    # What must stay, and what the text encoder says beside it.
    exact = exact_prompts(settings, given.prompts)
    given, heard = _hear(given, language_cache)
    # The closed form on every way in, the edit that training starts from.
    matrices = dict(given.model.matrices())
    ways = _ways(given, exact, heard, matrices)
    others = _others(given, heard, ways)
    sampled = until_stopped(_sample_if_it_trains_for_sure, given, ways)
    held_out = until_stopped(sample_held_out, given)
    solved = _solve(given, ways, others, held_out)
    edit = _edit_to_start_from(given, solved, matrices)
    # Training, as long as held-out states say that it helps.
    start = Start(edit, _first(solved), _ridges(given, solved), others, held_out, sampled)
    trained = train_where_it_helps(given, start)
    measures = _measure(given, start, trained, ways, exact, heard)
    record = record_of(given, start, trained, exact, measures, heard)
    return Erasure.from_edit(trained.edit, record)


def _reused(given: Given, stored: Erasure) -> Erasure:
    given.meter.reused = True
    return stored


def _given(settings: EraseSettings, denoiser: Denoiser, meter: Meter) -> Given:
    """The run's prompts, encoded, and its plan.

    Raises:
        SettingsError: see :func:`encoded.encode_prompts`; the hard form of a model of which no
            matrix is known that reads the prompt alone.
    """
    model = MeteredDenoiser(denoiser, meter)
    if settings.form == "hard" and TOKENS not in model.ways:
        raise SettingsError(
            f"The hard form needs matrices of which it is known that they read the prompt and "
            f"nothing else; of {model.family} none are known by name. Choose 'readers' as the "
            "layers, which finds them by predictions, or the soft form."
        )
    meter.say("Reading the prompts")
    random = torch.Generator().manual_seed(settings.seed)
    given = Given(settings, model, encode_prompts(settings, model), random)
    meter.plan(given.planned())
    return given


def _key(given: Given) -> str:
    """What a result of this run is stored under."""
    return result_key(given.settings, given.prompts.tensors(), given.model.identity, VERSION)


def _hear(given: Given, language_cache: MutableMapping[str, Tensor] | None) -> tuple[Given, Heard]:
    """Ordinary language, and the run's prompts with the plain captions that are held like them."""
    heard = hear(given, language_cache)
    if heard.plain:
        given = replace(given, prompts=replace(given.prompts, plain=heard.plain))
        given.meter.plan(given.planned())
    return given, heard


def _ways(
    given: Given, exact: ExactSet, heard: Heard, matrices: Mapping[str, Tensor]
) -> list[WayIn]:
    """The ways on which something is edited; none where no matrix is known that reads prompts."""
    own = {
        way: {name: matrices[name] for name in names}
        for way, names in given.model.ways.items()
        if way in heard.moments
    }
    return ways_in(given.settings, given.prompts, exact, own, heard.moments)


def _others(given: Given, heard: Heard, ways: Sequence[WayIn]) -> Others | None:
    """Words that nobody named; None where they aren't known.

    Raises:
        SubspaceError: the model does already what is asked for.
    """
    if heard.language is None or not ways:
        return None
    metric = ways[0].regression.metric
    others = Others(given.spoken, heard.language, metric)
    refuse_already_erased(given.settings, given.prompts.targets, metric, others.witnesses)
    return others


def _sample_if_it_trains_for_sure(given: Given, ways: Sequence[WayIn]) -> States | None:
    """States to train on; where it isn't certain that anything trains, they are sampled then."""
    settings = given.settings
    solved = bool(ways) and settings.warm_start
    if not settings.steps or (solved and settings.trial_steps):
        return None
    return sample_to_train_on(given)


@dataclass(frozen=True)
class Solved:
    """The closed form on a way in."""

    way: WayIn
    choice: RidgeChoice


def _solve(
    given: Given, ways: Sequence[WayIn], others: Others | None, held_out: States | None
) -> list[Solved]:
    """The closed form on every way, with the user's ridge or the strongest that moves far enough.

    On the ways but the first nothing is predicted, and every other ridge will do: they are one
    matrix of many, whose rest is measured and reported.

    Raises:
        SubspaceError: too little of a concept moves, or too much else.
    """
    if not ways:
        return []
    settings = given.settings
    ridges = RIDGES if settings.protection is None else (settings.protection,)
    beside = [
        Solved(way, strongest_that_moves(way.regression, settings.rank, None, ridges=ridges[::2]))
        for way in ways[1:]
    ]

    tries = count()

    def moves(solution: ClosedForm) -> Movement:
        edit = ways[0].edit(solution)
        for one in beside:
            edit = edit.with_more(one.way.edit(one.choice.solution))
        edit = edit.to(given.model.device)
        number = next(tries)
        return known_movement(given, f"protection {number}", edit, held_out)

    def chosen(measured: Moves | None) -> RidgeChoice:
        return strongest_that_moves(ways[0].regression, settings.rank, measured, others, ridges)

    given.meter.say("Choosing the protection")
    with given.meter.part("protection"):
        measured = None if held_out is None else until_stopped(chosen, moves)
        choice = measured or chosen(None)
    # What is left of a pooled vector is reported, not refused.
    reached = choice.solution.moved
    if given.prompts.null.pooled is None:
        reached = [max(pair) for pair in zip(reached, choice.moved, strict=True)]
    refuse_if_too_little_moves(settings, reached)
    _refuse_a_ruin(settings, choice)
    return [Solved(ways[0], choice), *beside]


def _first(solved: Sequence[Solved]) -> RidgeChoice | None:
    """How the closed form of the tokens was chosen, by which a run is judged."""
    return solved[0].choice if solved else None


def _edit_to_start_from(
    given: Given, solved: Sequence[Solved], matrices: Mapping[str, Tensor]
) -> LowRankEdit:
    """The closed form where there is one, else no change; a way without room stays as it is."""
    settings, edit = given.settings, LowRankEdit({}, {})
    for one in solved:
        edit = edit.with_more(one.way.edit(one.choice.solution, solved[0].choice.solution.columns))
    bases, factors = dict(edit.bases), dict(edit.factors)
    if not settings.warm_start:
        factors = {name: torch.zeros_like(b) for name, b in factors.items()}
    stay = set()
    if solved:
        stay = {name for names in given.model.ways.values() for name in names} - factors.keys()
    generator = torch.Generator().manual_seed(settings.seed)
    for name, weight in matrices.items():
        if name not in factors and name not in stay:
            rank = min(settings.rank, *weight.shape)
            bases[name] = torch.linalg.qr(torch.randn(weight.shape[1], rank, generator=generator)).Q
            factors[name] = torch.zeros(weight.shape[0], rank)
    return LowRankEdit(bases, factors)


def _ridges(given: Given, solved: Sequence[Solved]) -> list[Ridge]:
    """The protections of ordinary language, in shares of the way that is to be gone."""
    return [
        Ridge(
            one.choice.ridge / one.choice.solution.distance,
            one.way.readers,
            one.way.moment,
            given.model.device,
        )
        for one in solved
    ]


def _measure(
    given: Given,
    start: Start,
    trained: Trained,
    ways: Sequence[WayIn],
    exact: ExactSet,
    heard: Heard,
) -> dict[str, Any]:
    """What the finished edit does; of the movement what is known already isn't measured again."""
    known = start.choice.movement if start.choice and trained.edit is start.edit else None
    if given.settings.samples:
        checks = 0
        if start.held_out is not None:
            spared = checked_states(given.settings, len(start.held_out)) if known else 0
            checks = given.planned()["checks"] - spared
        given.meter.replan({"until here": given.meter.spent, "checks": checks})
    with given.meter.part("checks"):
        return measure(given, trained.edit, ways, exact, start.held_out, heard.unnamed, known)


def refuse_if_too_little_moves(settings: EraseSettings, moved: Sequence[float]) -> None:
    """A concept of which little would go is not handed on as erased.

    Raises:
        SubspaceError: less than half of one moves, with a protection that the run chose itself.
    """
    if settings.protection is not None:
        return  # the user's own choice, and the report says what came of it
    for concept, share in zip(settings.concepts, moved, strict=True):
        if share < LEAST_MOVED:
            others = len(settings.concepts) - 1
            beside = f" and the other {others} concepts" if others > 1 else " and the other concept"
            fewer = "Erase fewer concepts in one run, keep" if others else "Keep"
            raise SubspaceError(
                f"Only {share:.0%} of {concept.text!r} can be moved beside what must stay"
                f"{beside if others else ''} (at least {LEAST_MOVED:.0%} is needed). {fewer} fewer "
                "prompts, lower the protection, or raise the rank."
            )


def _refuse_a_ruin(settings: EraseSettings, choice: RidgeChoice) -> None:
    """A protection that the run chose itself must protect; the user's own is reported on."""
    fewer = "Erase fewer concepts in one run, name" if len(settings.concepts) > 1 else "Name"
    if settings.protection is None and choice.others.mean > RUIN:
        raise SubspaceError(
            f"Words that nobody named would change by {choice.others.mean:.0%} on average (at most "
            f"{RUIN:.0%} is handed on): {', '.join(choice.others.worst(3))} most of all. "
            f"{fewer} a replacement that is close to the concept, or use fewer keep and negative "
            "prompts, which leave less room."
        )
