"""The artefact: B, R and the record of how they were made; saved as a LoRA that loads anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import formats
from .denoiser import LowRankEdit
from .families import by_name
from .record import record_problem
from .settings import same_text


class ErasureError(ValueError):
    """Something that an erasure can't do."""


class ErasureFileError(ErasureError):
    """A file that is not an erasure, or is damaged."""


@dataclass(frozen=True)
class Erasure:
    """A finished erasure.

    Attributes:
        bases: R by kohya LoRA name, each (width, rank) float32; the same tensor where it is shared.
        factors: B by kohya LoRA name, each (out, rank) float32.
        record: what it is and how it was made, plain JSON values.
    """

    bases: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]
    record: Mapping[str, Any]

    @classmethod
    def from_edit(cls, edit: LowRankEdit, record: Mapping[str, Any]) -> Erasure:
        """An erasure from a trained edit, moved to the CPU."""
        edit = edit.to("cpu")
        return cls(edit.bases, edit.factors, record)

    @cached_property
    def identity(self) -> str:
        """Hash of the trained values: what makes two erasures the same."""
        return self._values_hash(slice(None))

    @cached_property
    def parts(self) -> Mapping[str, str]:
        """Hash of the trained values of each concept, by its text.

        A concept's is the same in what :meth:`without` leaves. Where concepts share columns, each
        has that of the whole.
        """
        return {
            concept["text"]: self._values_hash(slice(*concept["columns"]))
            if concept["columns"]
            else self.identity
            for concept in self.record["concepts"]
        }

    def _values_hash(self, columns: slice) -> str:
        digest, last = hashlib.sha256(), None
        for name in sorted(self.factors):
            digest.update(name.encode())
            digest.update(self.factors[name][:, columns].contiguous().numpy().tobytes())
            if self.bases[name] is not last:
                last = self.bases[name]
                digest.update(last[:, columns].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def concept(self) -> str:
        """What it erases, in words."""
        return ", ".join(concept["text"] for concept in self.record.get("concepts", ())) or "?"

    @property
    def rank(self) -> int:
        """Columns of the widest R."""
        return max(basis.shape[1] for basis in self.bases.values())

    def delta(self, name: str) -> Tensor:
        """``dW = B R^T`` of one matrix, (out, width)."""
        return self.factors[name] @ self.bases[name].T

    def edit(self, device: torch.device | str = "cpu") -> LowRankEdit:
        """The erasure as an edit that a denoiser can run with."""
        return LowRankEdit(self.bases, self.factors).to(device)

    def without(self, texts: Sequence[str]) -> Erasure:
        """The same erasure with some of its concepts taken out again.

        Every concept has columns of its own in R and B, so that the others stay as they are.

        Raises:
            ErasureError: a concept that isn't in it, nothing left, or concepts that share columns.
        """
        concepts = self.record["concepts"]
        for text in texts:
            if not any(same_text(text, concept["text"]) for concept in concepts):
                raise ErasureError(
                    f"{text!r} is not among what this erasure erases: {self.concept}. Name one of "
                    "those."
                )
        left = [c for c in concepts if not any(same_text(text, c["text"]) for text in texts)]
        if not left:
            raise ErasureError(
                "Nothing would be left of the erasure. Leave it out, or apply it at strength 0."
            )
        if len(left) < len(concepts) and any(c["columns"] is None for c in concepts):
            raise ErasureError(
                "The concepts of this erasure were trained in the soft form and can't be told "
                "apart. Train them in the hard form, or in runs of their own."
            )
        return self if len(left) == len(concepts) else self._only(left)

    def _only(self, concepts: Sequence[Mapping[str, Any]]) -> Erasure:
        kept = torch.cat([torch.arange(*concept["columns"]) for concept in concepts])
        bases = {id(basis): basis[:, kept].contiguous() for basis in self.bases.values()}
        ends = [0]
        for concept in concepts:
            start, end = concept["columns"]
            ends.append(ends[-1] + end - start)
        renumbered = [
            {**concept, "columns": list(columns)}
            for concept, columns in zip(
                concepts, zip(ends[:-1], ends[1:], strict=True), strict=True
            )
        ]
        taken = [c["text"] for c in self.record["concepts"] if c not in concepts]
        record = {
            **self.record,
            "concepts": renumbered,
            "rank": len(kept),
            "taken_out": [*self.record.get("taken_out", []), *taken],
        }
        return Erasure(
            {name: bases[id(basis)] for name, basis in self.bases.items()},
            {name: factor[:, kept].contiguous() for name, factor in self.factors.items()},
            record,
        )

    def without_pooled(self) -> Erasure:
        """The same erasure with the pooled vector as it was; itself where that isn't edited."""
        name = by_name(self.record["family"]).pooled_matrix
        if name not in self.factors:
            return self
        bases, factors = (
            {key: value for key, value in tensors.items() if key != name}
            for tensors in (self.bases, self.factors)
        )
        measures = dict(self.record["measures"])
        if measures["pooled"]:
            measures["pooled"] = {**measures["pooled"], "left": None}
        record = {**self.record, "measures": measures, "matrices": len(factors)}
        return Erasure(bases, factors, {**record, "pooled_left_out": True})

    def tensors(self, naming: str = formats.KOHYA) -> dict[str, Tensor]:
        """The tensors of its file, under names of one of :data:`formats.NAMINGS`.

        Raises:
            ErasureFileError: diffusers' names of its matrices aren't known.
        """
        if naming == formats.KOHYA:
            return formats.kohya_tensors(self.bases, self.factors)
        try:
            return formats.diffusers_tensors(self.bases, self.factors, self.record["family"])
        except ValueError as error:
            raise ErasureFileError(
                f"The erasure of {self.concept!r} can't be saved for diffusers. {error} Save it "
                "with the names 'kohya', or train it with the layers that the family has by itself."
            ) from error

    def save(self, path: Path, naming: str = formats.KOHYA) -> None:
        """Write the erasure as a LoRA file, float32.

        Args:
            naming: whose names its tensors have, see :meth:`tensors`.

        Raises:
            ErasureFileError: the folder can't be written; nothing is left behind. Or diffusers'
                names of its matrices aren't known.
        """
        tensors = self.tensors(naming)
        info = formats.metadata(self.record, tensors, path.stem)
        try:
            formats.write_safetensors(path, tensors, info)
        except OSError as error:
            raise ErasureFileError(
                f"The erasure can't be written to {str(path)!r}: {error.strerror or error}. "
                "Check that the folder exists, is not read-only and has space left."
            ) from error

    @classmethod
    def load(cls, path: Path) -> Erasure:
        """Read an erasure.

        Raises:
            ErasureFileError: no such file, a damaged one, one that is no erasure, or one of a
                version whose record can't be used.
        """
        if not path.is_file():
            raise ErasureFileError(f"There is no erasure at {str(path)!r}.")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ErasureFileError(
                f"{path.name} can't be read as safetensors ({error}). The file is damaged or was "
                "not copied whole; get it again."
            ) from error
        return cls._from_file(path.name, tensors, metadata)

    @classmethod
    def _from_file(
        cls, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> Erasure:
        if formats.RECORD_KEY not in metadata:
            raise ErasureFileError(
                f"{name} is not an erasure made by Concept Surgery: it has no record. If it is an "
                "ordinary LoRA, use the host's own LoRA loader."
            )
        try:
            record = json.loads(metadata[formats.RECORD_KEY])
            family = record.get("family") if isinstance(record, Mapping) else None
            bases, factors = formats.read_kohya_tensors(formats.as_kohya(tensors, family))
        except ValueError as error:
            raise ErasureFileError(f"{name} is damaged: {error} Get the file again.") from error
        erasure = cls(bases, factors, record)
        problem = record_problem(record, erasure.rank)
        if problem:
            raise ErasureFileError(f"{name} {problem}")
        return erasure
