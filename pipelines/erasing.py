"""Erasing from a pipeline, with a progress bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..erase_core import EraseSettings, Meter, Progress, preset_settings
from ..erase_core import erase as erase_with
from ..erase_core.artefact.formats import LAYERS_KEY
from ..erase_core.artefact.language_store import LanguageStore
from ..erase_core.artefact.results import ResultStore
from ..erase_core.artefact.unfinished import UnfinishedStore
from ..erase_core.settings.texts import Concept, parse_concepts
from .adapter import PipelineDenoiser
from .erasure import Erasure
from .networks import family_of, network_of, unnamed_layers
from .refusals import refuse_unfit


def erase(
    pipe: Any,
    concepts: str | Sequence[str | Concept],
    replace_with: str = "",
    keep: str | Sequence[str] = (),
    preset: str = "balanced",
    *,
    progress: bool = True,
    cache: Path | str | None = None,
    meter: Meter | None = None,
    **settings: Any,
) -> Erasure:
    """Learn on a pipeline to draw something else in a concept's place, or nothing in particular.

    The pipeline is the same afterwards: put the erasure on it with :meth:`Erasure.applied`.

    Args:
        pipe: a text-to-image pipeline of diffusers.
        concepts: what to erase: "cat", "cat => dog", several in a list or one a line.
        replace_with: what is drawn instead, for concepts that don't name it themselves.
        keep: prompts whose pictures must not change, most important first.
        preset: "instant", "balanced" or "thorough".
        progress: whether a bar is shown.
        cache: a folder in which finished erasures and what was read of ordinary language are kept.
            The same call then trains once, and goes on from where it was interrupted.
        meter: what it costs and whether to stop; it reports in place of the bar.
        **settings: fields of :class:`erase_core.EraseSettings`, such as ``negative_prompts``,
            ``kind``, ``seed`` or ``resolution``; also ``distilled=True`` for Turbo, Lightning, LCM.

    Raises:
        PipelineError: a pipeline that can't be trained on as it is.
        SettingsError: a setting that can't work, a prompt that is too long.
        SubspaceError, GradientError, TrainingError, PredictionError: see :func:`erase_core.erase`.
    """
    refuse_unfit(pipe)
    chosen = settings_for(
        family_of(pipe).defaults, concepts, replace_with, keep, preset, **settings
    )
    language, results, unfinished = None, None, None
    if cache is not None:
        language = LanguageStore(Path(cache) / "language")
        results = ResultStore(Path(cache) / "results")
        unfinished = UnfinishedStore(Path(cache) / "unfinished")
    # Pipelines are often used in inference mode, where nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad(), _bar(progress and meter is None) as bar:
        denoiser = PipelineDenoiser(pipe, chosen.resolution, chosen.layers)
        found = erase_with(
            chosen, denoiser, language, meter or Meter(bar), results, unfinished=unfinished
        )
    layers = unnamed_layers(network_of(pipe), family_of(pipe), found.factors)
    record = {**found.record, LAYERS_KEY: layers} if layers else found.record
    return Erasure(found.bases, found.factors, record)


def settings_for(
    family: Mapping[str, Any],
    concepts: str | Sequence[str | Concept],
    replace_with: str = "",
    keep: str | Sequence[str] = (),
    preset: str = "balanced",
    **settings: Any,
) -> EraseSettings:
    """The settings of a run; the model's own size unless another is given.

    Args:
        family: what the model's family puts over the preset.

    Raises:
        SettingsError: a value that can't work.
        TypeError: a name that no setting has.
    """
    known = {field.name for field in dataclasses.fields(EraseSettings)} | {"distilled"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise TypeError(
            f"erase() has no setting {unknown[0]!r}. There are: {', '.join(sorted(known))}."
        )
    return preset_settings(
        preset,
        family=family,
        concepts=parse_concepts(concepts, replace_with),
        keep=keep,
        **settings,
    )


@contextmanager
def _bar(shown: bool) -> Iterator[Callable[[Progress], None]]:
    """What shows the progress of a run."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    with tqdm(total=1.0, disable=not shown, bar_format=form) as bar:

        def show(progress: Progress) -> None:
            loss = "" if progress.loss is None else f" (loss {progress.loss:.3f})"
            bar.set_description_str(progress.stage + loss, refresh=False)
            bar.update(max(0.0, progress.share - bar.n))

        yield show
        bar.update(1.0 - bar.n)
