"""The node that trains an erasure on the model that is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from comfy_api.v0_0_2 import io

from ..erase_core import KINDS, PRESETS, EraseSettings, Erasure, preset_settings
from ..erase_core.artefact.identity import REUSE, USE_IF_THERE
from ..erase_core.settings.families import Family, generic
from ..erase_core.settings.layers import LAYER_RULES
from ..erase_core.settings.prompts import prompt_pairs
from ..erase_core.settings.settings import FORMS, NULL_SCORES
from ..erase_core.settings.texts import SettingsError, parse_concepts
from .families import trainable_family
from .refusals import check_choice, refusal
from .runs import refuse_without_clip, report_of, run_to_end
from .schema import CATEGORY, ErasureType, compatible

AS_PRESET = -1
LINKED = "concept from a link"  # stands for a concept that isn't known yet
AUTO = "auto"  # as the model's family says
DISTILLED_MODEL = "distilled"
MODEL_TYPES = ("standard", DISTILLED_MODEL)
_ADVANCED = {"advanced": True, "optional": True}


class TrainErasure(io.ComfyNode):
    """Text in, ERASURE out. It returns no MODEL, so nothing can be applied twice by accident."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs as the host shows them."""
        return compatible(
            io.Schema,
            node_id="ConceptSurgeryTrain",
            display_name="Train Concept Erasure",
            category=CATEGORY,
            description=(
                "Learns to stop drawing something, from words alone, on the model that is loaded. "
                "The model itself is not changed: connect ERASURE to Apply Erased UNet."
            ),
            search_aliases=["erase concept", "unlearn", "remove concept", "ESD", "LECO", "UCE"],
            inputs=[*_main_inputs(), *_advanced_inputs()],
            outputs=[
                ErasureType.Output("erasure", display_name="ERASURE"),
                io.Custom("LOSS_MAP").Output("losses", display_name="losses"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(
        cls,
        erase: str | None = None,
        replace_with: str | None = None,
        keep: str | None = None,
        negative_prompts: str | None = None,
        kind: str | None = None,
        preset: str | None = None,
        model_type: str | None = None,
        form: str | None = None,
        layers: str | None = None,
        templates: str | None = None,
        null_score: str | None = None,
        steps: int | None = None,
        trajectories: int | None = None,
        resolution: int | None = None,
        stored_result: str | None = None,
    ) -> bool | str:
        """Refuse what can't work before anything runs. Linked values are checked when they come.

        The host checks the range of each number that isn't named here.
        """
        given = {
            "erase": LINKED if erase is None else erase,
            "replace_with": replace_with,
            "keep": keep,
            "negative_prompts": negative_prompts,
            "kind": kind,
            "preset": preset,
            "model_type": model_type,
            "form": form,
            "layers": layers,
            "templates": templates,
            "null_score": null_score,
            "steps": steps,
            "trajectories": trajectories,
            "resolution": resolution,
            "stored_result": stored_result,
        }
        try:
            prompt_pairs(settings_from_widgets({k: v for k, v in given.items() if v is not None}))
        except SettingsError as error:
            return refusal(error, cls)
        return True

    @classmethod
    def execute(cls, model, clip, **widgets: Any) -> io.NodeOutput:
        """Train, with the host's progress bar and cancel button."""
        refuse_without_clip(clip)
        settings = settings_from_widgets(widgets, trainable_family(model))
        reuse = widgets.get("stored_result", USE_IF_THERE)
        erasure, stored = run_to_end(model, clip, settings, cls.hidden, reuse)
        report = report_of(erasure, stored, model, cls.hidden.unique_id)
        return io.NodeOutput(erasure, {"loss": _loss_curve(erasure)}, report)


def settings_from_widgets(
    widgets: Mapping[str, Any], family: Family | None = None
) -> EraseSettings:
    """The engine's settings from the node's widgets; -1 leaves a value to the preset.

    Args:
        family: of the model; None where it isn't known yet.

    Raises:
        SettingsError: a value that can't work.
    """
    for name, choices in (("model_type", MODEL_TYPES), ("stored_result", REUSE)):
        check_choice(name, widgets.get(name, choices[0]), choices)
    numbers = {
        name: None if _is(AS_PRESET, widgets.get(name, AS_PRESET)) else widgets[name]
        for name in (
            "steps",
            "rank",
            "learning_rate",
            "protection",
            "stop_below",
            "batch",
            "trajectories",
            "captions",
        )
    }
    as_they_are = ["keep", "negative_prompts", "kind", "templates", "eta"]
    as_they_are += ["drift_weight", "keep_weight", "null_score"]
    chosen = {
        name: None if _is(AUTO, widgets.get(name, AUTO)) else widgets[name]
        for name in ("form", "layers")
    }
    defaults = family.defaults if family else {}
    other = generic("").defaults
    if family is None and chosen["form"] is None and chosen["layers"] == other["layers"]:
        defaults = other  # of the models that these layers are for
    return preset_settings(
        widgets.get("preset", "balanced"),
        distilled=widgets.get("model_type", MODEL_TYPES[0]) == DISTILLED_MODEL,
        family=defaults,
        resolution=None if _is(0, widgets.get("resolution", 0)) else widgets["resolution"],
        concepts=parse_concepts(widgets.get("erase"), widgets.get("replace_with")),
        seed=widgets.get("training_seed", 0),
        **{name: widgets.get(name) for name in as_they_are},
        **chosen,
        **numbers,
    )


def _is(standing_in: int | str, value: Any) -> bool:
    """Whether a widget leaves its value to the preset or the model; a link may bring anything."""
    return isinstance(value, int | float | str) and value == standing_in


def _loss_curve(erasure: Erasure) -> list[float]:
    """At least two values that differ, which the host's plot node needs.

    It begins with 1, nothing moved, and ends with the loss on held-out states, or where nothing
    was sampled with that of keys and values.
    """
    record = erasure.record
    held_out = record["measures"]["moved_held_out"]
    moved = (
        held_out["overall"]
        if held_out
        else min(concept["keys_and_values_moved"] for concept in record["concepts"])
    )
    return [1.0, *record["losses"], 1 - moved]


def _main_inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model to learn on. It is not changed."),
        io.Clip.Input("clip", tooltip="The text encoder that you also use for your prompts."),
        io.String.Input(
            "erase",
            multiline=True,
            placeholder="what to stop drawing, one a line: cat => dog",
            default="",
            tooltip=(
                "What the model must stop drawing, for example: cat. Several: one a line. Other "
                "names of one thing: cat | kitten. "
                "cat => dog says what to draw instead."
            ),
        ),
        io.String.Input(
            "replace_with",
            default="",
            tooltip=(
                "What to draw instead, for example: dog, for lines that don't say it with =>. "
                'Empty: nothing in particular, as if you had written "thing".'
            ),
        ),
        io.String.Input(
            "keep",
            multiline=True,
            placeholder="keep: prompts that must not change, one a line",
            default="",
            tooltip=(
                "Prompts whose pictures must not change at all, one a line, most important first. "
                "A handful stays exact; the report says which. Short prompts leave more room."
            ),
        ),
        io.String.Input(
            "negative_prompts",
            multiline=True,
            placeholder="negative prompts you use, one a line",
            default="",
            tooltip="Negative prompts you use, one a line. They stay exact, like the empty one.",
        ),
        io.Combo.Input(
            "kind",
            options=list(KINDS),
            default=KINDS[0],
            tooltip=(
                "A thing, a style, a person, or tags as anime models use them: decides the phrases "
                "it is learned from."
            ),
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default="balanced",
            tooltip=(
                "instant: seconds; nothing is sampled, so the report can't say how far the "
                "pictures go. balanced: about 200 evaluations of the model, and up to 900 where "
                "training helps. thorough: about 2,000, trained in any case."
            ),
        ),
        io.Int.Input(
            "training_seed",
            default=0,
            min=0,
            max=2**64 - 1,
            tooltip="Seed of the training. It stays as it is, so queueing twice trains once.",
        ),
    ]


def _advanced_inputs() -> list[Any]:
    preset = " -1: as the preset says."
    return [
        _combo(
            "model_type",
            MODEL_TYPES,
            "distilled: Turbo, Lightning, LCM, DMD2 and the like, which sample in a few steps "
            "at CFG 1. At CFG 1 negative prompts do nothing.",
        ),
        _combo(
            "form",
            [AUTO, *FORMS],
            "auto: as the model allows. hard: the empty prompt and the kept "
            "prompts can't move at all. soft: they are held by a penalty, as in the paper; needed "
            "to train other layers.",
        ),
        _combo(
            "layers",
            [AUTO, *LAYER_RULES],
            "What trains; auto: key-value on U-Nets, text-input on SD3 and Flux, prompt-fed on "
            "other architectures. Others need the soft form.",
        ),
        compatible(
            io.String.Input,
            "templates",
            multiline=True,
            placeholder="own phrases, one a line: a photo of {}",
            default="",
            tooltip=(
                "Your own phrases to learn from instead of those of the kind, one a line, with {} "
                "where the concept stands. After => the same phrase without it, if it isn't simply "
                "left out."
            ),
            **_ADVANCED,
        ),
        _int("steps", AS_PRESET, 10_000, "Optimiser steps." + preset),
        _int("rank", AS_PRESET, 256, "Rank of the change, at most." + preset),
        _float(
            "learning_rate",
            AS_PRESET,
            10.0,
            AS_PRESET,
            "Adam's step relative to the size of each matrix." + preset,
        ),
        _float(
            "eta",
            0.0,
            10.0,
            0.0,
            "Push beyond the replacement. Above 0, a negative prompt that names the concept draws "
            "it; leave at 0 unless traces remain.",
        ),
        _float(
            "protection",
            AS_PRESET,
            1e4,
            AS_PRESET,
            "How strongly prompts nobody named are held. Higher keeps more, erases less. "
            "-1: as strongly as still lets the concept move.",
        ),
        _float(
            "drift_weight", 0.0, 1e4, 1.0, "Soft form: weight on the drift of the empty prompt."
        ),
        _float("keep_weight", 0.0, 1e4, 1.0, "Soft form: weight on the drift of kept prompts."),
        _combo(
            "null_score",
            NULL_SCORES,
            "Soft form: whose prediction for the empty prompt the change is measured from: the "
            "original's (frozen), or that of the model in training, with (student) or without "
            "(detached) learning through it.",
        ),
        _float(
            "stop_below",
            AS_PRESET,
            1.0,
            AS_PRESET,
            "End early once less than this share is left to go on states it doesn't learn from; "
            "0 never does." + preset,
        ),
        _int("batch", AS_PRESET, 64, "States per step. 1 needs the least memory." + preset),
        _int("trajectories", AS_PRESET, 256, "Sampling runs to learn from." + preset),
        compatible(
            io.Int.Input,
            "resolution",
            default=0,
            min=0,
            max=4096,
            step=8,
            tooltip="Side of the training pictures. 0: the size the model was made for.",
            **_ADVANCED,
        ),
        _int(
            "captions",
            AS_PRESET,
            100_000,
            "Plain captions, and nearly as many words of the text encoder's own, that stand for "
            "the rest of the language." + preset,
        ),
        _combo(
            "stored_result",
            REUSE,
            "A finished training is kept on disk and used again where model, LoRAs, text "
            "encoder and all settings are the same. train again: replaces what is stored. "
            "use only: an error where nothing is stored, for batches that must not train.",
        ),
    ]


def _combo(name: str, options: Iterable[str], tooltip: str) -> Any:
    """An advanced choice; the first option is the default."""
    options = list(options)
    return compatible(
        io.Combo.Input, name, options=options, default=options[0], tooltip=tooltip, **_ADVANCED
    )


def _int(name: str, low: int, high: int, tooltip: str) -> Any:
    return compatible(
        io.Int.Input, name, default=low, min=low, max=high, tooltip=tooltip, **_ADVANCED
    )


def _float(name: str, low: float, high: float, default: float, tooltip: str) -> Any:
    return compatible(
        io.Float.Input,
        name,
        default=float(default),
        min=float(low),
        max=high,
        step=0.0005,
        tooltip=tooltip,
        **_ADVANCED,
    )
