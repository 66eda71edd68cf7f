"""What the engine needs from a host's model."""

from __future__ import annotations

import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..files.fingerprint import fingerprint
from ..settings.families import by_name
from ..settings.layers import reads_prompt
from .activations import BlockRun
from .low_rank import LowRankEdit
from .prompt import POOLED, TOKENS, Encoded
from .readers import FoundReaders


class Denoiser(ABC):
    """The model as the engine sees it. A host's adapter fills this in; nothing else is asked of it.

    What is abstract must be there. The rest has defaults: they are right for a network that
    predicts eps of latents that aren't scaled, in memory that is never short, and find no result
    again.

    Latents are in the model's own scale (after the host's latent format), sigma is the noise
    level in the host's units, and predictions are x0 in float32, as hosts return them.

    Attributes:
        family: name of the architecture, for records and messages; one of
            :data:`families.FAMILIES` where it is known there.
        device: where predictions run.
        dtype: the precision they are computed in.
        own_cost: what it spent by itself on finding out what reads the prompt, and what of it, in
            forward-equivalents.
        reading_cost: forward-equivalents of having the network read one prompt, see :meth:`read`.
        found_readers: the groups of layers that it found to read the prompt alone, for the record;
            empty where they are known by name.
    """

    family: str = "another architecture"
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    own_cost: float = 0.0
    reading_cost: float = 0.0
    found_readers: Sequence[FoundReaders] = ()

    @abstractmethod
    def encode(self, prompts: Sequence[str], together: bool = False) -> list[Encoded]:
        """The embeddings of each prompt.

        Prompts are encoded one by one, exactly as the host will when it samples;
        ``together`` allows batches, whose rounding may differ in the last digits; where the host
        can't tell the pooled vectors of a batch, they are left out.
        """

    @abstractmethod
    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, one for each row that :meth:`encode` gives."""

    @abstractmethod
    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """(channels, height, width) of the latent of a square picture of that many pixels."""

    @abstractmethod
    def sigmas(self, steps: int) -> Tensor:
        """A sampling schedule: ``steps + 1`` falling noise levels, the last one 0."""

    @abstractmethod
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

    @abstractmethod
    def matrices(self) -> Mapping[str, Tensor]:
        """The matrices that train, (out, width), by their kohya LoRA name."""

    @cached_property
    def names(self) -> Collection[str]:
        """Of the matrices that :meth:`matrices` gives; known before anything is loaded."""
        return self.matrices().keys()

    @cached_property
    def ways(self) -> Mapping[str, Sequence[str]]:
        """The names of the matrices that read the prompt and nothing else.

        By what they read of it, :data:`prompt.TOKENS` first, without ways on which nothing enters.
        A matrix on any other way may read more, behind the prompt's part. The hard form needs
        them; a model of which none are known has the soft form alone.
        """
        family = by_name(self.family)
        tokens = [name for name in self.names if family.readers_known and reads_prompt(name)]
        pooled = [name for name in self.names if name == family.pooled_matrix]
        return {way: names for way, names in ((TOKENS, tokens), (POOLED, pooled)) if names}

    def read(self, prompts: Sequence[Encoded]) -> None:  # noqa: B027 - most do nothing
        """Fill in what the network reads of prompts where that isn't what the encoder gave.

        See :attr:`prompt.Encoded.read`. The default is for networks that read just that.
        """

    @cached_property
    def base(self) -> Mapping[str, Any]:
        """ "name" and "fingerprint" of the unpatched model, for the record."""
        return {"name": "", "fingerprint": fingerprint(self.matrices())}

    @cached_property
    def identity(self) -> str:
        """A name for the model as it is trained on, for finding results again.

        The same when it is loaded another time, another one when anything that training sees
        differs.
        """
        return uuid.uuid4().hex

    def vocabulary(self) -> Sequence[str]:
        """The words that the text encoder has tokens for, frequent ones first; () if not known."""
        return ()

    def noisy_latent(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """The starting latent (n, c, h, w): pure noise scaled to ``sigma`` (scalar)."""
        return noise * sigma

    def noisy_picture(self, picture: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """A picture's latent (n, c, h, w) with noise of that shape at ``sigma`` (scalar)."""
        return picture + noise * sigma

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """w(sigma), (n,): what a squared difference of eps counts at each noise level.

        It turns differences of eps into differences of what the network itself puts out: 1 for
        networks that predict eps or a flow's velocity, ``1 + sigma^2`` for those that predict v.
        """
        return torch.ones_like(sigma)

    def around_blocks(self, run: BlockRun) -> AbstractContextManager[None]:
        """Inside, the repeated blocks of the network are run by ``run`` where gradients are wanted.

        A block may be run again after the prediction and after the context have ended, during
        its backward, and must give the same then.
        """
        return nullcontext()

    def weights(self) -> Iterable[Tensor]:
        """What stays in memory whatever is predicted."""
        return self.matrices().values()

    def free_memory(self, wanted: int) -> int:
        """Bytes free where predictions run, after an attempt to make that many free."""
        return max(wanted, sys.maxsize)
