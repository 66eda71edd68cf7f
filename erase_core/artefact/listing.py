"""Which of many files are erasures, without reading more of any than its header."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .saving import is_erasure_file

ENDINGS = (".safetensors", ".sft")


class ErasureFiles:
    """Remembers what each file was, by its place, its time and its size."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[int, int, bool]] = {}

    def among(self, files: Mapping[str, Path]) -> list[str]:
        """The names whose files are erasures, in their order.

        Files that can't be looked at, or are damaged so that they don't say what they are, are
        left out. Files that are no longer asked for are forgotten.

        Args:
            files: where each file is, by its name.
        """
        now = {}
        for path in files.values():
            if path.suffix.lower() not in ENDINGS:
                continue
            try:
                status = os.stat(path)
            except OSError:
                continue
            seen = self._known.get(path)
            if seen is None or seen[:2] != (status.st_mtime_ns, status.st_size):
                seen = (status.st_mtime_ns, status.st_size, is_erasure_file(path))
            now[path] = seen
        self._known = now
        return [name for name, path in files.items() if path in now and now[path][2]]
