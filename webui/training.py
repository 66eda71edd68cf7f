"""One run of the engine on the model that the host has loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..erase_core import EraseSettings, Erasure, Meter, Progress, erase
from ..erase_core.artefact.identity import USE_IF_THERE
from ..erase_core.run.meter import Preview
from ..erase_core.settings.families import Family
from . import host

JOB = "Concept Surgery"
# Settings of a run from the family of the model, which isn't known before its turn has come.
Choose = Callable[[Family], EraseSettings]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves.

    Attributes:
        stored: whether it was taken from the store.
        notes: what a person should know beside the record.
    """

    erasure: Erasure
    stored: bool = False
    notes: list[str] = field(default_factory=list)


def train(
    choose: Choose,
    report: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    reuse: str = USE_IF_THERE,
    preview: Callable[[Preview], None] | None = None,
) -> Outcome:
    """Train one erasure on the loaded model, in the host's queue.

    The model isn't changed: the LoRAs of the last prompt are taken out of it, and put back.

    Args:
        choose: gives the settings, once the model's family is known.
        report: told how far the run is; what it raises ends it.
        should_stop: True ends the run soon and keeps what was learned.
        reuse: what to do about a stored result.
        preview: given pictures of the run, as latents.

    Raises:
        InterruptedByUserError: the host's Interrupt was pressed.
        UnsupportedModelError, ModelChangedError: see there.
        whatever :func:`erase_core.erase` raises.
    """
    return host.in_turn(JOB, lambda: _train(choose, report, should_stop, reuse, preview))


def _train(
    choose: Choose,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    reuse: str,
    preview: Callable[[Preview], None] | None,
) -> Outcome:
    sd_model = host.loaded_model()

    def told(progress: Progress) -> None:
        host.check_interrupted()
        host.show_progress(progress.stage, progress.done, progress.total)
        if should_stop() or host.asked_to_stop():
            meter.stop()
        report(progress)

    meter = Meter(told, preview=preview)
    with host.where_gradients_are(), host.without_networks(sd_model):
        settings = choose(family_of_loaded(sd_model))
        images, size = 3 * settings.batch, settings.resolution
        with host.denoiser_of(sd_model, images, size, settings.layers) as denoiser:
            erasure = erase(
                settings,
                denoiser,
                host.language_store(),
                meter,
                host.result_store(),
                reuse,
                host.unfinished_store(),
            )
    return Outcome(erasure, meter.reused, _notes(sd_model, erasure, meter))


def family_of_loaded(sd_model: Any) -> Family:
    """The family of the loaded model.

    Raises:
        UnsupportedModelError: one that can't be trained on.
    """
    return host.denoiser_of(sd_model, 1, EraseSettings.resolution, None).known_family


def _notes(sd_model: Any, erasure: Erasure, meter: Meter) -> list[str]:
    notes = host.left_out(sd_model)
    if meter.reused:
        notes.insert(0, f"Taken from the store: trained on {erasure.record['created']}.")
    if meter.resumed_at is not None:
        notes.insert(0, f"Went on from step {meter.resumed_at} of an earlier run.")
    return notes
