"""What was read of ordinary language, kept on disk per text encoder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import folder_paths
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..erase_core.formats import write_safetensors

KEPT_FILES = 64  # three or four for each text encoder and list of captions


class LanguageStore(MutableMapping[str, Tensor]):
    """A small folder of tensors by key; the oldest files beyond 64 are dropped.

    A folder that can't be written costs the next run a minute, not this one its result.
    """

    def __init__(self, folder: Path | None = None) -> None:
        user = Path(folder_paths.get_user_directory())
        self._folder = folder or user / "concept_surgery" / "language"
        self._memory: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._memory:
            try:
                self._memory[key] = load_file(str(self._path(key)))["moment"]
            except (OSError, SafetensorError, KeyError) as error:
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
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(self._path(key), {"moment": value}, {})
            for old in self._files()[:-KEPT_FILES]:
                old.unlink(missing_ok=True)
        except OSError as error:
            logging.warning("Concept Surgery: %s can't be written: %s", self._folder, error)

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
        return sorted(self._folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
