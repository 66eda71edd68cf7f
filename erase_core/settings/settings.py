"""What the user asked for: one frozen, validated settings object."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .layers import LAYER_RULES, PROMPT_RULES
from .texts import (
    ARROW,
    KINDS,
    Concept,
    SettingsError,
    concept_values,
    distinct_lines,
    label,
    parse_concepts,
    plain_text,
)

FORMS = ("hard", "soft")
NULL_SCORES = ("frozen", "student", "detached")
DRIVERS = ("both", "erased", "alternative")
WEIGHTINGS = ("output", "relative", "image")
LEAST_TRAJECTORIES = 2  # of each concept, where anything trains
MOST_PROMPTS = 5000  # to learn from; 100 concepts in the phrases of their kind are 1,200


@dataclass(frozen=True)
class EraseSettings:
    """One run, as asked for.

    Texts are stripped on construction and the prompt lists lose blank and repeated lines.

    Attributes:
        concepts: what to erase: :class:`Concept` objects, or text with one a line, where
            ``cat => dog`` names an alternative.
        keep: prompts whose pictures must stay as they are, most important first.
        negative_prompts: negative prompts the user samples with; kept exact like the null prompt.
        kind: a key of :data:`KINDS`, of the concepts that name none themselves; decides the prompt
            templates.
        templates: the user's own, each with ``{}`` where the concept stands, and after ``=>`` the
            same prompt without it, if it isn't simply left out; empty for those of the kind.
        form: "hard" holds the null prompt and the keep prompts by construction; "soft" is the
            paper's penalty, and works on any layers.
        layers: which matrices train: a key of :data:`layers.LAYER_RULES` or a pattern.
        eta: push beyond the alternative, in multiples of g(a) - g(e). Turns the concept in a
            *negative* prompt around, see :func:`guidance.surgical_target`.
        rank: most columns of R for one concept.
        protection: weight of the ridge on ordinary language, in the closed form that training
            starts from and in training; None chooses the strongest that still lets the concepts
            move far enough.
        drift_weight: lambda of the soft form, on the drift of the unconditional score.
        keep_weight: mu of the soft form, on the drift of the keep and negative prompts.
        null_score: which unconditional score stands in the first term of the soft form, see
            :func:`guidance.surgery_loss`.
        weighting: w(sigma) of the loss, see :class:`guidance.SigmaWeight`.
        warm_start: whether training starts from the closed form, else from no change at all.
        keep_room: least share of each concept's edit that exact keep prompts must leave.
        steps: optimiser steps; 0 is the closed form alone (instant form).
        trial_steps: steps after which training must have helped on held-out states, else the closed
            form stays as it is; 0 trains in any case.
        batch: states per optimiser step.
        learning_rate: Adam's step relative to the root mean square of each matrix.
        stop_below: end training early once the held-out residual, 1 - moved, has been below this
            twice in a row; 0 never does.
        trajectories: frozen trajectories in the pool; a fifth of them is held out. 0 samples
            nothing, so that nothing is trained or measured on predictions either.
        driven_by: which prompt of a pair drives a trajectory; "both" in turn.
        sampling_steps: sampler steps of each trajectory.
        guidance_scale: guidance scale of the trajectories (1 for distilled models).
        resolution: side of the training pictures in pixels.
        captions: how many plain captions stand for ordinary language.
        seed: seed of noise, templates and draws.

    Raises:
        SettingsError: on any value that can't work.
    """

    # Where a reason stands with a default, it was measured on a small model that draws, one
    # setting at a time (benchmarks/erasure/decisions.md). The others are convention.
    concepts: tuple[Concept, ...]
    keep: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    kind: str = "object"
    templates: tuple[str, ...] = ()
    # The soft form erases no more, costs two and a half times as much, and moves the null prompt.
    form: str = "hard"
    layers: str = "key-value"
    # Above it the guidance ends elsewhere than asked, and a negative prompt with the concept
    # draws it.
    eta: float = 0.0
    # All concepts were gone from 4 on; 32 and 64 found nothing more.
    rank: int = 16
    # Fixed ridges that were better on the erasures they were chosen on were no better on others.
    protection: float | None = None
    # At .1, two to three times as many keep prompts were exact on two models. On the emoji other
    # words changed by a hundredth more, on the icons by three (benchmarks/unnamed/exactness.py).
    keep_room: float = 0.25
    # 0 moves the null prompt by .4 %, 1 by .3, 10 by .2: none comes near the hard form.
    drift_weight: float = 1.0
    keep_weight: float = 1.0
    # The others move the null prompt no less and erase no more.
    null_score: str = "frozen"
    weighting: str = "output"
    # From no change, 192 steps moved two thirds of the guidance and erased nothing.
    warm_start: bool = True
    # 12 did as well there, where the network is small; 48 leave room for those that aren't.
    steps: int = 48
    trial_steps: int = 5
    batch: int = 2
    # From .0003 to .01 there is no difference.
    learning_rate: float = 0.003
    stop_below: float = 0.0
    trajectories: int = 14
    # Either alone does nearly as well; both see the states of what is asked and of what is drawn.
    driven_by: str = "both"
    sampling_steps: int = 9
    # At 1 the states that the edited model itself comes to are less well reached.
    guidance_scale: float = 5.0
    resolution: int = 512
    # With 50 a tenth of what nobody named was lost; with 200 it changed by a fifth more.
    captions: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", parse_concepts(self.concepts))
        for name in ("kind", "form", "layers", "null_score", "weighting", "driven_by"):
            object.__setattr__(self, name, plain_text(name, getattr(self, name)))
        for name in ("keep", "negative_prompts", "templates"):
            object.__setattr__(self, name, distinct_lines(name, getattr(self, name)))
        self._check_choices()
        self._check_numbers()
        self._check_together()

    def kind_of(self, concept: Concept) -> str:
        """The concept's own kind, or that of the settings."""
        return concept.kind or self.kind

    @property
    def samples(self) -> bool:
        """Whether the run makes predictions at all: a pool to train on, to check on, or both."""
        return self.trajectories > 0

    def _check_choices(self) -> None:
        for name, choices in _CHOICES:
            if getattr(self, name) not in choices:
                raise SettingsError(
                    f"Unknown {label(name)} {getattr(self, name)!r}. "
                    f"Choose one of: {', '.join(choices)}.",
                    name,
                )
        if self.layers not in LAYER_RULES and "*" not in self.layers:
            raise SettingsError(
                f"Unknown layers {self.layers!r}. Choose one of: {', '.join(LAYER_RULES)}; or give "
                "a pattern with *, such as *_attn2_to_v.",
                "layers",
            )
        names = sum(len(concept.names) for concept in self.concepts)
        pairs = len(self.templates) * names
        if pairs > MOST_PROMPTS:
            raise SettingsError(
                f"{len(self.templates)} templates of {names} concepts are {pairs:,} "
                f"prompts to learn from, and {MOST_PROMPTS:,} are the most. Take templates out.",
                "templates",
            )
        for template in self.templates:
            if "{}" not in template.split(ARROW)[0]:
                raise SettingsError(
                    f"The template {template!r} has no {{}} where the concept stands. Write for "
                    "example: a photo of {}",
                    "templates",
                )

    def _check_numbers(self) -> None:
        for name, low, high in _INTEGER_RANGES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise SettingsError(f"{label(name)} must be a whole number, not {value!r}.", name)
            _check_range(name, value, low, high)
        for name, low, high in _FLOAT_RANGES:
            value = getattr(self, name)
            if name == "protection" and value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise SettingsError(f"{label(name)} must be a finite number, not {value!r}.", name)
            _check_range(name, value, low, high)
        if self.resolution % 8:
            raise SettingsError(
                f"resolution must be a multiple of 8, not {self.resolution}. "
                f"Try {self.resolution // 8 * 8 or 8}.",
                "resolution",
            )

    def _check_together(self) -> None:
        if self.form == "hard" and self.layers not in PROMPT_RULES:
            raise SettingsError(
                f"The hard form works on matrices that read the prompt and nothing else "
                f"({', '.join(PROMPT_RULES)}), not on {self.layers!r}. Choose the soft form for "
                "other layers.",
                "form",
            )
        if self.form == "soft" and self.steps == 0:
            raise SettingsError(
                "The soft form has no instant variant: it learns by training. Give it at least one "
                "step, or choose the hard form.",
                "steps",
            )
        if not self.steps:
            return
        needed = LEAST_TRAJECTORIES * len(self.concepts)
        if self.trajectories < needed:
            raise SettingsError(
                f"Training needs at least {LEAST_TRAJECTORIES} trajectories for each concept, one "
                f"to train on and one to check on: {needed} for {len(self.concepts)}, not "
                f"{self.trajectories}. Raise them, or set steps to 0 for the instant form.",
                "trajectories",
            )

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, for the record of an erasure.

        The room beside kept prompts is left out where it is the usual one: it was no setting once,
        and results that were stored then are found by these values.
        """
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }
        if self.keep_room == type(self).keep_room:
            del values["keep_room"]
        values["concepts"] = [concept_values(concept) for concept in self.concepts]
        return values


# Instant samples nothing, so it has nothing to measure predictions on. Balanced adds training and
# the report within 900 predictions. The judge of the small model sees no difference between them,
# nor from thorough, which is there for models that are harder to move.
PRESETS: dict[str, dict[str, Any]] = {
    "instant": {"steps": 0, "trajectories": 0},
    "balanced": {},
    "thorough": {"steps": 160, "trial_steps": 0, "trajectories": 24, "sampling_steps": 12},
}
SOFT_PRESETS: dict[str, dict[str, Any]] = {
    "balanced": {"steps": 80, "trial_steps": 0},
    "thorough": {"steps": 240, "trial_steps": 0},
}
# What another concept in the same run adds; a quarter of a run of its own.
MORE_PER_CONCEPT = 0.25
# A distilled model samples in a few steps without guidance: the null prompt isn't used.
DISTILLED: dict[str, Any] = {"guidance_scale": 1.0, "sampling_steps": 4}


def preset_settings(
    preset: str,
    *,
    distilled: bool = False,
    family: Mapping[str, Any] | None = None,
    **values: Any,
) -> EraseSettings:
    """Settings of a named preset, with every given value that is not None put over it.

    Args:
        preset: a key of :data:`PRESETS`.
        distilled: whether the model is a distilled one (Turbo, Lightning, LCM, DMD2).
        family: what the model's family puts over the preset, see :mod:`families`.
        **values: fields of :class:`EraseSettings`; ``concepts`` is required, None means
            "as the preset says".

    Raises:
        SettingsError: unknown preset, or a value that can't work.
    """
    if preset not in PRESETS:
        raise SettingsError(
            f"Unknown preset {preset!r}. Choose one of: {', '.join(PRESETS)}.", "preset"
        )
    given = {name: value for name, value in values.items() if value is not None}
    chosen = dict(PRESETS[preset])
    if "steps" in given:  # who asks for steps gets them
        chosen["trial_steps"] = 0
    if {**(family or {}), **given}.get("form") == "soft":
        chosen |= SOFT_PRESETS.get(preset, {})
    chosen |= family or {}
    if distilled:
        chosen |= DISTILLED
    concepts = parse_concepts(given.get("concepts"))
    growth = 1 + MORE_PER_CONCEPT * (len(concepts) - 1)
    for name in ("steps", "trajectories"):
        chosen[name] = math.ceil(chosen.get(name, getattr(EraseSettings, name)) * growth)
    return EraseSettings(**{**chosen, **given, "concepts": concepts})


_CHOICES = (
    ("kind", KINDS),
    ("form", FORMS),
    ("null_score", NULL_SCORES),
    ("weighting", WEIGHTINGS),
    ("driven_by", DRIVERS),
)
_INTEGER_RANGES: tuple[tuple[str, float, float], ...] = (
    ("rank", 1, 256),
    ("steps", 0, 10_000),
    ("trial_steps", 0, 10_000),
    ("batch", 1, 64),
    ("trajectories", 0, 1024),
    ("sampling_steps", 2, 200),
    ("resolution", 8, 4096),
    ("captions", 8, 100_000),
    ("seed", 0, 2**64 - 1),
)
_FLOAT_RANGES = (
    ("eta", 0.0, 10.0),
    ("protection", 0.0, 1e4),
    ("keep_room", 0.02, 1.0),
    ("drift_weight", 0.0, 1e4),
    ("keep_weight", 0.0, 1e4),
    ("learning_rate", 1e-6, 10.0),
    ("stop_below", 0.0, 1.0),
    ("guidance_scale", 0.0, 100.0),
)
_ADVICE = {
    "steps": "48 is the balanced preset's choice, 0 is the instant form.",
    "rank": "16 is usual; more only helps when the report says that the concept moved too little.",
    "keep_room": "0.25 is usual; with less, more is kept exactly and other words change more.",
    "eta": "0 moves to the alternative, 1 pushes as far again beyond it.",
    "learning_rate": "0.003 is usual; above 0.005 the start is undone.",
    "stop_below": "0.03 is usual, 0 trains all steps.",
}


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        advice = _ADVICE.get(name, "")
        text = f"{label(name)} must be between {low:g} and {high:g}, not {value!r}. {advice}"
        raise SettingsError(text.strip(), name)
