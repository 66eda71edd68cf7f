"""What a method is: a name, its settings, and a function that trains an edit.

Every method gives a :class:`LowRankEdit`. A change of a whole matrix is one too, with the identity
as its R: ``dW = B 1``, and Adam on B is Adam on the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from concept_surgery.erase_core.model.denoiser import Denoiser
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.model.prompt import Encoded
from concept_surgery.erase_core.run.states import check_finite, euler_step
from torch import Tensor

from benchmarks.erasure.cases import Case


@dataclass(frozen=True)
class Outcome:
    """What a method made.

    Attributes:
        edit: the weight change.
        notes: what it says of itself, plain JSON values.
    """

    edit: LowRankEdit
    notes: Mapping[str, Any] = field(default_factory=dict)


Train = Callable[[Denoiser, Case, int, Mapping[str, Any]], Outcome]


@dataclass(frozen=True)
class Method:
    """One method with its settings.

    Attributes:
        name: for tables; a variant stands after a slash.
        train: denoiser, case, seed and settings to an outcome. Predictions are counted by the
            denoiser.
        settings: plain JSON values.
        layers: which matrices it may change, a key of ``LAYER_RULES``.
        files: source files of the method in this folder, for the key of its results.
        uses_engine: whether ``erase_core``'s engine decides the result.
    """

    name: str
    train: Train
    settings: Mapping[str, Any]
    layers: str
    files: tuple[str, ...]
    uses_engine: bool = False

    def with_settings(self, name: str, **values: Any) -> Method:
        """The same method with some settings changed."""
        return Method(
            name, self.train, {**self.settings, **values}, self.layers, self.files, self.uses_engine
        )


def predict_eps(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    prompts: Sequence[Encoded],
    edit: LowRankEdit | None = None,
) -> Tensor:
    """``(x - x0) / sigma`` at x (n, c, h, w) and sigma (n,) under n prompts."""
    x0 = denoiser.predict_x0(x, sigma, prompts, edit)
    check_finite(x0, float(sigma.min()))
    return (x - x0) / sigma.view(-1, 1, 1, 1)


@torch.no_grad()
def partly_denoised(
    denoiser: Denoiser,
    noise: Tensor,
    null: Encoded,
    prompts: Sequence[Encoded],
    sigmas: Tensor,
    stops: Sequence[int],
    guidance: float,
    edit: LowRankEdit | None = None,
    bfloat16: bool = False,
) -> Tensor:
    """Latents (n, c, h, w) after ``stops`` guided Euler steps each, at levels ``sigmas[stops]``.

    With eta 0, DDIM is Euler's method in these units. Those that are done are asked nothing more,
    so the cost is theirs one by one.
    """
    x = denoiser.noisy_latent(noise, sigmas[0])
    with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
        for step in range(max(stops)):
            going = [n for n, stop in enumerate(stops) if stop > step]
            asked = [null] * len(going) + [prompts[n] for n in going]
            sigma, after = sigmas[step], sigmas[step + 1]
            now = x[going].repeat(2, 1, 1, 1)
            both = denoiser.predict_x0(now, sigma.repeat(len(now)), asked, edit)
            x[going] = euler_step(x[going], *both.chunk(2), sigma, after, guidance)
    return x


def whole_matrices(matrices: Mapping[str, Tensor]) -> LowRankEdit:
    """A trainable change of every matrix, starting at none."""
    bases = {w.shape[1]: torch.eye(w.shape[1]) for w in matrices.values()}
    return LowRankEdit(
        {name: bases[w.shape[1]] for name, w in matrices.items()},
        {name: torch.zeros(w.shape, requires_grad=True) for name, w in matrices.items()},
    )


class Lora:
    """Trainable low-rank matrices as everybody starts them: down random, up zero.

    Args:
        matrices: W by name, (out, width).
        rank, alpha: the change is ``alpha / rank`` times up and down.
    """

    def __init__(
        self, matrices: Mapping[str, Tensor], rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        self._scale = alpha / rank
        self._down = {n: _uniform(w.shape[1], rank, generator) for n, w in matrices.items()}
        self._up = {n: torch.zeros(len(w), rank, requires_grad=True) for n, w in matrices.items()}

    def parameters(self) -> list[Tensor]:
        """What trains."""
        return [*self._down.values(), *self._up.values()]

    def edit(self) -> LowRankEdit:
        """The change as it is now, differentiable."""
        ups = {name: self._scale * up for name, up in self._up.items()}
        return LowRankEdit(dict(self._down), ups)


def _uniform(width: int, rank: int, generator: torch.Generator) -> Tensor:
    bound = width**-0.5  # Kaiming's uniform with a = sqrt(5), as the LoRA code bases have it
    values = (torch.rand(width, rank, generator=generator) * 2 - 1) * bound
    return values.requires_grad_()


def last_subject_token(denoiser: Denoiser, text: str) -> Tensor:
    """Embedding (width,) of the last token before the end token; of "" the start token's."""
    (ids,), (prompt,) = denoiser.token_ids([text]), denoiser.encode([text])
    return prompt.tokens[ids.index(ids[-1]) - 1].double()


def in_turn(items: Sequence[Any], step: int) -> Any:
    """The concepts one after the other, round and round."""
    return items[step % len(items)]
