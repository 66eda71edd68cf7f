"""What was read of ordinary language, kept on disk per text encoder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from torch import Tensor

from ..files.digest import content_hash
from ..files.disk import (
    DamagedFileError,
    read_safetensors,
    remove_abandoned,
    write_safetensors,
)

KEPT_FILES = 64  # three or four for each text encoder and list of captions
NAME, HASH_KEY = "moment", "concept_surgery_hash"


class LanguageStore(MutableMapping[str, Tensor]):
    """A small folder of tensors by key; the oldest files beyond 64 are dropped.

    * A file says what its content must be, key, type, shape and values. One of which that isn't so,
      or that holds a number that is none, counts as absent, and the next run writes over it.
    * A folder that can't be read or written costs the next run a minute, not this one its result.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._memory: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._memory:
            try:
                self._memory[key] = _read(self._path(key), key)
            except FileNotFoundError as error:
                raise KeyError(key) from error
            except (OSError, DamagedFileError) as error:
                logging.warning("Concept Surgery: %s can't be used: %s", self._path(key), error)
                raise KeyError(key) from error
        return self._memory[key]

    def __contains__(self, key: object) -> bool:
        try:
            self[str(key)]
        except KeyError:
            return False
        return True

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._memory[key] = value
        tensors = {NAME: value.contiguous()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(self._path(key), tensors, {HASH_KEY: content_hash(key, tensors)})
        except OSError as error:
            logging.warning("Concept Surgery: %s can't be written: %s", self._folder, error)
            return
        for old in self._files()[:-KEPT_FILES]:
            try:
                old.unlink(missing_ok=True)
            except OSError as error:
                logging.warning("Concept Surgery: %s can't be removed: %s", old, error)
        remove_abandoned(self._folder, shared=False)

    def __delitem__(self, key: str) -> None:
        self._memory.pop(key, None)
        self._path(key).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self._files())

    def __len__(self) -> int:
        return len(self._files())

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _files(self) -> list[Path]:
        """The oldest first; none where the folder can't be read."""
        found = []
        try:
            for path in self._folder.glob("*.safetensors"):
                try:
                    found.append((path.stat().st_mtime, path))
                except FileNotFoundError:  # another process was faster
                    continue
        except OSError as error:
            logging.warning("Concept Surgery: %s can't be read: %s", self._folder, error)
        return [path for _, path in sorted(found)]


def _read(path: Path, key: str) -> Tensor:
    """A tensor whose content is what was written under a key.

    Raises:
        OSError: it can't be read.
        DamagedFileError: it isn't.
    """
    metadata, tensors = read_safetensors(path, HASH_KEY)
    if metadata.get(HASH_KEY) != content_hash(key, tensors):
        raise DamagedFileError("its content is not what was written")
    if set(tensors) != {NAME} or not bool(tensors[NAME].isfinite().all()):
        raise DamagedFileError("it holds no finite tensor")
    return tensors[NAME]
