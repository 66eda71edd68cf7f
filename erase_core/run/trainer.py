"""The one training loop: fit ``dW = B R^T`` to the surgical target on pooled states."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..artefact.unfinished import Part
from ..method.encoded import EncodedPair
from ..method.guidance import (
    SigmaWeight,
    guidance_term,
    surgery_loss,
    surgical_target,
    weighted_error,
)
from ..model.activations import Recompute, SavedBytes
from ..model.denoiser import Denoiser
from ..model.gradient import check_gradient, smaller_scale
from ..model.low_rank import LowRankEdit
from ..model.memory import ADVICE, Fit, Need, advice_instead, out_of_memory
from ..model.prompt import Encoded
from ..settings.settings import EraseSettings
from .meter import TrainingError
from .optimiser import optimiser, trained_values, warmup_then_cosine
from .ridge import Ridge
from .states import States

# Half precision with few exponent bits loses small gradients; Adam does not mind the scale.
LOSS_SCALE = 1024.0
# States at which the gradient is checked, at most; one nearly always is enough.
CHECKED_PLACES = 3


class DivergedError(TrainingError):
    """The loss or its gradient is NaN or infinite."""


@dataclass
class Seen:
    """What came by in the latest batch, or in its last part, small enough to keep on the device.

    Attributes:
        left: of the concept, (); None before any.
        drift: of the null prompt, squared, in shares of the way that the concept goes, ();
            None where it wasn't asked.
        watched: a state that is watched and the edited model's guidance term at it, (c, h, w).
        changes: what each ridge gave.
    """

    left: Tensor | None = None
    drift: Tensor | None = None
    watched: tuple[int, Tensor] | None = None
    changes: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Pool:
    """What there is to train on.

    Attributes:
        pairs: the prompt pairs that the states refer to.
        states: states of the prompt pairs.
        null: the null prompt.
        kept: the prompts that the soft form holds.
        kept_states: states along which they were sampled; None without any.
    """

    pairs: Sequence[EncodedPair]
    states: States
    null: Encoded
    kept: Sequence[Encoded] = ()
    kept_states: States | None = None

    def concepts(self) -> Tensor:
        """Which concept each state is for, (n,)."""
        return torch.tensor([self.pairs[i].concept for i in self.states.index.tolist()])


class SurgeryTrainer:
    """Trains an edit on pooled states; the model stays fixed.

    In the hard form only the factors B train, and a state trains the columns of its own concept,
    so that the concepts stay separable. In the soft form B and R train, on all states. In both, a
    round of steps, one for each concept, counts the ridge once.

    Everything trained and the optimiser are float32 whatever the model's dtype: Adam's steps are
    far below the resolution of half precision.

    Args:
        denoiser: the model.
        pool: the states and the prompts they are for.
        start: the edit to start from.
        columns: for each concept, where its columns of R begin and end.
        ridges: the protection of ordinary language, for each way on which prompts come in.
        settings: form and weights, steps, batch, learning rate, eta, seed.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        pool: Pool,
        start: LowRankEdit,
        columns: Sequence[tuple[int, int]],
        ridges: Sequence[Ridge],
        settings: EraseSettings,
    ) -> None:
        self._denoiser, self._pool, self._settings = denoiser, pool, settings
        self._ridges = ridges
        states = pool.states
        self._targets = surgical_target(states.g_erased, states.g_alternative, settings.eta)
        differences = states.g_erased - self._targets
        self._weight = SigmaWeight(
            settings.weighting, states.sigma, differences, denoiser.loss_weight
        )
        self._scale = 1 / float(weighted_error(differences, self._weight(states.sigma)))
        self._soft = settings.form == "soft"
        self._asks_null = self._soft and bool(
            settings.drift_weight or settings.null_score != "frozen"
        )
        self.edit = _trainable(start, denoiser.device, bases_too=self._soft)
        self._columns = [] if self._soft or len(columns) < 2 else columns
        self._concepts = pool.concepts()
        # A step is on one concept's states. In the hard form it trains that concept's columns, so
        # that a round of all concepts counts each column's ridge once; in the soft form it trains
        # every column, and a round shall count the ridge once all the same.
        self._ridge_share = 1 / len(self._concepts.unique()) if self._soft else 1.0
        self._optimiser = optimiser(self.edit, denoiser.matrices(), settings)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser, warmup_then_cosine(settings.steps)
        )
        kept_states = pool.kept_states if self._soft and settings.keep_weight else None
        self._kept_states = kept_states if kept_states else None
        kept = torch.arange(len(kept_states) if kept_states else 0)
        self._kept_draws = draws([kept], settings.batch, settings.seed)
        self._trained = trained_values(self.edit)
        self._values = list(self._trained.values())
        self._good: list[Tensor] | None = None  # the values when the loss was last seen finite
        self.fit = Fit()
        self._estimate: dict[str, int] = {}
        self._ran_out = 0
        self._loss_scale = LOSS_SCALE if denoiser.dtype is torch.float16 else 1.0
        self._steps_done = 0
        self._seen = Seen()
        self.watched: Collection[int] = ()  # states whose pictures somebody wants to see

    def fit_to_memory(self) -> None:
        """Choose how a batch goes through the model, from one forward and what is free.

        Raises:
            TrainingError: there isn't memory to predict a single state.
        """
        edit, batch = self.edit, self._settings.batch
        known = [*self._denoiser.weights(), *edit.bases.values(), *edit.factors.values()]
        saved = SavedBytes(known)
        with advice_instead("train", TrainingError):
            with self._denoiser.around_blocks(saved), saved.counting():
                (index,) = self._far_states(1)
                self._loss_at(index, edit)
        need = Need.counted(saved)
        free = self._denoiser.free_memory(Fit().needs(need, batch))
        self.fit = Fit.into(free, need, batch)
        self._estimate = {
            "needed_whole": Fit().needs(need, batch),
            "needed": self.fit.needs(need, batch),
            "free": free,
        }

    def memory(self) -> dict[str, Any]:
        """How a batch went through the model and why, for the record."""
        return {
            "at_once": -(-self._settings.batch // self.fit.parts),
            "checkpointing": self.fit.checkpointing,
            "ran_out": self._ran_out,
            **self._estimate,
        }

    def check_gradient(self) -> float:
        """Check that the gradient is the loss's: at the state that has farthest to go.

        Where that leaves it in doubt at others, too.

        Returns:
            How far apart the two are, relative.

        Raises:
            GradientError: too far.
            TrainingError: there isn't memory for a single state.
        """
        start, dtype = self.edit.to(self._denoiser.device), self._denoiser.dtype
        losses = [partial(self._loss_at, index) for index in self._far_states(CHECKED_PLACES)]
        apart = None
        while apart is None:
            apart = self._or_use_less(
                lambda: check_gradient(
                    losses[0], start, dtype, self._loss_scale, self._soft, losses[1:]
                ),
                batch=1,
            )
        return apart

    def _far_states(self, count: int) -> list[Tensor]:
        """The state that has farthest to go, and others of the farther half, (1,) each."""
        states = self._pool.states
        squared = (states.g_erased - self._targets).flatten(1).square().sum(1)
        order = (self._weight(states.sigma) * squared).argsort(descending=True)
        # The next in order is often of the same trajectory, and as hard to tell.
        return list(
            order[: max(1, len(order) // 2)][:: max(1, len(order) // (2 * count))][:count, None]
        )

    def _loss_at(self, index: Tensor, edit: LowRankEdit) -> Tensor:
        """The loss at one state, and at one of what the soft form holds.

        Where the null score is held back from learning ("detached"), training doesn't follow the
        loss's gradient and isn't meant to. What can be checked is that of the same predictions.
        """
        held_back = self._settings.null_score == "detached"
        return self.loss(edit, index, torch.arange(1), "student" if held_back else "")

    def _blocks(self) -> AbstractContextManager[None]:
        if self.fit.checkpointing:
            return self._denoiser.around_blocks(Recompute())
        return nullcontext()

    def _or_use_less(self, action: Callable[[], float], batch: int) -> float | None:
        """What ``action`` gives; None where memory ran out, and it is to be tried again with less.

        Args:
            batch: how many states go through the model in it.

        Raises:
            TrainingError: there is no less.
        """
        try:
            with self._blocks():
                return action()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            smaller = self.fit.smaller(batch)
            if smaller is None:
                raise TrainingError(ADVICE.format(task="train")) from error
            self._ran_out += 1
        self.fit = smaller
        return None

    def loss(
        self, edit: LowRankEdit, index: Tensor, kept_index: Tensor, null_score: str = ""
    ) -> Tensor:
        """Surgery loss of an edit at some states; nothing moved is a loss of 1.

        Args:
            index: states of the prompt pairs, (n,).
            kept_index: states of what the soft form holds, (m,); not looked at without any.
            null_score: in place of that of the settings.
        """
        states = self._pool.states[index]
        asked = [(states, [self._pool.pairs[i].erased for i in states.index.tolist()])]
        if self._asks_null:
            asked.append((states, [self._pool.null] * len(states)))
        if self._kept_states is not None:
            kept = self._kept_states[kept_index]
            asked.append((kept, [self._pool.kept[i] for i in kept.index.tolist()]))
        guidance, *others = self._guidance(asked, edit)
        drift = others.pop(0) if self._asks_null else None
        self._look(index, guidance, drift)
        kept_drifts = [g - asked[-1][0].g_erased.to(g) for g in others]
        return self._scale * surgery_loss(
            guidance,
            self._targets[index].to(guidance),
            drift=drift,
            drift_weight=self._settings.drift_weight if self._soft else 0.0,
            kept_drifts=kept_drifts,
            keep_weight=self._settings.keep_weight,
            weight=self._weight(states.sigma).to(guidance.device),
            kept_weight=self._weight(asked[-1][0].sigma).to(guidance.device),
            null_score=(null_score or self._settings.null_score) if self._soft else "frozen",
        )

    def _guidance(
        self, asked: Sequence[tuple[States, Sequence[Encoded]]], edit: LowRankEdit
    ) -> list[Tensor]:
        """``eps_theta(x, c) - eps*(x, 0)`` of each group of states and prompts, in one forward."""
        device = self._denoiser.device
        x = torch.cat([states.x for states, _ in asked]).to(device)
        sigma = torch.cat([states.sigma for states, _ in asked]).to(device)
        x0_null = torch.cat([states.x0_null for states, _ in asked]).to(device)
        every = [prompt for _, prompts in asked for prompt in prompts]
        x0 = self._denoiser.predict_x0(x, sigma, every, edit)
        return list(guidance_term(x0_null, x0, sigma).split([len(states) for states, _ in asked]))

    def _seen_by(self, concept: int) -> LowRankEdit:
        """The edit with a gradient in the columns of one concept only."""
        if not self._columns:
            return self.edit
        start, end = self._columns[concept]
        rank = next(iter(self.edit.factors.values())).shape[1]
        own = torch.zeros(rank, dtype=torch.bool, device=self._denoiser.device)
        own[start:end] = True
        factors = {name: torch.where(own, b, b.detach()) for name, b in self.edit.factors.items()}
        return LowRankEdit(self.edit.bases, factors)

    def step(self, index: Tensor) -> float:
        """One optimiser step on the states ``index``; returns the surgery loss before it.

        Raises:
            DivergedError: the loss or its gradient is NaN or infinite; the edit is again what it
                was when both were finite.
            TrainingError: there isn't memory for a single state.
        """
        kept = next(self._kept_draws) if self._kept_states is not None else index
        value = self._backward(index, kept)
        if not math.isfinite(value):
            self._back_to_good()
            raise DivergedError(self._advice(f"The loss became {value}."))
        if not self._gradient_is_finite():
            raise DivergedError(self._advice("The gradient became NaN or infinite."))
        self._good = [tensor.detach().clone() for tensor in self._values]
        self._optimiser.step()
        self._schedule.step()
        self._steps_done += 1
        return value

    def _backward(self, index: Tensor, kept_index: Tensor) -> float:
        """The surgery loss, and its gradient with the ridge's in the trained values."""
        while True:
            before = self.fit
            value = self._or_use_less(
                lambda: self._backward_in_parts(index, kept_index), len(index)
            )
            if value is None:
                if self.fit.checkpointing and not before.checkpointing:
                    self.check_gradient()  # which is computed in another way from here on
                continue
            overflown = math.isfinite(value) and not self._gradient_is_finite()
            if self._loss_scale == 1 or not overflown:
                return value
            self._loss_scale = smaller_scale(self._loss_scale)

    def _backward_in_parts(self, index: Tensor, kept_index: Tensor) -> float:
        self._optimiser.zero_grad()
        value = 0.0
        for part, kept in zip(*(i.chunk(self.fit.parts) for i in (index, kept_index)), strict=True):
            share = len(part) / len(index)
            edit = self._seen_by(int(self._concepts[index[0]]))
            surgery = share * self.loss(edit, part, kept)
            terms = [ridge(edit) for ridge in self._ridges]
            ridge = share * self._ridge_share * sum(terms)
            self._seen.changes = [term.detach() for term in terms]
            ((surgery + ridge) * self._loss_scale).backward()
            value += float(surgery.detach())
        for gradient in self._gradients():
            gradient /= self._loss_scale
        return value

    def _gradients(self) -> list[Tensor]:
        return [tensor.grad for tensor in self._values if tensor.grad is not None]

    def _gradient_is_finite(self) -> bool:
        sizes = [gradient.abs().sum() for gradient in self._gradients()]
        return bool(torch.stack(sizes).isfinite().all())  # one wait for the device, not many

    def _back_to_good(self) -> None:
        with torch.no_grad():
            for tensor, good in zip(self._values, self._good or self._values, strict=True):
                tensor.copy_(good)

    def _advice(self, what: str) -> str:
        return (
            f"{what} Lower the learning rate (it is {self._settings.learning_rate:g}), or load the "
            "model in bf16 or fp32."
        )

    def left_and_drift(self) -> tuple[float, float | None]:
        """What is left of the concept in the latest batch, and how far what shall stay moved.

        The drift is that of ordinary language's keys and values, relative to themselves; where
        nothing is known of them, that of the null prompt's prediction in shares of the way that
        the concept goes. Nothing is predicted for it.
        """
        seen = self._seen
        pairs = zip(self._ridges, seen.changes, strict=True)
        drifts = [c for ridge, value in pairs if (c := ridge.change(value)) is not None]
        if not drifts and seen.drift is not None:
            drifts = [float(seen.drift) ** 0.5]
        return float("nan") if seen.left is None else float(seen.left), max(drifts, default=None)

    def latest_watched(self) -> tuple[int, Tensor] | None:
        """A state of the latest batch that is watched, and the guidance term at it, (c, h, w)."""
        return self._seen.watched

    def _look(self, index: Tensor, guidance: Tensor, drift: Tensor | None) -> None:
        """Remember of a batch what people see of it."""
        with torch.no_grad():
            weight = self._weight(self._pool.states.sigma[index]).to(guidance.device)
            error = guidance - self._targets[index].to(guidance)
            left = self._scale * weighted_error(error, weight)
            drifted = None if drift is None else self._scale * weighted_error(drift, weight)
        places = [p for p, row in enumerate(index.tolist()) if row in self.watched][:1]
        watched = [(int(index[p]), guidance[p].detach().clone()) for p in places]
        self._seen = Seen(left, drifted, watched[0] if watched else None)

    def state(self) -> Part:
        """All that the next step depends on, but for the states and the settings."""
        moments = [self._optimiser.state[value] for value in self._values]
        groups = {"value": self._values, "good": self._good or []}
        groups |= {name: [m[name] for m in moments if m] for name in ("exp_avg", "exp_avg_sq")}
        tensors = {
            f"{group}.{name}": tensor.detach().cpu().clone()
            for group, members in groups.items()
            for name, tensor in zip(self._trained, members, strict=False)  # none before a step
        }
        values = {
            "steps": self._steps_done,
            "loss_scale": self._loss_scale,
            "parts": self.fit.parts,
            "checkpointing": self.fit.checkpointing,
            "ran_out": self._ran_out,
            "estimate": self._estimate,
        }
        return Part(values, tensors)

    @property
    def state_size(self) -> int:
        """Bytes of :meth:`state`."""
        return 4 * sum(value.nbytes for value in self._values)

    def go_on(self, part: Part) -> bool:
        """Be where a trainer was that gave a state; call it before the first step.

        Returns:
            False for a state of other values; then nothing has changed.
        """
        names = ("value", "good", "exp_avg", "exp_avg_sq")
        shapes = [value.shape for value in self._values]
        try:
            # By name: hosts list a network's matrices in another order in every process.
            kept = {name: [part.tensors[f"{name}.{n}"] for n in self._trained] for name in names}
            done, ran_out = int(part.values["steps"]), int(part.values["ran_out"])
            fit = Fit(int(part.values["parts"]), bool(part.values["checkpointing"]))
            loss_scale, estimate = float(part.values["loss_scale"]), dict(part.values["estimate"])
        except (KeyError, TypeError, ValueError):
            return False
        if any([tensor.shape for tensor in kept[name]] != shapes for name in names):
            return False
        self._steps_done, self._ran_out, self.fit = done, ran_out, fit
        self._loss_scale, self._estimate = loss_scale, estimate
        with torch.no_grad():
            for value, tensor in zip(self._values, kept["value"], strict=True):
                value.copy_(tensor)
        device = self._denoiser.device  # what is kept stays as it is
        self._good = [tensor.to(device, copy=True) for tensor in kept["good"]]
        for number, value in enumerate(self._values):
            moments = {name: kept[name][number].to(device, copy=True) for name in names[2:]}
            self._optimiser.state[value] = {"step": torch.tensor(float(done)), **moments}
        for group in self._optimiser.param_groups:
            group["lr"] = group["initial_lr"] * warmup_then_cosine(self._settings.steps)(done)
        self._schedule.last_epoch = done
        if self._kept_states is not None:
            for _ in range(done):
                next(self._kept_draws)
        self._denoiser.free_memory(estimate.get("needed", 0))
        return True

    def batches(self) -> Iterator[Tensor]:
        """States for each of the steps to come, (batch,); the concepts take turns."""
        concepts = [
            (self._concepts == concept).nonzero().flatten() for concept in self._concepts.unique()
        ]
        endless = draws(concepts, self._settings.batch, self._settings.seed)
        return islice(endless, self._steps_done, self._settings.steps)

    def result(self) -> LowRankEdit:
        """The edit so far, detached."""
        return self.edit.to(self._denoiser.device).copy()


def draws(groups: Sequence[Tensor], batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of state indices, the groups in turn, each state once per pass of its group.

    Args:
        groups: indices of the states of each concept, (n,) each.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting = [torch.empty(0, dtype=torch.long) for _ in groups]
    while True:
        for number, members in enumerate(groups):
            while len(waiting[number]) < batch:
                order = torch.randperm(len(members), generator=generator)
                waiting[number] = torch.cat([waiting[number], members[order]])
            yield waiting[number][:batch]
            waiting[number] = waiting[number][batch:]


def _trainable(start: LowRankEdit, device: torch.device, bases_too: bool) -> LowRankEdit:
    start = start.to(device).copy()
    bases = start.bases
    if bases_too:  # each matrix gets its own
        bases = {name: basis.clone().requires_grad_() for name, basis in bases.items()}
    return LowRankEdit(bases, {name: b.requires_grad_() for name, b in start.factors.items()})
