"""What is asked of the host around a run: its model, its queue, its progress, its folders."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..erase_core.artefact.language_store import LanguageStore
from ..erase_core.artefact.results import ResultStore
from ..erase_core.artefact.unfinished import UnfinishedStore
from . import a1111, forge
from .denoiser import WebuiDenoiser
from .errors import InterruptedByUserError, UnsupportedModelError

Result = TypeVar("Result")
OWN_FOLDER = "concept_surgery"
CHEAP = 2  # the host's number for the quickest of its ways to look into a latent
_NO_PICTURE = (ImportError, AttributeError, RuntimeError, TypeError, ValueError)


def is_forge(sd_model: Any) -> bool:
    """Whether the host is Forge or one of its kin, by what its model carries."""
    return getattr(sd_model, "forge_objects", None) is not None


def loaded_model() -> Any:
    """The host's model, loaded if it isn't yet.

    Raises:
        UnsupportedModelError: the host has none.
    """
    from modules import sd_models, shared

    reload = getattr(sd_models, "forge_model_reload", None)
    if reload is not None:  # Forge loads when the first picture is drawn
        try:
            reload()
        except (KeyError, ValueError) as error:
            raise UnsupportedModelError(
                f"The host has no model to train on ({error}). Choose a checkpoint at the top of "
                "the page, and train then."
            ) from error
    sd_model = shared.sd_model
    if sd_model is None or not (is_forge(sd_model) or hasattr(sd_model, "model")):
        raise UnsupportedModelError(
            "The host has no model to train on. Choose a checkpoint at the top of the page, and "
            "train then."
        )
    skip = getattr(sd_model, "set_clip_skip", None)
    if skip is not None:
        skip(int(getattr(shared.opts, "CLIP_stop_at_last_layers", 1)))
    return sd_model


def current_model() -> Any:
    """The model that the host has now, without loading any."""
    from modules import sd_models

    return sd_models.model_data.sd_model


def without_networks(sd_model: Any) -> contextlib.AbstractContextManager[None]:
    """Inside, the LoRAs of the last prompt are out of the model; afterwards they are in again."""
    return (forge if is_forge(sd_model) else a1111).without_networks(sd_model)


def left_out(sd_model: Any) -> list[str]:
    """What the host or its extensions add that training did not run, in words."""
    found = (forge if is_forge(sd_model) else a1111).left_out(sd_model)
    return [f"Training ran without {what}." for what in found]


def denoiser_of(sd_model: Any, images: int, resolution: int, layers: str | None) -> WebuiDenoiser:
    """The adapter for this kind of host.

    Raises:
        UnsupportedModelError, LayerRuleError: see :class:`denoiser.WebuiDenoiser`.
    """
    kind = forge.ForgeDenoiser if is_forge(sd_model) else a1111.A1111Denoiser
    return kind(sd_model, current_model, images, resolution, layers, check_interrupted)


def check_interrupted() -> None:
    """Raise what a run ends with when the host's Interrupt was pressed.

    Raises:
        InterruptedByUserError: it was.
    """
    from modules import shared

    if shared.state.interrupted:
        raise InterruptedByUserError("Interrupted. Nothing was kept, and the model is as it was.")


def asked_to_stop() -> bool:
    """Whether the host's Skip, or the first press of its Interrupt, asks to end soon."""
    from modules import shared

    return bool(shared.state.skipped or getattr(shared.state, "stopping_generation", False))


def in_turn(job: str, work: Callable[[], Result]) -> Result:
    """Do something that uses the model: in the host's queue, under its progress, in its thread.

    Args:
        job: what the host calls it.

    Raises:
        whatever ``work`` raises.
    """
    from modules import shared
    from modules.call_queue import queue_lock

    with queue_lock:
        shared.state.begin(job=job)
        try:
            return _in_hosts_thread(work)
        finally:
            shared.state.end()
            shared.state.interrupted = shared.state.skipped = False


def _in_hosts_thread(work: Callable[[], Result]) -> Result:
    """Forge moves models in one thread alone, which swallows errors and dies of interrupts."""
    try:
        from modules_forge import main_thread
    except ImportError:
        return work()
    if not hasattr(main_thread, "run_and_wait_result"):
        return work()
    done: Future[Result] = Future()

    def with_outcome() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # raised again where it is waited for
            done.set_exception(error)

    main_thread.run_and_wait_result(with_outcome)
    return done.result()


@contextlib.contextmanager
def where_gradients_are() -> Iterator[None]:
    """Hosts may run what they are asked for in inference mode, where nothing can be trained."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def show_progress(stage: str, done: int, total: int) -> None:
    """Tell the host how far the run is; its API and its page then show it."""
    from modules import shared

    state = shared.state
    state.job_count, state.job_no = 1, 0
    state.sampling_steps, state.sampling_step = max(1, total), min(done, max(1, total))
    state.textinfo = stage


def data_folder() -> Path:
    """Where finished results and what was read of ordinary language lie."""
    from modules import paths

    return Path(paths.data_path) / OWN_FOLDER


def result_store() -> ResultStore:
    """Finished erasures, in ComfyUI's format."""
    return ResultStore(data_folder() / "results")


def language_store() -> LanguageStore:
    """What was read of ordinary language, by text encoder."""
    return LanguageStore(data_folder() / "language")


def unfinished_store() -> UnfinishedStore:
    """What runs leave that ended before their time."""
    return UnfinishedStore(data_folder() / "unfinished")


def picture_of(latent: Tensor) -> Any:
    """A latent (c, h, w) as a small picture, and the host's own preview; None if it can't be."""
    from modules import shared

    try:
        from modules import sd_samplers_common

        with torch.no_grad():
            picture = sd_samplers_common.single_sample_to_image(latent, CHEAP)
    except _NO_PICTURE as error:  # a preview is worth no training
        logging.info("Concept Surgery: no preview can be drawn: %s", error)
        return None
    shared.state.assign_current_image(picture)
    return picture
