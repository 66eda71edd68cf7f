"""What the engine needs from a host's model, and how a low-rank edit rides on its forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import lcm
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .activations import BlockRun


@dataclass(frozen=True)
class LowRankEdit:
    """The weight changes ``dW = B R^T`` of the trained matrices.

    Attributes:
        bases: R by matrix name, each (width, rank). In the hard form it is one and the same
            tensor for all matrices.
        factors: B by matrix name, each (out, rank).
    """

    bases: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]

    @classmethod
    def shared(cls, basis: Tensor, factors: Mapping[str, Tensor]) -> LowRankEdit:
        """An edit whose matrices all have the same R."""
        return cls(dict.fromkeys(factors, basis), factors)

    def to(self, device: torch.device | str) -> LowRankEdit:
        """The edit on a device in float32, detached; bases that were one tensor stay one."""
        return self._each(lambda tensor: tensor.detach().to(device, torch.float32))

    def with_more(self, other: LowRankEdit) -> LowRankEdit:
        """Both edits; they are of different matrices."""
        return LowRankEdit({**self.bases, **other.bases}, {**self.factors, **other.factors})

    def copy(self) -> LowRankEdit:
        """The edit in memory of its own."""
        return self._each(torch.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> LowRankEdit:
        changed = {id(basis): change(basis) for basis in self.bases.values()}
        return LowRankEdit(
            {name: changed[id(basis)] for name, basis in self.bases.items()},
            {name: change(factor) for name, factor in self.factors.items()},
        )


@dataclass(frozen=True)
class Encoded:
    """A prompt as the text encoder gives it, float32 on the CPU.

    Attributes:
        tokens: token embeddings, (tokens, width).
        pooled: the pooled vector of models that take one beside the tokens, (size,); else None.
    """

    tokens: Tensor
    pooled: Tensor | None = None

    def zeroed(self) -> Encoded:
        """The same shapes filled with zeros: what some workflows use as the null prompt."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Encoded(torch.zeros_like(self.tokens), pooled)

    def tensors(self) -> list[Tensor]:
        """The embeddings that there are."""
        return [self.tokens] if self.pooled is None else [self.tokens, self.pooled]


class Denoiser(Protocol):
    """The model as the engine sees it. A host adapter fulfils this; nothing else is asked of it.

    Latents are in the model's own scale (after the host's latent format), sigma is the noise
    level in the host's units, and predictions are x0 in float32, as hosts return them.

    Attributes:
        family: name of the architecture family, for example "SD1.x".
        base: "name" and "fingerprint" of the unpatched model, for the record.
        identity: a name for the model as it is trained on, for finding results again: the same
            when it is loaded another time, another one when anything that training sees differs.
        device: where predictions run.
        dtype: the precision they are computed in.
        names: of the matrices that :meth:`matrices` gives; known before anything is loaded.
    """

    family: str
    base: Mapping[str, Any]
    identity: str
    device: torch.device
    dtype: torch.dtype
    names: Collection[str]

    def encode(self, prompts: Sequence[str], together: bool = False) -> list[Encoded]:
        """The embeddings of each prompt.

        Prompts are encoded one by one, exactly as the host will when it samples;
        ``together`` allows batches without pooled vectors, whose rounding may differ in the last
        digits.
        """

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, one for each row that :meth:`encode` gives."""

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """(channels, height, width) of the latent of a square picture of that many pixels."""

    def sigmas(self, steps: int) -> Tensor:
        """A sampling schedule: ``steps + 1`` falling noise levels, the last one 0."""

    def noisy_latent(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """The starting latent (n, c, h, w): pure noise scaled to ``sigma`` (scalar)."""

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """w(sigma), (n,): what a squared difference of eps counts at each noise level.

        It turns differences of eps into differences of what the network itself puts out: 1 for
        networks that predict eps or a flow's velocity, ``1 + sigma^2`` for those that predict v.
        """

    def predict_x0(
        self,
        x: Tensor,
        sigma: Tensor,
        prompts: Sequence[Encoded],
        edit: LowRankEdit | None = None,
    ) -> Tensor:
        """x0 under the prompts, one for each latent: x (n, c, h, w), sigma (n,), on any device.

        Differentiable in the factors of ``edit``; without an edit it is the original model.
        """

    def matrices(self) -> Mapping[str, Tensor]:
        """The matrices that train, (out, width), by their kohya LoRA name.

        Those that :func:`layers.reads_prompt` names are applied to token embeddings and to nothing
        else; the hard form has only these.
        """

    def around_blocks(self, run: BlockRun) -> AbstractContextManager[None]:
        """Inside, the repeated blocks of the network are run by ``run`` where gradients are wanted.

        A block may be run again after the prediction and after the context have ended, during
        its backward, and must give the same then.
        """

    def weights(self) -> Iterable[Tensor]:
        """What stays in memory whatever is predicted."""

    def room(self, needed: int) -> int:
        """Bytes free where predictions run, after an attempt to make that many free."""


class Projections:
    """``x R`` of what the layers are given in one forward, in the type of R.

    Hosts round the prompts to the model's type, and rounded ones are no longer orthogonal to R: in
    bf16 that alone would move exact prompts about as far as rounding the weights does. Where a
    layer is given such prompts, the original ones are projected.

    Args:
        prompts: what layers are given of the prompts, before it is rounded, as far as it is known:
            token embeddings (n, tokens, width), what goes with a pooled vector (n, width).
    """

    def __init__(self, prompts: Sequence[Tensor | None] = ()) -> None:
        self.prompts = [prompt for prompt in prompts if prompt is not None]
        self._seen: Tensor | None = None
        self._precise: Tensor | None = None
        self._projected: dict[int, Tensor] = {}

    def project(self, x: Tensor, basis: Tensor) -> Tensor:
        """``x R`` (..., rank). Layers that are given the same tensor share it."""
        if x is not self._seen:
            self._seen, self._precise, self._projected = x, self._unrounded(x, basis.dtype), {}
        if id(basis) not in self._projected:
            self._projected[id(basis)] = self._precise @ basis
        return self._projected[id(basis)]

    def _unrounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x``, each number that is a prompt's rounded one as it was before."""
        known = next((prompt for prompt in self.prompts if prompt.shape == x.shape), None)
        if x.dtype is dtype or known is None:
            return x.to(dtype)
        full = known.to(x.device, dtype)
        # What stands between the encoder and the layer may have changed some: those stay changed.
        return torch.where(full.to(x.dtype) == x, full, x.to(dtype))


class LowRankSidePath:
    """Lets linear layers add ``(x R) B^T`` to their output while an edit is active.

    A side path costs ``2 tokens width rank`` multiplications more per matrix; forming
    ``W + B R^T`` instead would build a gradient as large as every trained matrix at each step.

    Args:
        modules: the layers, by the matrix name that an edit uses.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._edit: LowRankEdit | None = None
        self._projections = Projections()
        self._handles = [
            module.register_forward_hook(self._hook(name)) for name, module in modules.items()
        ]

    @contextmanager
    def active(
        self, edit: LowRankEdit | None, prompts: Sequence[Tensor | None] = ()
    ) -> Iterator[None]:
        """Apply ``edit`` inside the block, which runs one forward with ``prompts``.

        Args:
            prompts: see :class:`Projections`.
        """
        previous = self._edit, self._projections
        self._edit, self._projections = edit, Projections(prompts)
        try:
            yield
        finally:
            self._edit, self._projections = previous

    def again(self) -> Callable[[], AbstractContextManager[None]]:
        """What makes the edit that is active now active once more, for a part of the forward.

        With projections of its own: a part that is run twice must do the same both times.
        """
        edit, prompts = self._edit, self._projections.prompts
        return lambda: self.active(edit, prompts)

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):
        def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._edit is None:
                return None
            factor = self._edit.factors.get(name)
            if factor is None:
                return None
            projected = self._projections.project(inputs[0], self._edit.bases[name])
            return (output + projected @ factor.T).to(output.dtype)

        return add


def stack_tokens(prompts: Sequence[Encoded]) -> Tensor:
    """One batch (n, length, width) of prompts that may differ in length, for cross-attention.

    Shorter ones are repeated up to the least common multiple, as the hosts do: attention over a
    key set in which every key occurs equally often is attention over the set itself.
    """
    every = [prompt.tokens for prompt in prompts]
    length = lcm(*(tokens.shape[0] for tokens in every))
    return torch.stack([tokens.repeat(length // tokens.shape[0], 1) for tokens in every])


def stack_pooled(prompts: Sequence[Encoded]) -> Tensor | None:
    """The pooled vectors of a batch, (n, size); None where the model takes none."""
    if any(prompt.pooled is None for prompt in prompts):
        return None
    return torch.stack([prompt.pooled for prompt in prompts])
