"""Running the engine inside a node, with the host's progress bar and cancel button."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.utils
import torch

from ..erase_core import EraseSettings, Erasure, Meter, Progress, erase
from ..erase_core.artefact.identity import USE_IF_THERE
from ..erase_core.artefact.report import report_text
from ..erase_core.artefact.results import ResultStore
from ..erase_core.run.plan import cost_warning
from .families import trainable_family
from .host import ComfyDenoiser, left_out_of_training
from .live import LiveRun
from .messages import (
    all_shown,
    clear_progress_text,
    show_progress_text,
    shown,
    upstream_file,
    warn,
    warn_all,
    where_it_runs,
)
from .previews import Previewer
from .stores import language_store, result_store, unfinished_store

BAR = 1000  # length of the host's bar


def refuse_without_clip(clip) -> None:
    """A checkpoint may have no text encoder; its loader then gives nothing as CLIP.

    Raises:
        ValueError: no CLIP.
    """
    if clip is None:
        raise ValueError(
            "No CLIP is connected (the checkpoint has none). Concepts are words: connect the "
            "CLIP of a checkpoint loader or of a CLIP loader."
        )


@dataclass(frozen=True)
class Ran:
    """What came of a run.

    Attributes:
        erasure: what it gave.
        notes: how it came about, for the report and the node.
        ui: what a page shows at the node, also where the host has the result in its cache.
    """

    erasure: Erasure
    notes: list[str]
    ui: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, erasure: Erasure, meter: Meter, results: ResultStore) -> Ran:
        """With what is to be said of a run's end."""
        record, notes = erasure.record, []
        steps = record["settings"]["steps"]
        if meter.reused:
            notes.append(f"Taken from the store: trained on {record['created']}.")
        elif meter.resumed_at is not None:
            notes.append(f"Went on from step {meter.resumed_at} of an earlier run.")
        if not record["complete"] and not record["ended_by"]:
            notes.append(f"Stopped after {record['steps_done']} of {steps} steps and kept.")
            if results.written is not None:
                notes.append(f"It lies in {results.written}.")
            if meter.resumable:
                notes.append("Choose 'resume' as the stored result to go on from there.")
        return cls(erasure, notes)


def run_to_end(model, clip, settings: EraseSettings, hidden: Any, reuse: str = USE_IF_THERE) -> Ran:
    """One run of the engine on the host's MODEL and CLIP.

    Args:
        hidden: the node's hidden inputs, with its id and the graph.
        reuse: what to do about a stored result, see :func:`erase_core.erase`.
    """
    node_id = hidden.unique_id
    name = upstream_file(hidden.prompt, node_id, "model")
    results, unfinished = result_store(node_id), unfinished_store(node_id)
    show = _progress_of(model, settings, node_id)

    def report(progress: Progress) -> None:
        show(progress)
        live.progressed(progress)

    meter = Meter(report, preview=lambda preview: live.previewed(preview))
    live = LiveRun(node_id, *where_it_runs(), settings, Previewer(model), meter)
    images, size = 3 * settings.batch, settings.resolution
    try:
        # The host runs nodes in inference mode, where nothing can be trained.
        with live, torch.inference_mode(False), torch.enable_grad():
            with ComfyDenoiser(model, clip, name, images, size, settings.layers) as denoiser:
                given = (settings, denoiser, language_store(), meter, results, reuse, unfinished)
                erasure = erase(*given)
            ran = Ran.of(erasure, meter, results)
            live.ended_with(erasure, " ".join(ran.notes))
    finally:
        clear_progress_text(node_id)
    return replace(ran, ui={"concept_surgery": [all_shown(live.snapshot())]})


def _progress_of(model, settings: EraseSettings, node_id: str | None) -> Callable[[Progress], None]:
    """What shows at the node how far a run is, and warns of one that takes very long."""
    own_size = trainable_family(model).defaults.get("resolution", EraseSettings.resolution)
    bars: list[comfy.utils.ProgressBar] = []
    costly = ""

    def show(progress: Progress) -> None:
        nonlocal costly
        if not costly:
            costly = cost_warning(settings, progress.total, own_size)
            if costly:
                warn(costly, node_id)
        if not bars:
            bars.append(comfy.utils.ProgressBar(BAR))
        bars[0].update_absolute(round(progress.share * BAR), BAR)
        show_progress_text(f"{costly} {progress.stage}".strip(), progress.loss, node_id)

    return show


def report_of(
    ran: Ran,
    model,
    node_id: str | None,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> str:
    """The report of a run as text, after its warnings were given at the node.

    Args:
        ran: what came of it.
        notes: what the node itself has to say.
        warnings: what it warns of beside what the record does.
    """
    record = ran.erasure.record
    warn_all([*warnings, *record["warnings"]], node_id)
    return shown(report_text(record, [*ran.notes, *notes, *left_out_of_training(model)]))
