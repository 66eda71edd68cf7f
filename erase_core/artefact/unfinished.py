"""What runs that ended before their time leave on disk, so that they can go on."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files.digest import content_hash
from ..files.disk import (
    DamagedFileError,
    read_safetensors,
    remove_abandoned,
    write_safetensors,
)

# Room for some 40 runs on SD1.x or 10 on SDXL. What was used longest ago goes first.
LIMIT_BYTES, LIMIT_RUNS = 2 * 2**30, 16
# A part that is larger isn't kept: what is in it is made again.
LARGEST_PART = 2**30
KEPT_SECONDS = 30 * 24 * 3600
SUFFIX = ".safetensors"
VALUES, HASH = "concept_surgery_unfinished", "concept_surgery_hash"
_NAME = re.compile(r"([0-9a-f]{8,64})\.[a-z]{1,32}")


@dataclass(frozen=True)
class Part:
    """A part of what a run leaves.

    Attributes:
        values: plain JSON values.
        tensors: by name, on the CPU, of numbers with a fraction.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def _log(message: str) -> None:
    logging.warning("Concept Surgery: %s", message)


class UnfinishedStore(MutableMapping[str, Part]):
    """A folder with a file for each part of each run, by the name ``KEY.part``.

    * A file is renamed into place: who is killed while he writes leaves the one before.
    * Reading checks the content against the hash in the file. A damaged part counts as absent, and
      what was in it is made again.
    * Beyond ``limit_bytes`` and ``limit_runs`` the runs used longest ago go as a whole, never the
      one just written; what nobody used for a month goes, too.
    * A folder that can't be written costs the next run its time, not this one its result.

    Args:
        folder: where.
        warn: called with a sentence, once, when the folder can't be written.
    """

    def __init__(
        self,
        folder: Path,
        warn: Callable[[str], None] = _log,
        limit_bytes: int = LIMIT_BYTES,
        limit_runs: int = LIMIT_RUNS,
    ) -> None:
        self.folder = folder
        self._warn, self._warned = warn, False
        self._limit_bytes, self._limit_runs = limit_bytes, limit_runs

    def __getitem__(self, name: str) -> Part:
        path = self._path(name)
        try:
            part = _read(path, name)
        except FileNotFoundError as error:
            raise KeyError(name) from error
        except (OSError, DamagedFileError) as error:
            _log(f"{path} can't be used, what was in it is made again: {error}")
            raise KeyError(name) from error
        return part

    def __setitem__(self, name: str, part: Part) -> None:
        if part.size > min(LARGEST_PART, self._limit_bytes):
            return
        text = json.dumps(part.values)
        tensors = {key: tensor.detach().contiguous() for key, tensor in part.tensors.items()}
        info = {VALUES: text, HASH: content_hash(name + text, tensors)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(self._path(name), tensors, info)
            self._drop_oldest(name)
        except OSError as error:
            if not self._warned:
                self._warn(
                    f"What this run has done can't be kept in {self.folder}, so a run that is "
                    f"cancelled begins again from the start. ({error})"
                )
            self._warned = True
            return
        remove_abandoned(self.folder, shared=False)

    def __delitem__(self, name: str) -> None:
        try:
            self._path(name).unlink()
        except FileNotFoundError as error:
            raise KeyError(name) from error
        except OSError as error:
            _log(f"{self._path(name)} can't be removed: {error}")

    def __iter__(self) -> Iterator[str]:
        """Those used last come first."""
        return (path.name.removesuffix(SUFFIX) for _, _, path in reversed(self._by_use()))

    def __len__(self) -> int:
        return len(self._by_use())

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise KeyError(name)
        return self.folder / (name + SUFFIX)

    def _drop_oldest(self, written: str) -> None:
        """Bring the folder below its limits, whole runs at a time."""
        runs: dict[str, list[tuple[float, int, Path]]] = {}
        for entry in self._by_use():
            runs.setdefault(entry[2].name.split(".")[0], []).append(entry)
        total = sum(size for entries in runs.values() for _, size, _ in entries)
        count = len(runs)
        oldest = time.time() - KEPT_SECONDS
        for key, entries in sorted(runs.items(), key=lambda run: max(e[0] for e in run[1])):
            too_many = total > self._limit_bytes or count > self._limit_runs
            if key == written.split(".")[0] or not (
                too_many or max(entry[0] for entry in entries) < oldest
            ):
                continue
            for _, size, path in entries:
                path.unlink(missing_ok=True)
                total -= size
            count -= 1

    def _by_use(self) -> list[tuple[float, int, Path]]:
        """Time of writing, size and path of the files, the oldest first."""
        found = []
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    name = entry.name.removesuffix(SUFFIX)
                    if name == entry.name or not _NAME.fullmatch(name):
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # another process was faster
                        continue
                    found.append((status.st_mtime, status.st_size, Path(entry.path)))
        except OSError:  # no folder yet, or none that can be read
            return []
        return sorted(found)


def _read(path: Path, name: str) -> Part:
    """A part whose content is what was written under a name.

    Raises:
        OSError: it can't be read.
        DamagedFileError: it isn't.
    """
    metadata, tensors = read_safetensors(path, HASH)
    text = metadata.get(VALUES, "")
    if metadata.get(HASH) != content_hash(name + text, tensors):
        raise DamagedFileError("its content is not what was written")
    values = json.loads(text)
    if not isinstance(values, dict):
        raise DamagedFileError("it has no values")
    return Part(values, tensors)
