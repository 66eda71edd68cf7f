"""Finished erasures on disk, found again by what they were made from."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

from ..files.disk import remove_abandoned
from .erasure import Erasure, ErasureFileError

# Room for some 300 erasures of SD1.x or some 35 of SDXL. What was used longest ago goes first.
LIMIT_BYTES = 4 * 2**30
SUFFIX = ".safetensors"
STOPPED = ".stopped-"

_KEY = re.compile("[0-9a-f]{8,64}")


def _log(message: str) -> None:
    logging.warning("Concept Surgery: %s", message)


class ResultStore(MutableMapping[str, Erasure]):
    """A folder with one erasure file a key; each is also an ordinary LoRA.

    * A file is renamed into place, so it is whole or not there, whoever else writes it.
    * An erasure that was stopped before its end is kept as ``KEY.stopped-VALUES.safetensors``.
      It is a file for its user to take and never found under its key.
    * Reading checks the content, values, names and record, against the hash in the file. A damaged
      file counts as absent and is written over by the next training.
    * Beyond ``limit_bytes`` the files used longest ago are dropped, never the one just written.
      Reading is using.
    * A folder that can't be written costs the next run its time, not this one its result.

    Args:
        folder: where, the same for all hosts that shall find each other's.
        warn: called with a sentence when a file or the folder can't be used.
        limit_bytes: how much may lie in the folder.
    """

    def __init__(
        self,
        folder: Path,
        warn: Callable[[str], None] = _log,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        self.folder = folder
        self._warn = warn
        self._limit = limit_bytes
        self.written: Path | None = None  # the last file

    def __getitem__(self, key: str) -> Erasure:
        path = self._path(key)
        if path is None:
            raise KeyError(key)
        try:
            erasure = _read_checked(path)
        except ErasureFileError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                self._warn(f"A stored result can't be used, its next training replaces it. {error}")
            raise KeyError(key) from error
        self._mark_used(path)
        return erasure

    def __setitem__(self, key: str, erasure: Erasure) -> None:
        name = key if erasure.record.get("complete") else f"{key}{STOPPED}{erasure.identity}"
        path = self.folder / (name + SUFFIX)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            erasure.save(path)
        except (ErasureFileError, OSError) as error:
            self._warn(
                f"The result can't be stored in {self.folder}, so the same training will run "
                f"again next time; save the erasure. ({error})"
            )
            return
        self.written = path
        self._drop_oldest(path)
        remove_abandoned(self.folder, shared=False)

    def __delitem__(self, key: str) -> None:
        path = self._path(key)
        if path is None:
            raise KeyError(key)
        try:
            path.unlink()
        except FileNotFoundError as error:
            raise KeyError(key) from error

    def __iter__(self) -> Iterator[str]:
        try:
            names = [path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}")]
        except OSError as error:
            self._warn(f"{self.folder} can't be read: {error}")
            names = []
        return (name for name in names if _KEY.fullmatch(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, key: object) -> Path | None:
        known = isinstance(key, str) and _KEY.fullmatch(key)
        return self.folder / f"{key}{SUFFIX}" if known else None

    def _mark_used(self, path: Path) -> None:
        try:
            os.utime(path)
        except OSError as error:  # a folder to read from only
            logging.debug("Concept Surgery: %s can't be marked as used: %s", path, error)

    def _drop_oldest(self, written: Path) -> None:
        """Bring the folder below its limit."""
        try:
            files = self._by_use()
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total > self._limit and path != written:
                    path.unlink(missing_ok=True)
                    total -= size
        except OSError as error:
            self._warn(f"Old results in {self.folder} can't be removed: {error}")

    def _by_use(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of the files, those used longest ago first."""
        found = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process was faster
                continue
            found.append((status.st_mtime, status.st_size, path))
        return sorted(found)


def _read_checked(path: Path) -> Erasure:
    """A complete erasure whose content is what was written.

    Raises:
        ErasureFileError: it isn't.
    """
    erasure = Erasure.load(path, old=False)
    if not erasure.record["complete"]:
        raise ErasureFileError(f"{path.name} has no record of a complete training.")
    return erasure
