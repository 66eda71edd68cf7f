"""One erasure from settings to artefact: encode, choose the subspace, sample, train, measure."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from .closed_form import RIDGE, align_tokens, closed_form_factors
from .denoiser import Denoiser, LowRankEdit
from .erasure import Erasure
from .fingerprint import fingerprint
from .language import encode_language, plain_captions, second_moment, spread
from .measure import CountedDenoiser, movement_on, movement_sampled, prompt_drift
from .prompts import prompt_pairs
from .settings import EraseSettings
from .states import EncodedPair, Sampling, States, sample_states
from .subspace import EditSubspace, edit_subspace, leakage
from .trainer import Ridge, SurgeryTrainer

VERSION = "0.1.0"

HELD_OUT_STATES = 18
SAMPLED_TRAJECTORIES = 2
SAMPLED_STEPS = 6
NULL_STATES = 2
UNNAMED_PROMPTS = 8

# Weight of the alternative's and the approximate keep prompts' own second moment beside that of
# ordinary language. They are few prompts among a thousand, but the user named them.
NAMED_PROMPT_WEIGHT = 1.0


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        stage: what it is doing, in words.
        done, total: forward-equivalents spent and planned.
        loss: surgery loss of the latest step, from about 1 (nothing moved) to 0; None before.
    """

    stage: str
    done: int
    total: int
    loss: float | None = None


@dataclass(frozen=True)
class Finished:
    """The end of a run.

    Attributes:
        erasure: the artefact.
        losses: surgery loss of every step.
    """

    erasure: Erasure
    losses: list[float]


def erase(
    settings: EraseSettings,
    denoiser: Denoiser,
    language_cache: MutableMapping[str, Tensor] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Progress | Finished]:
    """Train one erasure. Yields :class:`Progress` throughout and :class:`Finished` at the end.

    The denoiser's weights are read, never written. The same settings, model and machine give the
    same result.

    Args:
        language_cache: second moments of ordinary language by key, kept by the caller.
        should_stop: asked before each optimiser step; True ends training early, and what was
            learned so far is measured and returned.

    Raises:
        SettingsError, SubspaceError, PredictionError, TrainingError: see there.
    """
    run = _Run(settings, denoiser)
    yield run.progress("Reading the prompts")
    prompts = _encode_prompts(settings, denoiser)
    captions = plain_captions(settings.captions)
    unnamed = spread(captions, UNNAMED_PROMPTS)
    moment = yield from run.language([c for c in captions if c not in unnamed], language_cache)
    subspace = edit_subspace(
        _edit_rows(prompts.pairs), [prompts.null, *prompts.negatives], prompts.keep, settings.rank
    )
    training, held_out = yield from run.sample(prompts)
    moment = moment + _named_prompts_moment(prompts, subspace)
    ridge = Ridge(denoiser.matrices(), subspace.basis, moment)
    start = closed_form_factors(
        denoiser.matrices(),
        subspace.basis,
        [pair.erased for pair in prompts.pairs],
        [pair.alternative[roles] for pair, roles in zip(prompts.pairs, prompts.roles, strict=True)],
        moment,
        RIDGE * settings.protection,
    )
    trainer = SurgeryTrainer(
        run.denoiser, prompts.pairs, training, subspace.basis, start, ridge, settings
    )
    yield from run.train(trainer, should_stop)
    measures = yield from run.measure(trainer.result(), prompts, held_out, subspace, unnamed)
    record = run.record(prompts, subspace, measures)
    yield Finished(Erasure.from_edit(trainer.result(), record), run.losses)


@dataclass(frozen=True)
class _Prompts:
    pairs: list[EncodedPair]
    roles: list[list[int]]
    null: Tensor
    negatives: list[Tensor]
    keep: list[tuple[str, Tensor]]


class _Run:
    """The stages of one run with their shared state: settings, random numbers, cost, losses."""

    def __init__(self, settings: EraseSettings, denoiser: Denoiser) -> None:
        self.settings = settings
        self.denoiser = CountedDenoiser(denoiser)
        self.losses: list[float] = []
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._started = time.monotonic()
        self._shape = denoiser.latent_shape(settings.resolution)
        self._batch = 3 * settings.batch  # what the pool was sampled with fits the device
        self._total = self._planned_cost()

    def progress(self, stage: str) -> Progress:
        loss = self.losses[-1] if self.losses else None
        done = self.denoiser.forward_equivalents
        return Progress(stage, min(done, self._total), self._total, loss)

    def language(
        self, captions: Sequence[str], cache: MutableMapping[str, Tensor] | None
    ) -> Iterator[Progress]:
        stage = encode_language(self.denoiser, captions, cache)
        text = "Reading ordinary language, {0[0]} of {0[1]} captions"
        return (yield from self._follow(stage, text))

    def sample(self, prompts: _Prompts) -> Iterator[Progress]:
        """The pool: training states and held-out states, from different trajectories."""
        count = self.settings.trajectories
        held_out = max(1, count // 4)
        training = yield from self._trajectories(prompts, count - held_out, "Sampling states")
        checking = yield from self._trajectories(prompts, held_out, "Sampling states to check on")
        return training, checking

    def train(self, trainer: SurgeryTrainer, should_stop: Callable[[], bool]) -> Iterator[Progress]:
        for loss in trainer.run(should_stop):
            self.losses.append(loss)
            yield self.progress(f"Training, step {len(self.losses)} of {self.settings.steps}")

    def measure(
        self,
        edit: LowRankEdit,
        prompts: _Prompts,
        held_out: States,
        subspace: EditSubspace,
        unnamed: Sequence[str],
    ) -> Iterator[Progress]:
        """Movement on held-out and on sampled states, drift of everything that should stay."""
        by_sigma = held_out[held_out.sigma.argsort(descending=True, stable=True)]
        checked = by_sigma[_evenly(len(held_out), min(len(held_out), HELD_OUT_STATES))]
        moved = yield from self._movements(edit, prompts, checked)
        drift = yield from self._drifts(edit, prompts, checked, subspace, unnamed)
        return {**moved, **drift, "null_leakage": leakage(subspace.basis, prompts.null)}

    def _movements(
        self, edit: LowRankEdit, prompts: _Prompts, checked: States
    ) -> Iterator[Progress]:
        frozen = movement_on(
            self.denoiser, prompts.pairs, checked, edit, self.settings.eta, self._batch
        )
        chosen, noise = self._draw(prompts, SAMPLED_TRAJECTORIES)
        sampled = movement_sampled(
            self.denoiser,
            prompts.null,
            prompts.pairs,
            chosen,
            noise,
            self._sampling(SAMPLED_STEPS),
            edit,
            self.settings.eta,
        )
        on_frozen = yield from self._follow(frozen, "Checking on held-out states")
        on_sampled = yield from self._follow(sampled, "Checking on the edited model's own states")
        return {
            "moved_held_out": dataclasses.asdict(on_frozen),
            "moved_sampled": dataclasses.asdict(on_sampled),
        }

    def _drifts(
        self,
        edit: LowRankEdit,
        prompts: _Prompts,
        checked: States,
        subspace: EditSubspace,
        unnamed: Sequence[str],
    ) -> Iterator[Progress]:
        """Drift of each prompt at one state, the states spread over the noise levels."""

        def drift(tokens: Sequence[Tensor]) -> Iterator[Progress]:
            states = checked[_evenly(len(checked), len(tokens))]
            stage = prompt_drift(self.denoiser, tokens, states, edit, self._batch)
            return (yield from self._follow(stage, "Checking what must stay"))

        null = yield from drift([prompts.null] * NULL_STATES)
        kept = yield from drift([rows for _, rows in prompts.keep])
        negatives = yield from drift(prompts.negatives)
        others = yield from drift(self.denoiser.encode(unnamed))
        return {
            "null_drift": max(null),
            "negative_prompts": _with_texts(self.settings.negative_prompts, negatives),
            "kept": [
                {**dataclasses.asdict(prompt), "drift": change}
                for prompt, change in zip(subspace.kept, kept, strict=True)
            ],
            "unnamed": _with_texts(unnamed, others),
            "unnamed_drift": sum(others) / len(others),
        }

    def record(
        self, prompts: _Prompts, subspace: EditSubspace, measures: dict[str, Any]
    ) -> dict[str, Any]:
        """What the artefact says about itself."""
        matrices = self.denoiser.matrices()
        stopped = len(self.losses) < self.settings.steps
        return {
            "version": VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017
            "family": self.denoiser.family,
            "base": dict(self.denoiser.base),
            "text_encoder": fingerprint({"null prompt": prompts.null}),
            "settings": self.settings.as_dict(),
            "form": "hard",
            "matrices": len(matrices),
            "rank": subspace.basis.shape[1],
            "values_trained": sum(w.shape[0] for w in matrices.values()) * subspace.basis.shape[1],
            "subspace": {
                "exact_rank": subspace.exact_rank,
                "share_left": subspace.share_left,
                "share_spanned": subspace.share_spanned,
            },
            "measures": measures,
            "losses": self.losses,
            "steps_done": len(self.losses),
            "stopped_early": stopped,
            "forward_equivalents": self.denoiser.forward_equivalents,
            "seconds": round(time.monotonic() - self._started, 2),
        }

    def _trajectories(self, prompts: _Prompts, count: int, stage: str) -> Iterator[Progress]:
        chosen, noise = self._draw(prompts, count)
        by_erased = [index % 2 == 0 for index in range(count)]
        sampling = self._sampling(self.settings.sampling_steps)
        parts = []
        for start in range(0, count, self.settings.batch):
            part = slice(start, start + self.settings.batch)
            states = sample_states(
                self.denoiser,
                prompts.null,
                prompts.pairs,
                chosen[part],
                by_erased[part],
                noise[part],
                sampling,
            )
            parts.append((yield from self._follow(states, stage)))
        return States.join(parts)

    def _draw(self, prompts: _Prompts, count: int) -> tuple[list[int], Tensor]:
        """A prompt pair (each once before any repeats) and noise for every trajectory."""
        pairs = len(prompts.pairs)
        orders = [
            torch.randperm(pairs, generator=self._generator) for _ in range(-(-count // pairs))
        ]
        noise = torch.randn(count, *self._shape, generator=self._generator)
        return torch.cat(orders)[:count].tolist(), noise

    def _sampling(self, steps: int) -> Sampling:
        return Sampling(self.denoiser.sigmas(steps).cpu(), self.settings.guidance_scale)

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

    def _planned_cost(self) -> int:
        settings = self.settings
        held_out = max(1, settings.trajectories // 4)
        prompts = len(settings.keep) + len(settings.negative_prompts) + UNNAMED_PROMPTS
        return (
            3 * settings.trajectories * settings.sampling_steps
            + 3 * settings.steps * settings.batch
            + min(HELD_OUT_STATES, held_out * settings.sampling_steps)
            + 4 * SAMPLED_TRAJECTORIES * SAMPLED_STEPS
            + 2 * NULL_STATES
            + 2 * prompts
        )


def _encode_prompts(settings: EraseSettings, denoiser: Denoiser) -> _Prompts:
    pairs = prompt_pairs(settings)
    erased = denoiser.encode([pair.erased for pair in pairs])
    alternatives = denoiser.encode([pair.alternative for pair in pairs])
    ids = zip(
        denoiser.token_ids([pair.erased for pair in pairs]),
        denoiser.token_ids([pair.alternative for pair in pairs]),
        strict=True,
    )
    return _Prompts(
        pairs=[EncodedPair(e, a) for e, a in zip(erased, alternatives, strict=True)],
        roles=[align_tokens(erased_ids, other_ids) for erased_ids, other_ids in ids],
        null=denoiser.encode([""])[0],
        negatives=denoiser.encode(settings.negative_prompts),
        keep=list(zip(settings.keep, denoiser.encode(settings.keep), strict=True)),
    )


def _edit_rows(pairs: Sequence[EncodedPair]) -> Tensor:
    """``C_e - C_a`` token by token over all pairs, (n, width)."""
    rows = []
    for pair in pairs:
        shared = min(len(pair.erased), len(pair.alternative))
        rows.append(pair.erased[:shared].double() - pair.alternative[:shared].double())
    return torch.cat(rows)


def _named_prompts_moment(prompts: _Prompts, subspace: EditSubspace) -> Tensor:
    """Second moment of the prompts that were named but are not exact, each group at full weight."""
    approximate = [
        rows for (_, rows), kept in zip(prompts.keep, subspace.kept, strict=True) if not kept.exact
    ]
    moment = NAMED_PROMPT_WEIGHT * second_moment(pair.alternative for pair in prompts.pairs)
    if approximate:
        moment = moment + NAMED_PROMPT_WEIGHT * second_moment(approximate)
    return moment


def _evenly(count: int, wanted: int) -> Tensor:
    """``wanted`` indices below ``count``, each in the middle of its share of the range.

    Not the ends: at the lowest noise level x0 is x but for rounding, and a drift taken there would
    be the rounding's.
    """
    return ((torch.arange(wanted) + 0.5) * count / wanted).long()


def _with_texts(prompts: Sequence[str], changes: Sequence[float]) -> list[dict[str, Any]]:
    return [{"text": text, "drift": change} for text, change in zip(prompts, changes, strict=True)]
