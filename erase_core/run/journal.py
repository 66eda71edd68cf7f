"""What a run has found out so far, kept so that another one can go on from there.

A run is the same every time, step by step. So whatever it has found out may stand in for finding
it out again: states that were sampled, how far a closed form moves, where the optimiser is, each
with the random numbers as they were after it and what it cost. ``erase()`` is read from top to
bottom all the same; what is missing is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..artefact.record import STOPPED, TRAINED, WORSE
from ..artefact.unfinished import Part
from .meter import Meter

# What is written while a run goes on may take this share of its time, and comes so seldom at most.
WRITING_SHARE, LEAST_SECONDS = 0.01, 5.0
BYTES_A_SECOND = 100e6  # until it is known how fast this disk is
ABOUT, PROGRESS = "about", "progress"
STATES = ("heldout", "trial", "training", "kept")

Writes = Callable[[], Part]


class Journal:
    """What one run has found out; see :mod:`journal`.

    Use as a context manager: however the run ends, what isn't written yet is written then.

    Args:
        parts: where it is kept, by name; None keeps nothing.
        key: of this run, which the names of its parts begin with.
        source: key of the run that is gone on with, often the same; "" begins anew.
        about: what the run is made from, plain JSON values, for who looks for it.
        random: the run's random numbers.
        meter: the run's.
    """

    def __init__(
        self,
        parts: MutableMapping[str, Part] | None = None,
        key: str = "",
        source: str = "",
        about: Mapping[str, Any] | None = None,
        random: torch.Generator | None = None,
        meter: Meter | None = None,
    ) -> None:
        self._parts, self._key, self._source, self._about = parts, key, source, about or {}
        self._random, self._meter = random or torch.Generator(), meter or Meter()
        self._pending: dict[str, tuple[int, Writes]] = {}  # with bytes
        self._began = self._written = self._meter.clock()
        self._writing, self._speed = 0.0, BYTES_A_SECOND
        found = self._read(ABOUT)
        self._facts: dict[str, Any] = dict(found.values.get("facts", {})) if found else {}
        self._noted = False

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.write()

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors on the CPU that an earlier run has made, else what ``make`` gives.

        Args:
            name: one of :data:`STATES`.
        """
        part = self._read(name)
        if part is not None:
            try:
                tensors = _unpacked(part)
                cost, random = int(part.values["cost"]), _bytes_of(part.values["random"])
                self._random.set_state(random)
            except (KeyError, TypeError, ValueError, RuntimeError):
                part = None  # a file that isn't what it says
        if part is not None:
            self._meter.skip(cost)
            if self._source != self._key:
                self._pending[name] = (part.size, lambda: part)
            return tensors
        if self._parts is None:
            return dict(make())
        before = self._meter.spent
        made = dict(make())
        cost, random = self._meter.spent - before, self._random.get_state()
        size = sum(tensor.nbytes for tensor in made.values())
        self._pending[name] = (size, lambda: _packed(made, {"cost": cost, "random": _text(random)}))
        self.keep_up()
        return made

    @property
    def history(self) -> Sequence[Sequence[int]]:
        """For each time that steps were added, how many were done and planned until then."""
        return tuple(self._about.get("history", ()))

    def known(self, name: str) -> Any:
        """A fact that an earlier run noted, its cost on the meter; None if none did."""
        fact = self._facts.get(name)
        if fact is None:
            return None
        self._meter.skip(fact["cost"])
        return fact["value"]

    def note(self, name: str, value: Any, cost: int) -> None:
        """Keep a fact.

        Args:
            value: plain JSON, and not None.
            cost: what it cost, in forward-equivalents.
        """
        self._facts[name] = {"value": value, "cost": cost}
        self._noted = True

    def fact(self, name: str, find: Callable[[], Any]) -> Any:
        """A fact that an earlier run noted, else what ``find`` gives, which is noted."""
        value = self.known(name)
        if value is None:
            before = self._meter.spent
            value = find()
            self.note(name, value, self._meter.spent - before)
        return value

    def progress(self) -> Part | None:
        """How far an earlier run trained; None if it didn't."""
        return self._read(PROGRESS)

    def progressed(self, size: int, write: Writes) -> None:
        """The training is a step further.

        Args:
            size: bytes of what ``write`` gives, about.
            write: gives how far it is, if it is written.
        """
        if self._parts is None:
            return
        self._pending[PROGRESS] = (size, write)
        self.keep_up()

    def keep_up(self) -> None:
        """Write what isn't written, where that takes little beside the run."""
        now = self._meter.clock()
        if self._parts is None or now - self._written < LEAST_SECONDS:
            return
        # The states are by far the largest, and there before the training begins.
        size = sum(size for size, _ in self._pending.values())
        expected = self._writing + size / self._speed
        if expected <= WRITING_SHARE * (now - self._began):
            self.write()

    def write(self) -> None:
        """Write all that isn't written."""
        if self._parts is None:
            return
        if self._pending or self._noted:
            self._write()
        self._meter.resumable = f"{self._key}.{ABOUT}" in self._parts  # or it couldn't be written

    def _write(self) -> None:
        assert self._parts is not None
        began = self._meter.clock()
        size = 0
        about = {**self._about, "facts": self._facts, "written": time.time()}
        self._parts[f"{self._key}.{ABOUT}"] = Part(about)
        for name, (_, make) in list(self._pending.items()):
            part = make()
            size += part.size
            self._parts[f"{self._key}.{name}"] = part
            del self._pending[name]
        self._written = self._meter.clock()
        took = self._written - began
        self._writing += took
        if took > 0:
            self._speed = max(1e6, size / took)
        self._noted = False

    def end(self, record: Mapping[str, Any]) -> None:
        """Keep what the run left if it may be gone on with, else forget it.

        It may where it was stopped, and where it trained: steps can be added. What diverged would
        diverge again.
        """
        diverged = bool(record["ended_by"])
        if record["training"] in (STOPPED, TRAINED, WORSE) and not diverged:
            self.write()
        else:
            self._pending.clear()
            forget(self._parts, self._key)
            self._meter.resumable = False
        self._meter.resumable &= not record["complete"]

    def _read(self, name: str) -> Part | None:
        if self._parts is None or not self._source:
            return None
        return self._parts.get(f"{self._source}.{name}")


def forget(parts: MutableMapping[str, Part] | None, key: str) -> None:
    """Remove all that is kept of a run."""
    for name in (ABOUT, PROGRESS, *STATES):
        if parts is not None:
            parts.pop(f"{key}.{name}", None)


def _packed(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Part:
    """With whole numbers among the values, and numbers of few digits in a type of more."""
    numbers = {name: t for name, t in tensors.items() if t.is_floating_point()}
    few = [name for name, t in numbers.items() if t.dtype is torch.bfloat16]
    whole = {name: t.tolist() for name, t in tensors.items() if name not in numbers}
    kept = {name: t.float() if name in few else t for name, t in numbers.items()}
    return Part({**values, "whole": whole, "bfloat16": few}, kept)


def _unpacked(part: Part) -> dict[str, Tensor]:
    few, whole = part.values["bfloat16"], part.values["whole"]
    tensors = {name: t.bfloat16() if name in few else t for name, t in part.tensors.items()}
    return {**tensors, **{name: torch.tensor(numbers) for name, numbers in whole.items()}}


def _text(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _bytes_of(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
