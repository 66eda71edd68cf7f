"""Runs, each in a thread of its own, that the tab and the API look at and can stop."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..erase_core import Erasure, Progress
from ..erase_core.artefact.markdown import report_markdown
from ..erase_core.artefact.report import report_text
from ..erase_core.run.meter import CurvePoint, Preview
from . import form, host, training
from .errors import InterruptedByUserError

WAITING, RUNNING, DONE, CANCELLED, FAILED = (
    "waiting",
    "running",
    "done",
    "cancelled",
    "failed",
)
ENDED = (DONE, CANCELLED, FAILED)
KEPT = 16  # runs that are remembered
LONGEST_MESSAGE = 2000


class NoSuchJobError(KeyError):
    """A run that isn't known, or not any more."""


class Job:
    """One run.

    Attributes:
        state: one of the words above.
        message: what happened, in a sentence, once it has ended otherwise than well.
        setting: the input that the message is about; "" where it is about none.
        saved: the file it was saved to.
    """

    def __init__(self, number: int, values: Mapping[str, Any]) -> None:
        self.id, self.values = str(number), dict(values)
        self.state, self.message, self.setting = WAITING, "", ""
        self.progress: Progress | None = None
        self.curve: list[CurvePoint] = []
        self.pictures: list[tuple[Any, str]] = []
        self.outcome: training.Outcome | None = None
        self.saved: Path | None = None
        self.created = time.time()
        self.begun: float | None = None
        self.ended: float | None = None
        self._stop, self._cancel = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="concept surgery", daemon=True)

    def start(self) -> Job:
        """Begin, or wait for the host's queue."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End soon and keep what was learned."""
        self._stop.set()

    def cancel(self) -> None:
        """End at once and keep nothing."""
        self._cancel.set()

    @property
    def stopping(self) -> bool:
        """Whether somebody asked to stop or to cancel."""
        return self._stop.is_set() or self._cancel.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended within so many seconds."""
        self._thread.join(seconds)
        return self.state in ENDED

    @property
    def erasure(self) -> Erasure | None:
        """What came of it."""
        return self.outcome.erasure if self.outcome else None

    def report(self, markdown: bool = False) -> str:
        """The report of a run that has ended well; "" of any other."""
        if self.outcome is None:
            return ""
        write = report_markdown if markdown else report_text
        return write(self.outcome.erasure.record, self.outcome.notes)

    def _run(self) -> None:
        state, message, setting = FAILED, "", ""
        try:
            self.outcome = training.train(
                lambda family: form.chosen(self.values, family),
                self._told,
                self._stop.is_set,
                form.reuse_of(self.values),
                self._shown,
            )
            state = DONE
        except InterruptedByUserError as error:
            state, message = CANCELLED, str(error)
        except Exception as error:  # the end of the thread, where it can only be told
            message, setting = told(error), getattr(error, "setting", "")
        finally:
            self.message, self.setting, self.ended = message, setting, time.time()
            self.state = state

    def _told(self, progress: Progress) -> None:
        if self._cancel.is_set():
            raise InterruptedByUserError("Cancelled. Nothing was kept, and the model is as it was.")
        if self.begun is None:
            self.begun = time.time()
        if self.state == WAITING:
            self.state = RUNNING
        self.progress, self.curve = progress, list(progress.curve)

    def _shown(self, preview: Preview) -> None:
        pictures = [
            (host.picture_of(latent), f"{preview.kind}, {when}")
            for latent, when in ((preview.before, "before"), (preview.now, "now"))
            if latent is not None
        ]
        self.pictures = [(picture, title) for picture, title in pictures if picture is not None]


class Jobs:
    """The runs of this process, newest last."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._numbers, self._lock = itertools.count(1), threading.Lock()

    def start(self, given: Mapping[str, Any]) -> Job:
        """Begin a run.

        Raises:
            SettingsError: values that can't work.
        """
        values = form.checked(given)
        with self._lock:
            job = Job(next(self._numbers), values)
            self._jobs[job.id] = job
            ended = [one for one in self._jobs.values() if one.state in ENDED]
            for old in ended[: max(0, len(ended) - KEPT)]:
                del self._jobs[old.id]
        return job.start()

    def get(self, number: str) -> Job:
        """A run by its number; "" is the newest.

        Raises:
            NoSuchJobError: there is none.
        """
        jobs = dict(self._jobs)
        if not number and jobs:
            return list(jobs.values())[-1]
        if number not in jobs:
            known = ", ".join(jobs) or "none yet"
            raise NoSuchJobError(f"There is no training number {number!r} (known: {known}).")
        return jobs[number]

    def all(self) -> list[Job]:
        """All that are remembered."""
        return list(self._jobs.values())

    def before(self, job: Job) -> int:
        """How many runs are in front of one that waits."""
        return sum(
            other.state in (WAITING, RUNNING) and int(other.id) < int(job.id)
            for other in self.all()
        )


def told(error: Exception) -> str:
    """An error as a sentence for a person; what nobody foresaw goes to the log as well."""
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, ValueError | RuntimeError):
        text = f"{type(error).__name__}: {text}"
    logging.warning("Concept Surgery: %s", text, exc_info=error)
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + "..."


JOBS = Jobs()
