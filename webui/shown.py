"""What the tab shows of a run as HTML: made of numbers, and of text that is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..erase_core import Progress
from ..erase_core.artefact.chart import PAPER, Line, neighbour_chart
from ..erase_core.run.meter import CurvePoint
from .jobs import CANCELLED, DONE, FAILED, RUNNING, WAITING, Job

WIDTH, HEIGHT, EDGE = 560, 160, 26
_COLOURS = {"left": "#c0392b", "drift": "#2471a3"}


def status(job: Job | None, before: int = 0, message: str = "") -> str:
    """Where a run is, with a bar and the time that is left.

    Args:
        before: runs that wait in front of it.
        message: shown in place of a run's own, where none was begun.
    """
    if job is None:
        return _line(message or "Nothing is being trained.", bool(message))
    if job.state == WAITING:
        queue = f"{before} before it" if before else "for the host to be free"
        return _line(f"Training {job.id} waits: {queue}.")
    if job.state == RUNNING and job.progress is not None:
        return _running(job, job.progress)
    if job.state in (FAILED, CANCELLED):
        return _line(job.message, job.state == FAILED)
    if job.state == DONE:
        seconds = (job.ended or 0) - (job.begun or job.ended or 0)
        return _line(f"Training {job.id} has ended well, after {duration(seconds)}.")
    return _line(f"Training {job.id} begins.")


def _running(job: Job, progress: Progress) -> str:
    words = [progress.stage]
    if progress.steps:
        words.append(f"step {progress.step} of {progress.steps}")
    if progress.loss is not None:
        words.append(f"loss {progress.loss:.3f}")
    if progress.seconds_left is not None:
        words.append(f"at most {duration(progress.seconds_left)} left")
    if job.stopping:
        words.append("stopping")
    share = max(0.0, min(1.0, progress.share))
    bar = (
        '<div style="background:rgba(128,128,128,.3);border-radius:4px;height:10px">'
        f'<div style="background:#2e86c1;border-radius:4px;height:10px;width:{share:.1%}"></div>'
        "</div>"
    )
    return _line(f"Training {job.id}: {', '.join(words)}.") + bar


def said(text: str) -> str:
    """A sentence that nothing is wrong with."""
    return _line(text)


def _line(text: str, wrong: bool = False) -> str:
    colour = "color:#c0392b;" if wrong else ""
    role = "alert" if wrong else "status"
    return f'<p role="{role}" style="{colour}white-space:pre-wrap;margin:4px 0">{escape(text)}</p>'


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def curve(points: Sequence[CurvePoint]) -> str:
    """What is left of the concept, and how far the rest has moved, over the run; an SVG."""
    if len(points) < 2:
        return ""
    last = max(points[-1].done, 1)

    def line(values: list[tuple[int, float]], colour: str) -> str:
        spots = " ".join(
            f"{EDGE + (WIDTH - 2 * EDGE) * done / last:.1f},"
            f"{EDGE + (HEIGHT - 2 * EDGE) * (1 - max(0.0, min(1.0, value))):.1f}"
            for done, value in values
        )
        return f'<polyline points="{spots}" fill="none" stroke="{colour}" stroke-width="2"/>'

    left = [(point.done, point.left) for point in points]
    drift = [(point.done, point.drift) for point in points if point.drift is not None]
    floor = HEIGHT - EDGE
    axis = (
        f'<path d="M{EDGE} {EDGE}V{floor}H{WIDTH - EDGE}" fill="none" stroke="gray"/>'
        f'<text x="2" y="{EDGE + 4}" font-size="11" fill="gray">100%</text>'
        f'<text x="10" y="{floor + 4}" font-size="11" fill="gray">0</text>'
    )
    named = f"{_key('left', f'what is left of the concept: {left[-1][1]:.0%}')}"
    if drift:
        named += _key("drift", f"how far the rest moved: {drift[-1][1]:.1%}")
    lines = line(left, _COLOURS["left"]) + (line(drift, _COLOURS["drift"]) if drift else "")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" '
        f'aria-label="curve of the training">{axis}{lines}</svg>{named}'
    )


def chart(record: Mapping[str, Any] | None) -> str:
    """The map of what else changes, an SVG; "" where nothing is trained yet."""
    if record is None:
        return ""
    found = neighbour_chart(record)
    boxes = "".join(
        f'<rect x="{box.left}" y="{box.top}" width="{box.right - box.left}" '
        f'height="{box.bottom - box.top}" fill="rgb{box.colour}"/>'
        for box in found.boxes
    )
    return (
        f'<svg viewBox="0 0 {found.width} {found.height}" width="100%" role="img" '
        f'aria-label="what is gone, what was kept, what else changes">'
        f'<rect width="{found.width}" height="{found.height}" fill="rgb{PAPER}"/>'
        f"{boxes}{''.join(map(_text, found.lines))}</svg>"
    )


def _text(line: Line) -> str:
    """A line in a frame of its own, so that it ends at its width."""
    return (
        f'<svg x="{line.left}" y="{line.top}" width="{line.width}" height="{line.size * 5 // 4}">'
        f'<text y="{line.size}" font-size="{line.size}" font-family="sans-serif" '
        f'fill="rgb{line.colour}">{escape(line.text)}</text></svg>'
    )


def _key(name: str, text: str) -> str:
    return f'<span style="color:{_COLOURS[name]};margin-right:1em">{escape(text)}</span>'
