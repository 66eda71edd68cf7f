"""The artefact: B, R and the record of how they were made; saved as a LoRA that loads anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import disk
from ..model.low_rank import LowRankEdit
from ..settings.families import by_name
from ..settings.texts import same_text
from . import formats
from .record import read_record, record_problem

# How far the values of one change may lie apart in two places: rounding to bf16 and back is .003.
SAME_VALUES = 0.005


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

    def concepts_in(self, changes: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> list[str]:
        """Texts of the concepts that other changes of the same matrices hold too, by their values.

        One matrix in which they do is enough: what else is in the changes doesn't matter, nor
        which of the matrices they are of.

        Args:
            changes: B (out, rank) and R (width, rank) of low-rank changes, by matrix name.
        """
        found = []
        for concept in self.record["concepts"]:
            columns = slice(*concept["columns"]) if concept["columns"] else slice(None)
            if any(self._is_held(name, columns, others) for name, others in changes.items()):
                found.append(concept["text"])
        return found

    def _is_held(self, name: str, columns: slice, others: Sequence[tuple[Tensor, Tensor]]) -> bool:
        if name not in self.factors:
            return False
        own = self.factors[name][:, columns], self.bases[name][:, columns]
        return any(_holds(other, own) for other in others)

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
        """The same erasure with the pooled vector as it was; itself where that isn't edited.

        Raises:
            ErasureError: nothing else is edited.
        """
        name = by_name(self.record["family"]).pooled_matrix
        if name not in self.factors:
            return self
        if len(self.factors) == 1:
            raise ErasureError(
                "Nothing would be left of the erasure: all that it changes is how the pooled "
                "vector is read. Switch 'pooled_vector' on."
            )
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
            return formats.diffusers_tensors(
                self.bases, self.factors, self.record["family"], self.record.get(formats.LAYERS_KEY)
            )
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
        self._write(path, naming, disk.write_safetensors)

    def save_new(self, path: Path, naming: str = formats.KOHYA) -> None:
        """The same for a name that nothing has; of several savers at once one gets it.

        Raises:
            FileExistsError: something has the name.
            ErasureFileError: as there.
        """
        self._write(path, naming, disk.create_safetensors)

    def _write(self, path: Path, naming: str, write: Callable[..., None]) -> None:
        tensors = self.tensors(naming)
        try:
            write(path, tensors, formats.metadata(self.record, tensors, path.stem))
        except FileExistsError:
            raise
        except OSError as error:
            raise ErasureFileError(
                f"The erasure can't be written to {str(path)!r}: {error.strerror or error}. "
                "Check that the folder exists, is not read-only and has space left."
            ) from error
        except ValueError as error:
            raise ErasureFileError(
                f"The erasure can't be written to {str(path)!r}: {error} Train it again without "
                "that in a text or a name."
            ) from error

    @classmethod
    def load(cls, path: Path, old: bool = True) -> Erasure:
        """Read an erasure.

        Args:
            old: whether a file is taken whose hash is of the values alone, as it was until version
                0.7.0; its record may then be damaged in a way that nobody sees.

        Raises:
            ErasureFileError: no such file, one that can't be read, a damaged one, one that is no
                erasure, or one of a version whose record can't be used.
        """
        try:
            metadata, tensors = disk.read_safetensors(path, formats.RECORD_KEY)
        except FileNotFoundError as error:
            raise ErasureFileError(f"There is no erasure at {str(path)!r}.") from error
        except OSError as error:
            raise ErasureFileError(
                f"{path.name} can't be read: {error.strerror or error}. Check the rights of the "
                "file and of its folder, and whether the drive is there."
            ) from error
        except disk.DamagedFileError as error:
            raise ErasureFileError(
                f"{path.name} can't be read as safetensors ({error}). The file is damaged or was "
                "not copied whole; get it again."
            ) from error
        if metadata:
            problem = formats.content_problem(metadata, tensors)
            if problem and not formats.has_hash(metadata):
                # What else is wrong with it says more: that it is of a version too old, say.
                cls._from_file(path.name, tensors, metadata)
            if not (old or problem or formats.HASH_KEY in metadata):
                problem = "nothing says what its record must be"
            if problem:
                raise ErasureFileError(
                    f"{path.name} is damaged: {problem}. Get the file again, or train the erasure "
                    "again. If another tool changed it, use it in the host's own LoRA loader."
                )
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
            record = read_record(metadata[formats.RECORD_KEY])
            known = record if isinstance(record, Mapping) else {}
            said = known.get("family"), known.get(formats.LAYERS_KEY)
            tensors = formats.as_kohya(tensors, *said)
            bases, factors = formats.read_kohya_tensors(tensors)
        except ValueError as error:
            raise ErasureFileError(f"{name} is damaged: {error} Get the file again.") from error
        erasure = cls(bases, factors, record)
        narrowest = min(basis.shape[1] for basis in bases.values())
        problem = record_problem(record, narrowest)
        if problem:
            raise ErasureFileError(f"{name} {problem}")
        return erasure


def _holds(change: tuple[Tensor, Tensor], part: tuple[Tensor, Tensor]) -> bool:
    """Whether a low-rank change has the columns of another, side by side, in B and in R.

    Args:
        change: B (out, rank) and R (width, rank).
        part: the same of what is looked for.
    """
    (factor, basis), (own_factor, own_basis) = change, part
    if factor.shape[0] != own_factor.shape[0] or basis.shape[0] != own_basis.shape[0]:
        return False
    if not own_factor.any():
        return False  # nothing, which everything holds
    largest = int(own_factor.norm(dim=0).argmax())
    wanted = own_factor[:, largest]
    apart = (factor - wanted[:, None]).norm(dim=0)
    for place in (apart <= SAME_VALUES * wanted.norm()).nonzero().flatten().tolist():
        there = slice(place - largest, place - largest + own_factor.shape[1])
        if there.start >= 0 and there.stop <= factor.shape[1]:
            pairs = ((factor[:, there], own_factor), (basis[:, there], own_basis))
            if all((one - other).norm() <= SAME_VALUES * other.norm() for one, other in pairs):
                return True
    return False
