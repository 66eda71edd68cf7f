"""One erasure from settings to artefact: encode, solve, sample, train, measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..artefact.erasure import Erasure
from ..artefact.identity import USE_IF_THERE, result_key, stored_result
from ..artefact.record import NOT_NEEDED, TRAINED, WORSE
from ..method.already import refuse_already_erased
from ..method.closed_form import ClosedForm, EditRegression
from ..method.collateral import Others
from ..method.encoded import EncodedPrompts, encode_prompts
from ..method.language import second_moment, shrunk
from ..method.pooled import POOLED_PROMPTS, POOLED_SHRINKAGE, PooledEdit, as_tokens, solve_pooled
from ..method.protection import AIM, LEAST_MOVED, RUIN, Choice
from ..method.reading import Reading, choose_reading, naming, plain_captions, spread
from ..method.subspace import ExactSet, KeptPrompt, SubspaceError, exact_set
from ..model.denoiser import Denoiser, Encoded, LowRankEdit
from ..settings.families import by_name
from ..settings.layers import reads_prompt
from ..settings.settings import EraseSettings
from ..settings.texts import SettingsError
from ..version import VERSION
from .checks import UNNAMED_PROMPTS, Checks
from .plan import TRIAL_TRAJECTORIES
from .run import Progress, Run
from .states import States
from .trainer import Pool, Ridge, SurgeryTrainer

# Weight of the alternative's and the approximate keep prompts' own second moment beside that of
# ordinary language. They are few prompts among a thousand, but the user named them.
NAMED_PROMPT_WEIGHT = 1.0
# How many plain captions are held like keep prompts where there is no ridge.
PLAIN_CAPTIONS = 8
# The same for what the soft form must hold without a construction.
SOFT_NULL_WEIGHT = 10.0


@dataclass(frozen=True)
class Finished:
    """The end of a run.

    Attributes:
        erasure: the artefact.
        losses: surgery loss of every step.
        stored: it was not trained now but taken from the results.
    """

    erasure: Erasure
    losses: list[float]
    stored: bool = False


def erase(
    settings: EraseSettings,
    denoiser: Denoiser,
    language_cache: MutableMapping[str, Tensor] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    results: MutableMapping[str, Erasure] | None = None,
    reuse: str = USE_IF_THERE,
) -> Iterator[Progress | Finished]:
    """Train one erasure. Yields :class:`Progress` throughout and :class:`Finished` at the end.

    The denoiser's weights are read, never written. The same settings, model and machine give the
    same result.

    Args:
        language_cache: second moments of ordinary language by key, kept by the caller.
        should_stop: asked before each optimiser step; True ends training early, and what was
            learned so far is measured and returned.
        results: finished erasures by key, kept by the caller. A complete one with the key of this
            run is returned without any prediction; a new one is put in before it is returned.
        reuse: what to do about a stored result, one of :data:`identity.REUSE`.

    Raises:
        SettingsError, LayerRuleError, NoStoredResultError, SubspaceError, PredictionError,
            GradientError, TrainingError: see there.
    """
    run = Run(settings, denoiser)
    has_readers = bool(_readers(denoiser.names, denoiser.family))
    if settings.form == "hard" and not has_readers:
        raise SettingsError(
            f"The hard form needs matrices of which it is known that they read the prompt and "
            f"nothing else; of {denoiser.family} none are known. Choose the soft form, and "
            "'balanced' or 'thorough' as the preset."
        )
    yield run.progress("Reading the prompts")
    prompts = encode_prompts(settings, denoiser)
    run.plan(prompts)
    key = ""
    if results is not None:
        key = result_key(settings, prompts.tensors(), denoiser.identity, VERSION)
    stored = stored_result(results, key, reuse)
    if stored is not None:
        yield Finished(stored, list(stored.record["losses"]), stored=True)
        return
    exact = _exact(settings, prompts)
    # All that the text encoder has to do comes before the model is loaded: where memory is short,
    # the host makes room for one by moving the other away.
    captions = plain_captions(settings.captions)
    reading = choose_reading(denoiser, captions, settings.kind)
    language = vectors = None
    if has_readers:
        language = yield from run.language(reading, language_cache)
        vectors = yield from _pooled_language(run, prompts, exact, reading, language_cache)
    else:
        plain = denoiser.encode(spread(captions, PLAIN_CAPTIONS))
        prompts = dataclasses.replace(prompts, plain=plain)
        run.plan(prompts)
    words = [word for word, _ in reading.witnesses]
    if language:
        words = language.witnesses.without(run.spoken).telling().texts
    # Without predictions the rows that were read will do.
    unnamed = _unnamed(run, reading, words) if settings.samples or not language else {}
    readers = {name: run.matrices[name] for name in _readers(run.matrices, denoiser.family)}
    regression = others = None
    if readers:
        moment = shrunk(language.moment) + _named_moment(settings, prompts, exact)
        regression = EditRegression(prompts.edits, exact.basis, moment, readers)
        others = Others(run.spoken, language, regression.metric)
        refuse_already_erased(settings, prompts.edits, regression.metric, others.witnesses)
    # Where it isn't certain that anything trains, the states to train on are sampled when it is.
    solved = bool(readers) and settings.warm_start
    states = None
    if settings.steps and not (solved and settings.trial_steps):
        states = yield from run.all_training_states(prompts, None)
    held_out = yield from run.held_out_states(prompts)
    choice, pooled = None, _pooled_edit(run, prompts, exact, vectors)
    ridges: list[Ridge] = []
    if regression:
        choice = yield from run.choose(regression, prompts, held_out, readers, pooled, others)
        # What is left of a pooled vector is reported, not refused.
        reached = choice.solution.moved
        if prompts.null.pooled is None:
            reached = [max(pair) for pair in zip(reached, choice.moved, strict=True)]
        refuse_if_too_little_moves(settings, reached)
        _refuse_a_ruin(settings, choice)
        ridges = list(_ridges(choice, readers, moment, pooled, denoiser.device))
    # A pooled vector that what must stay leaves no way for stays as it is.
    stays = by_name(denoiser.family).pooled_matrix if vectors is not None and not pooled else ""
    matrices = {name: weight for name, weight in run.matrices.items() if name != stays}
    start = _start(settings, choice.solution if choice else None, pooled, matrices)
    states = states, held_out
    edit = yield from _trained(run, prompts, start, choice, ridges, states, others, should_stop)
    checks = Checks(settings, run.denoiser, prompts, run.matrices, run.generator)
    known = choice.movement if choice and edit is start else None
    run.only_checks_left(held_out, known is not None)
    checking = checks.run(edit, exact, held_out, unnamed, known)
    measures = yield from run.follow_stage("checks", checking)
    collateral = others.report(edit, prompts.subjects) if others else None
    if collateral and held_out is None:
        measures |= {"unnamed": collateral["words"], "unnamed_drift": collateral["change"]}
    elif collateral:
        # The worse of both. At states of the concept's own pictures another word's guidance is
        # large, and its change looks small beside it.
        guidance = measures["unnamed_drift"]
        worse = max(guidance, collateral["change"])
        measures |= {"unnamed_guidance": guidance, "unnamed_drift": worse}
    unknown = language.unknown if language else 0.0
    record = run.record(prompts, exact, choice, edit, measures, collateral, unknown)
    erasure = Erasure.from_edit(edit, record)
    if results is not None:
        results[key] = erasure
    yield Finished(erasure, run.losses)


def _trained(
    run: Run,
    prompts: EncodedPrompts,
    start: LowRankEdit,
    choice: Choice | None,
    ridges: list[Ridge],
    sampled: tuple[States | None, States | None],
    others: Others | None,
    should_stop: Callable[[], bool],
) -> Iterator[Progress]:
    """The edit after training, where held-out states say that training helps; else the start.

    A closed form that moves the guidance far enough is left as it is. One that doesn't is tried
    with a few steps on a few states first: on the models that this was measured on, more of them
    seldom helped where those didn't.

    Args:
        sampled: states to train on, where that is certain, and states to check on.
    """
    settings, (states, held_out) = run.settings, sampled
    if not settings.steps:
        return start
    solved = choice is not None and settings.warm_start
    if solved and settings.trial_steps:
        if min(choice.moved) >= AIM:
            run.training = NOT_NEEDED
            return start
        states = yield from run.training_states(prompts, TRIAL_TRAJECTORIES)
        trial = _trainer(run, prompts, start, choice, ridges, states, None)
        helps = yield from run.try_training(trial, prompts, held_out, choice, should_stop)
        if not helps:
            return start
    states = yield from run.all_training_states(prompts, states)
    kept_states = yield from run.kept_states(prompts)
    trainer = _trainer(run, prompts, start, choice, ridges, states, kept_states)
    yield from run.check_gradient(trainer)
    yield from run.train(trainer, prompts, held_out, should_stop)
    run.training = TRAINED
    if solved and settings.form == "hard":
        worse = yield from run.got_worse(trainer.result(), prompts, held_out, choice, others)
        if worse:
            run.training = WORSE
            return start
    return trainer.result()


def _trainer(
    run: Run,
    prompts: EncodedPrompts,
    start: LowRankEdit,
    choice: Choice | None,
    ridges: list[Ridge],
    states: States,
    kept_states: States | None,
) -> SurgeryTrainer:
    pool = Pool(prompts.pairs, states, prompts.null, prompts.held, kept_states)
    columns = choice.solution.columns if choice else []
    return SurgeryTrainer(run.denoiser, pool, start, columns, ridges, run.settings)


def _readers(names: Iterable[str], family: str) -> list[str]:
    """The matrices that are applied to the token embeddings of the prompt and to nothing else."""
    known = by_name(family).readers_known
    return [name for name in names if known and reads_prompt(name)]


def _exact(settings: EraseSettings, prompts: EncodedPrompts) -> ExactSet:
    """The exact set of the hard form; in the soft form nothing is exact."""
    if settings.form == "hard":
        changes = [edit.change for edit in prompts.edits]
        required = [prompt.tokens for prompt in (prompts.null, *prompts.negatives)]
        keep = [(text, prompt.tokens) for text, prompt in prompts.keep]
        return exact_set(changes, required, keep)
    nothing = torch.zeros(prompts.null.tokens.shape[1], 0, dtype=torch.float64)
    kept = [KeptPrompt(text, False, 1.0) for text, _ in prompts.keep]
    return ExactSet(nothing, [1.0] * len(prompts.edits), kept)


def _unnamed(run: Run, reading: Reading, witnesses: Sequence[str]) -> dict[str, Encoded]:
    """Prompts of words that nobody named, to measure what else changes, by their texts."""
    left_out = set(naming(witnesses, run.spoken))
    wanted = set(witnesses) - left_out
    texts = [text for word, text in reading.witnesses if word in wanted]
    texts = spread(texts, UNNAMED_PROMPTS) or spread(reading.protected, UNNAMED_PROMPTS)
    return dict(zip(texts, run.denoiser.encode(texts), strict=True))


def _pooled_language(
    run: Run,
    prompts: EncodedPrompts,
    exact: ExactSet,
    reading: Reading,
    cache: MutableMapping[str, Tensor] | None,
) -> Iterator[Progress]:
    """Second moment of the pooled vectors that must stay; None where they aren't edited."""
    if by_name(run.denoiser.family).pooled_matrix not in run.denoiser.names:
        return None
    asked = spread(reading.protected, POOLED_PROMPTS)
    vectors = yield from run.pooled_language(asked, cache)
    named = _named_moment(run.settings, as_tokens(prompts), exact)
    return shrunk(vectors, POOLED_SHRINKAGE) + named


def _pooled_edit(
    run: Run, prompts: EncodedPrompts, exact: ExactSet, vectors: Tensor | None
) -> PooledEdit | None:
    """What becomes of the matrix that reads pooled vectors; None where it stays as it is."""
    if vectors is None:
        return None
    name, held = by_name(run.denoiser.family).pooled_matrix, _held_exactly(run, prompts, exact)
    return solve_pooled(
        name,
        run.matrices[name],
        as_tokens(prompts),
        held,
        vectors,
        run.settings.rank,
        run.settings.protection,
    )


def _held_exactly(run: Run, prompts: EncodedPrompts, exact: ExactSet) -> list[Encoded]:
    """Pooled vectors, as tokens, of the prompts that nothing may reach; none in the soft form."""
    if run.settings.form == "soft":
        return []
    prompts = as_tokens(prompts)
    kept = [prompt for (_, prompt), one in zip(prompts.keep, exact.kept, strict=True) if one.exact]
    return [prompts.null, *prompts.negatives, *kept]


def _ridges(
    choice: Choice | None,
    readers: dict[str, Tensor],
    moment: Tensor,
    pooled: PooledEdit | None,
    device: torch.device,
) -> Iterator[Ridge]:
    """The protections of ordinary language, in shares of the way that is to be gone."""
    if choice:
        yield Ridge(choice.ridge / choice.solution.distance, readers, moment, device)
    if pooled:
        weight = pooled.choice.ridge / pooled.solution.distance
        yield Ridge(weight, *pooled.protected(), device)


def _named_moment(settings: EraseSettings, prompts: EncodedPrompts, exact: ExactSet) -> Tensor:
    """Second moment of the prompts that were named but are not exact, each group at full weight."""
    moment = NAMED_PROMPT_WEIGHT * second_moment(p.alternative.tokens for p in prompts.pairs)
    approximate = [
        prompt.tokens
        for (_, prompt), kept in zip(prompts.keep, exact.kept, strict=True)
        if not kept.exact
    ]
    if settings.form == "soft":
        held = [prompts.null.tokens, *(p.tokens for p in prompts.negatives), *approximate]
        return moment + SOFT_NULL_WEIGHT * second_moment(held)
    if approximate:
        moment = moment + NAMED_PROMPT_WEIGHT * second_moment(approximate)
    return moment


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


def _refuse_a_ruin(settings: EraseSettings, choice: Choice) -> None:
    """A protection that the run chose itself must protect; the user's own is reported on."""
    fewer = "Erase fewer concepts in one run, name" if len(settings.concepts) > 1 else "Name"
    if settings.protection is None and choice.others.mean > RUIN:
        raise SubspaceError(
            f"Words that nobody named would change by {choice.others.mean:.0%} on average (at most "
            f"{RUIN:.0%} is handed on): {', '.join(choice.others.worst(3))} most of all. "
            f"{fewer} a replacement that is close to the concept, or use fewer keep and negative "
            "prompts, which leave less room."
        )


def _start(
    settings: EraseSettings,
    solution: ClosedForm | None,
    pooled: PooledEdit | None,
    matrices: dict[str, Tensor],
) -> LowRankEdit:
    """The edit that training starts from: the closed form where there is one, else no change."""
    bases, factors = {}, {}
    if solution:
        basis, readers = (
            solution.basis.float(),
            {n: w for n, w in matrices.items() if reads_prompt(n)},
        )
        bases, factors = dict.fromkeys(readers, basis), solution.factors(readers)
        if pooled:
            own = pooled.edit(solution.columns)
            bases, factors = {**bases, **own.bases}, {**factors, **own.factors}
        if not settings.warm_start:
            factors = {name: torch.zeros_like(b) for name, b in factors.items()}
    generator = torch.Generator().manual_seed(settings.seed)
    for name, weight in matrices.items():
        if name not in factors:
            rank = min(settings.rank, *weight.shape)
            bases[name] = torch.linalg.qr(torch.randn(weight.shape[1], rank, generator=generator)).Q
            factors[name] = torch.zeros(weight.shape[0], rank)
    return LowRankEdit(bases, factors)
