"""Running the engine inside a node, with the host's progress bar and cancel button."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.utils
import torch

from ..erase_core import EraseSettings, Erasure, Meter, Progress, erase
from ..erase_core.artefact.identity import USE_IF_THERE
from ..erase_core.artefact.report import report_text
from ..erase_core.run.plan import cost_warning
from .families import trainable_family
from .host import ComfyDenoiser, left_out_of_training
from .messages import show_progress_text, shown, upstream_file, warn, warn_all
from .stores import language_store, result_store


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


def run_to_end(
    model, clip, settings: EraseSettings, hidden: Any, reuse: str = USE_IF_THERE
) -> tuple[Erasure, bool]:
    """One run of the engine on the host's MODEL and CLIP.

    Args:
        hidden: the node's hidden inputs, with its id and the graph.
        reuse: what to do about a stored result, see :func:`erase_core.erase`.

    Returns:
        The erasure, and whether it was taken from the store.
    """
    node_id = hidden.unique_id
    name = upstream_file(hidden.prompt, node_id, "model")
    results = result_store(node_id)
    meter = Meter(_progress_of(model, settings, node_id))
    images, size = 3 * settings.batch, settings.resolution
    # The host runs nodes in inference mode, where nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        with ComfyDenoiser(model, clip, name, images, size, settings.layers) as denoiser:
            erasure = erase(settings, denoiser, language_store(), meter, results, reuse)
    return erasure, meter.reused


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
        total = max(1, progress.total)  # the instant form plans no evaluation at all
        if not bars:
            bars.append(comfy.utils.ProgressBar(total))
        bars[0].update_absolute(progress.done, total)
        show_progress_text(f"{costly} {progress.stage}".strip(), progress.loss, node_id)

    return show


def report_of(
    erasure: Erasure,
    stored: bool,
    model,
    node_id: str | None,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> str:
    """The report of a run as text, after its warnings were given at the node.

    Args:
        stored: whether it was taken from the store.
        notes: what the node itself has to say.
        warnings: what it warns of beside what the record does.
    """
    record = erasure.record
    warn_all([*warnings, *record["warnings"]], node_id)
    notes = [*notes, *left_out_of_training(model)]
    if stored:
        notes.insert(0, f"Taken from the store: trained on {record['created']}.")
    return shown(report_text(record, notes))
