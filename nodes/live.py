"""Runs as they go: what shows at their nodes, and how they are stopped from there."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..erase_core import EraseSettings, Erasure, Meter, Preview, Progress
from ..erase_core.artefact.verdict import verdict
from ..erase_core.run.meter import DRAWN, ERASED, KEPT
from ..erase_core.run.recorded import thinned
from .messages import send_event, shown
from .pictures import small_jpeg
from .previews import Previewer
from .stores import picture_store

EVENT = "concept_surgery.run"  # what the front end listens to
# A person doesn't read faster; an event costs a millisecond, and a step may take little more.
EVENT_SECONDS, PICTURE_SECONDS = 0.25, 1.0
POINTS, LABEL = 120, 60  # of a curve that is sent, and letters of a picture's label
REMEMBERED = 64  # runs that a page may ask for when it is loaded again
# How a run stands.
RUNNING, DONE, STOPPED, STORED = "running", "done", "stopped", "stored"
CANCELLED, FAILED = "cancelled", "failed"
# The pictures in the order in which they are shown and kept.
PLACES = ((ERASED, "before"), (ERASED, "now"), (KEPT, "before"), (KEPT, "now"), (DRAWN, "now"))
ABSENT = -1.0  # of a picture that there isn't


class LiveRun:
    """One run at one node: shown while it goes, and told how it ended.

    Use as a context manager around the run. What the run raises passes through.

    Args:
        node_id: of the node in its graph, with those of the subgraphs around it; None outside.
        prompt_id, client_id: of the queued graph and of the page that queued it, where known.
        settings: what was asked for, for the labels.
        previewer: makes pictures of latents.
        meter: of the run, which it stops.
    """

    def __init__(
        self,
        node_id: str | None,
        prompt_id: str | None,
        client_id: str | None,
        settings: EraseSettings,
        previewer: Previewer,
        meter: Meter,
    ) -> None:
        self.node_id, self.prompt_id, self.client_id = node_id, prompt_id, client_id
        self._settings, self._meter = settings, meter
        self._previewer: Previewer | None = previewer
        self._state, self._note, self._stage = RUNNING, "", "Getting ready"
        self._verdict = ""  # what came of it, in words
        self._figures: dict[str, Any] = {"share": 0.0, "step": 0, "steps": 0}
        self._figures |= {"seconds_left": None, "stopping": False}
        self._curve: list[list[float | None]] = []
        self._pictures: dict[str, Tensor] = {}  # as bytes (h, w, 3), by kind and time
        self._encoded: dict[str, str] = {}  # the same as JPEG, in hexadecimal digits
        self._picture_at: dict[str, float] = {}
        self._sent_at = 0.0
        self._pictures_changed = True  # none, instead of those of the run before

    def __enter__(self) -> LiveRun:
        remember(self)
        self.send()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._state != RUNNING:
            return
        interrupted = comfy.model_management.InterruptProcessingException
        cancelled = kind is not None and issubclass(kind, interrupted | KeyboardInterrupt)
        done, steps = self._figures["step"], self._figures["steps"]
        after = f" after {done} of {steps} steps" if done else ""
        kept = " Queue again to go on from there." if self._meter.resumable else ""
        self.end(
            CANCELLED if cancelled else FAILED,
            f"Cancelled{after}.{kept}" if cancelled else f"Ended by an error{after}.{kept}",
        )

    @property
    def is_running(self) -> bool:
        """Whether there is something to stop."""
        return self._state == RUNNING

    def stop(self) -> None:
        """Let it end after this step and keep what was learned."""
        self._meter.stop()

    def progressed(self, progress: Progress) -> None:
        """Show how far it is, if the last time was a while ago or something else begins."""
        new = progress.stage.split(",")[0] != self._stage.split(",")[0]
        now = time.monotonic()
        if not new and now - self._sent_at < EVENT_SECONDS:
            return
        self._stage = progress.stage
        self._figures = {
            "share": progress.share,
            "step": progress.step,
            "steps": progress.steps,
            "seconds_left": progress.seconds_left,
            "stopping": progress.stopping,
        }
        self._curve = thinned(progress.curve, POINTS)
        self.send()

    def previewed(self, preview: Preview) -> None:
        """Show a picture, if the last one of its kind was a while ago."""
        now = time.monotonic()
        last = self._picture_at.get(preview.kind)
        if self._previewer is None or (last is not None and now - last < PICTURE_SECONDS):
            return
        self._picture_at[preview.kind] = now
        for when, latent in (("before", preview.before), ("now", preview.now)):
            picture = None if latent is None else self._previewer.picture(latent)
            if picture is not None:
                self._put(f"{preview.kind} {when}", picture)

    def end(self, state: str, note: str) -> None:
        """Tell how it ended.

        Args:
            note: in words.
        """
        self._state, self._note, self._stage = state, note, ""
        if state in (DONE, STOPPED, STORED):
            self._figures["share"] = 1.0
        self._figures |= {"seconds_left": None, "stopping": False}
        self._previewer = None  # which holds the model
        self.send()

    def ended_with(self, erasure: Erasure, note: str) -> None:
        """Tell that it gave an erasure, and keep its pictures beside it."""
        record, pictures = erasure.record, picture_store()
        state = DONE if record["complete"] else STOPPED
        if self._meter.reused:
            state = STORED
            kept = pictures.get(erasure.identity)
            for (kind, when), picture in zip(
                PLACES, kept if kept is not None else (), strict=False
            ):
                if bool((picture != ABSENT).any()):
                    self._put(f"{kind} {when}", (255 * picture).round().to(torch.uint8))
        elif self._pictures:
            pictures[erasure.identity] = self._as_one()
        self._curve = [list(point) for point in record.get("curve", ())]
        self._figures |= {"step": record["steps_done"], "steps": self._settings.steps}
        self._verdict = "\n".join(verdict(record))
        self.end(state, note)

    def snapshot(self, pictures: bool = True) -> dict[str, Any]:
        """All that shows, plain JSON values; texts are data.

        Args:
            pictures: whether to send those, too.
        """
        found = {
            "node": self.node_id,
            "prompt_id": self.prompt_id,
            "state": self._state,
            "stage": self._stage,
            "note": self._note,
            "verdict": self._verdict,
            "curve": self._curve,
            "erases": shown("\n".join(concept.text for concept in self._settings.concepts)),
            **self._figures,
        }
        return {**found, "pictures": self._shown_pictures()} if pictures else found

    def send(self) -> None:
        """Send it to the page that queued it."""
        self._sent_at = time.monotonic()
        changed, self._pictures_changed = self._pictures_changed, False
        send_event(EVENT, self.snapshot(changed or self._state != RUNNING), self.client_id)

    def _put(self, name: str, picture: Tensor) -> None:
        self._pictures[name], self._encoded[name] = picture, small_jpeg(picture).hex()
        self._pictures_changed = True

    def _shown_pictures(self) -> list[dict[str, str]]:
        concept = self._settings.concepts[0].text
        keep = self._settings.keep[0] if self._settings.keep else "no prompt"
        label = {ERASED: concept, KEPT: keep, DRAWN: f"{concept}, drawn"}
        found: dict[str, dict[str, str]] = {}
        for kind, when in PLACES:
            jpeg = self._encoded.get(f"{kind} {when}")
            if jpeg is not None:
                found.setdefault(kind, {"kind": kind, "label": label[kind][:LABEL]})[when] = jpeg
        return list(found.values())

    def _as_one(self) -> Tensor:
        """The pictures as one tensor (places, h, w, 3) from 0 to 1."""
        height, width, _ = next(iter(self._pictures.values())).shape
        found = torch.full((len(PLACES), height, width, 3), ABSENT, dtype=torch.float16)
        for place, (kind, when) in enumerate(PLACES):
            picture = self._pictures.get(f"{kind} {when}")
            if picture is not None and picture.shape == found.shape[1:]:
                found[place] = picture.half() / 255
        return found


_runs: OrderedDict[tuple[str | None, str | None], LiveRun] = OrderedDict()
_lock = threading.Lock()  # the server's thread reads what the executor's writes


def remember(run: LiveRun) -> None:
    """Let a run be found; it takes the place of the one before at its node."""
    with _lock:
        _runs[run.client_id, run.node_id] = run
        _runs.move_to_end((run.client_id, run.node_id))
        while len(_runs) > REMEMBERED:
            _runs.popitem(last=False)


def runs_of(client_id: str | None = None, prompt_id: str | None = None) -> list[LiveRun]:
    """The latest run at each node that a page queued, or that belong to one queued graph."""
    with _lock:
        runs = list(_runs.values())
    if client_id is None and prompt_id is None:
        return []
    return [
        run
        for run in runs
        if client_id in (None, run.client_id) and prompt_id in (None, run.prompt_id)
    ]


def stop_runs(asked: Mapping[str, Any]) -> int:
    """Stop what runs of a page or of a queued graph; how many there were.

    Args:
        asked: ``client_id``, ``prompt_id`` or both; ``node`` for one node only.
    """
    found = runs_of(asked.get("client_id"), asked.get("prompt_id"))
    running = [run for run in found if run.is_running and asked.get("node") in (None, run.node_id)]
    for run in running:
        run.stop()
    return len(running)
