"""The first model's helpers for trainings, with a log in this one's folder."""

from __future__ import annotations

from benchmarks.emoji import loop
from benchmarks.icons.data import FOLDER


class Log(loop.Log):
    """Lines with the time, on the screen and in ``build/icons/<name>.log``."""

    def __init__(self, name: str) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self._path = FOLDER / f"{name}.log"
