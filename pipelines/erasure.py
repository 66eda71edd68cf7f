"""An erasure for who works with diffusers: saved as its pipelines read it, and put on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..erase_core.artefact.erasure import Erasure as CoreErasure
from ..erase_core.artefact.erasure import ErasureFileError
from ..erase_core.artefact.formats import DIFFUSERS
from ..erase_core.artefact.report import report_text
from .applied import Applied, merged


class Erasure(CoreErasure):
    """A finished erasure, see :class:`erase_core.Erasure`, that knows pipelines."""

    @classmethod
    def of(cls, erasure: CoreErasure) -> Erasure:
        """The same erasure."""
        return cls(erasure.bases, erasure.factors, erasure.record)

    @classmethod
    def load(cls, path: Path | str, old: bool = True) -> Erasure:
        """See :meth:`erase_core.Erasure.load`."""
        return cls.of(super().load(Path(path), old))

    @property
    def report(self) -> str:
        """What it does and what else it changes, in words, the verdict first."""
        return report_text(self.record)

    def save(self, path: Path | str, naming: str = DIFFUSERS, overwrite: bool = False) -> None:
        """Write the erasure as a LoRA, with the names that ``load_lora_weights`` takes.

        Args:
            path: of the file, which ends in .safetensors.
            naming: "diffusers", which is kohya's for SD1, SD2 and SDXL; or "kohya", as other
                programs want them for SD3 and Flux.
            overwrite: whether a file of that name may be replaced.

        Raises:
            ErasureFileError: there is one, or none can be written there.
        """
        path = Path(path)
        if overwrite:
            super().save(path, naming)
            return
        try:
            self.save_new(path, naming)
        except FileExistsError as error:
            raise ErasureFileError(
                f"{str(path)!r} is there already. Choose another name, or say overwrite=True."
            ) from error

    def applied(self, pipe: Any, strength: float = 1.0) -> Applied:
        """Put the erasure on a pipeline, beside its weights.

        Within ``with erasure.applied(pipe):`` for as long as that lasts; without ``with`` for good,
        until ``remove()`` of what this gives is called.

        Args:
            pipe: a pipeline of the architecture that it was made on; other LoRAs may be on it.
            strength: 1 erases as trained, 0 is the pipeline as it is, from -5 to 5.

        Raises:
            PipelineError: another architecture, a strength out of range, or the erasure, or a part
                of it, is on the pipeline already.
        """
        return Applied(pipe, self, strength)

    def merged(self, pipe: Any, strength: float = 1.0) -> Any:
        """A pipeline with the erasure in its weights; it shares all others with the given one.

        Raises:
            PipelineError: as for :meth:`applied`.
        """
        return merged(pipe, self, strength)

    def without(self, texts: Sequence[str]) -> Erasure:
        """See :meth:`erase_core.Erasure.without`."""
        return self.of(super().without(texts))

    def without_pooled(self) -> Erasure:
        """See :meth:`erase_core.Erasure.without_pooled`."""
        return self.of(super().without_pooled())
