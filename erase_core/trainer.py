"""The one training loop: fit B of ``dW = B R^T`` to the surgical target on pooled states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .denoiser import Denoiser, LowRankEdit, stack_tokens
from .guidance import guidance_term, surgery_loss, surgical_target, weighted_error
from .settings import EraseSettings
from .states import EncodedPair, States

WARMUP_SHARE = 0.1
FINAL_RATE = 0.05


class TrainingError(RuntimeError):
    """Training can't go on, or there is nothing to train."""


class Ridge:
    """Ridge on ordinary language: ``mean_m tr(B S B^T) / tr(W M W^T)`` with ``S = R^T M R``.

    ``M`` is the second moment of the token embeddings of plain captions, so the term is the mean
    square change of keys and values for ordinary tokens, relative to their own mean square. It is
    what keeps the prompts nobody named.

    Args:
        matrices: W by name, (out, width).
        basis: R, (width, rank).
        moment: M, (width, width).
    """

    def __init__(self, matrices: Mapping[str, Tensor], basis: Tensor, moment: Tensor) -> None:
        inner = (basis.double().T @ moment.double() @ basis.double()).float()
        self._scale = {name: 1 / _energy(weight, moment) for name, weight in matrices.items()}
        self._inner = inner.to(next(iter(matrices.values())).device)

    def __call__(self, factors: Mapping[str, Tensor]) -> Tensor:
        terms = [((b @ self._inner) * b).sum() * self._scale[name] for name, b in factors.items()]
        return torch.stack(terms).mean()


class SurgeryTrainer:
    """Trains the factors B on pooled states; the model and R stay fixed.

    The factors and the optimiser are float32 whatever the model's dtype: Adam's steps are far
    below the resolution of half precision.

    Args:
        denoiser: the model.
        pairs: token embeddings of the prompt pairs that the states refer to.
        states: the training states.
        basis: R, (width, rank).
        start: B to start from by matrix name, (out, rank).
        ridge: the protection of ordinary language.
        settings: steps, batch, learning rate, eta, protection, seed.

    Raises:
        TrainingError: the guidance is already where it should go on every state.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        pairs: Sequence[EncodedPair],
        states: States,
        basis: Tensor,
        start: Mapping[str, Tensor],
        ridge: Ridge,
        settings: EraseSettings,
    ) -> None:
        self._denoiser, self._pairs, self._states = denoiser, pairs, states
        self._ridge, self._settings = ridge, settings
        self._targets = surgical_target(states.g_erased, states.g_alternative, settings.eta)
        distance = float(weighted_error(states.g_erased - self._targets))
        if distance <= 1e-12 * float(weighted_error(states.g_erased)):
            raise TrainingError(
                f"The model already draws {settings.concept!r} like its replacement: there is no "
                "guidance to change. Check the spelling, or name a different alternative."
            )
        self._scale = 1 / distance
        factors = {
            name: b.to(denoiser.device, copy=True).requires_grad_() for name, b in start.items()
        }
        self.edit = LowRankEdit.shared(basis.float().to(denoiser.device), factors)
        self._optimiser = _optimiser(self.edit.factors, denoiser.matrices(), settings)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser, _warmup_then_cosine(settings.steps)
        )

    def loss(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Surgery loss and ridge at the states ``index`` (n,); nothing moved is a loss of 1."""
        states, device = self._states[index], self._denoiser.device
        tokens = stack_tokens([self._pairs[i].erased for i in states.pair.tolist()]).to(device)
        sigma = states.sigma.to(device)
        x0 = self._denoiser.predict_x0(states.x.to(device), sigma, tokens, self.edit)
        guidance = guidance_term(states.x0_null.to(device), x0, sigma)
        surgery = surgery_loss(guidance, self._targets[index].to(device))
        return surgery * self._scale, self._ridge(self.edit.factors)

    def step(self, index: Tensor) -> float:
        """One optimiser step on the states ``index``; returns the surgery loss before it.

        Raises:
            TrainingError: the loss is NaN or infinite; the factors are as before the step.
        """
        surgery, ridge = self.loss(index)
        value = float(surgery.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"The loss became {value}. Lower the learning rate (it is "
                f"{self._settings.learning_rate:g}), or load the model in bf16 or fp32."
            )
        self._optimiser.zero_grad()
        (surgery + self._settings.protection * ridge).backward()
        self._optimiser.step()
        self._schedule.step()
        return value

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[float]:
        """All steps, yielding the surgery loss of each; ends early when ``should_stop()``."""
        draws = _draws(len(self._states), self._settings)
        for _ in range(self._settings.steps):
            if should_stop():
                return
            yield self.step(next(draws))

    def result(self) -> LowRankEdit:
        """The edit so far, detached."""
        factors = {name: b.detach().clone() for name, b in self.edit.factors.items()}
        return LowRankEdit(self.edit.bases, factors)


def _optimiser(
    factors: Mapping[str, Tensor], matrices: Mapping[str, Tensor], settings: EraseSettings
) -> torch.optim.Adam:
    """Adam whose step is a fixed share of each matrix's own size, so one rate fits all models."""
    groups = [
        {"params": [b], "lr": settings.learning_rate * _root_mean_square(matrices[name])}
        for name, b in factors.items()
    ]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def _warmup_then_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, round(WARMUP_SHARE * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def _draws(count: int, settings: EraseSettings) -> Iterator[Tensor]:
    """Endless batches of state indices, each state once per pass."""
    generator = torch.Generator().manual_seed(settings.seed)
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < settings.batch:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[: settings.batch]
        waiting = waiting[settings.batch :]


def _energy(weight: Tensor, moment: Tensor) -> float:
    weight = weight.float()
    return float(((weight @ moment.float().to(weight.device)) * weight).sum())


def _root_mean_square(weight: Tensor) -> float:
    return float(weight.float().square().mean().sqrt())
