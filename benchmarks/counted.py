"""A denoiser whose predictions are counted, for methods that know nothing of the engine's meter."""

from __future__ import annotations

from concept_surgery.erase_core.model.denoiser import Denoiser
from concept_surgery.erase_core.run.meter import Meter, MeteredDenoiser


class CountedDenoiser(MeteredDenoiser):
    """Counts in forward-equivalents, as the engine does."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser, Meter())

    @property
    def forward_equivalents(self) -> int:
        """What was spent; to be set back, or to be charged with what was done elsewhere."""
        return self.meter.spent

    @forward_equivalents.setter
    def forward_equivalents(self, spent: int) -> None:
        self.meter.spent = spent
