"""What a run is given, as every stage of it needs it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from ..method.encoded import EncodedPrompts
from ..model.activations import PLAIN_GRADIENT
from ..settings.prompts import name_of
from ..settings.settings import EraseSettings
from .journal import Journal
from .meter import Meter, MeteredDenoiser
from .plan import planned_cost


@dataclass(frozen=True)
class Given:
    """What was asked for, of which model.

    Attributes:
        settings: what was asked for.
        model: the host's, metered.
        prompts: the texts in the settings, as the text encoder gives them.
        random: random numbers for noise and for which prompts are sampled.
        journal: what it has found out, or an earlier run had.
        began: when the run did, in seconds of the monotonic clock.
    """

    settings: EraseSettings
    model: MeteredDenoiser
    prompts: EncodedPrompts
    random: torch.Generator
    journal: Journal = field(default_factory=Journal)
    began: float = field(default_factory=time.monotonic)

    @property
    def meter(self) -> Meter:
        """Cost, progress and stop."""
        return self.model.meter

    @property
    def checked_at_once(self) -> int:
        """States in a prediction that is measured; what was sampled so fits the device."""
        return 3 * self.settings.batch

    def planned(self, with_gradient: int = PLAIN_GRADIENT) -> dict[str, int]:
        """Forward-equivalents of the run by part, at most.

        Args:
            with_gradient: of a prediction in training.
        """
        pooled, plain = self.prompts.null.pooled is not None, len(self.prompts.plain)
        return planned_cost(self.settings, pooled, plain, with_gradient)

    @property
    def erased(self) -> list[str]:
        """What is erased; protected, it would hold back what is to move."""
        concepts, kind_of = self.settings.concepts, self.settings.kind_of
        return [name_of(name, kind_of(c)) for c in concepts for name in c.names]

    @property
    def spoken(self) -> list[str]:
        """What is erased and what takes its place: no words that nobody named."""
        concepts, kind_of = self.settings.concepts, self.settings.kind_of
        replacing = [name_of(c.alternative, kind_of(c)) for c in concepts if c.alternative]
        return [*self.erased, *replacing]
