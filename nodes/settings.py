"""From widgets to settings, and the optional node with those that few people change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from comfy_api.v0_0_2 import io

from ..erase_core import PRESETS, EraseSettings, SettingsError, preset_settings
from ..erase_core.artefact.identity import REUSE
from ..erase_core.settings.families import Family, generic
from ..erase_core.settings.layers import LAYER_RULES
from ..erase_core.settings.settings import FORMS, NULL_SCORES
from ..erase_core.settings.texts import label, parse_concepts, refuse_unfinished
from .refusals import check_choice
from .schema import CATEGORY, SettingsType, compatible

AS_PRESET = -1
AUTO = "auto"  # as the model's family says
DISTILLED_MODEL = "distilled"
MODEL_TYPES = ("standard", DISTILLED_MODEL)
TITLE = "Erasure Settings"
_OPTIONAL = {"optional": True}


class ErasureSettings(io.ComfyNode):
    """Expert values in, one wire for Train Concept Erasure out.

    What can't work is refused by that node, which knows what it is wanted for, and said at the
    input here that is wrong. The host checks the range of each number.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs as the host shows them."""
        return compatible(
            io.Schema,
            node_id="ConceptSurgerySettings",
            display_name=TITLE,
            category=CATEGORY,
            description=(
                "The numbers behind Train Concept Erasure, for who wants to change them. Left as "
                "they are they change nothing, so the node isn't needed."
            ),
            inputs=_inputs(),
            outputs=[SettingsType.Output("settings", display_name="SETTINGS")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        """The values that aren't left to preset and model; links may have brought any."""
        chosen = expert_values(values)
        refuse_impossible(chosen)
        return io.NodeOutput(chosen)


def refuse_impossible(values: Mapping[str, Any]) -> None:
    """Refuse values with which no run of any preset can work.

    Raises:
        SettingsError: as the balanced preset says it.
    """
    problems = []
    for preset in sorted(PRESETS, key="balanced".__ne__):
        try:
            settings_from_widgets({"erase": "cat", "preset": preset, **values})
        except SettingsError as error:
            problems.append(error)
    if len(problems) == len(PRESETS):
        raise problems[0]


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
    if not widgets.get("replace_with"):  # else a bare arrow excepts its line from that
        refuse_unfinished(widgets.get("erase"))
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


def expert_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The expert values among the inputs of a graph, converted as the host converts widgets.

    Args:
        given: inputs by name; others, and links, are left out.

    Raises:
        SettingsError: a value that can't be converted.
    """
    return {
        name: _converted(name, given[name], kind)
        for name, kind in EXPERT.items()
        if given.get(name) is not None
    }


def _converted(name: str, value: Any, kind: Callable[[Any], Any]) -> Any:
    if kind is str:
        return value  # which is checked for being text
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        what = "a whole number" if kind is int else "a number"
        raise SettingsError(f"{label(name)} must be {what}, not {value!r}.", name) from None


def _inputs() -> list[Any]:
    preset = " -1: as the preset says."
    return [
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
        io.String.Input(
            "templates",
            multiline=True,
            placeholder="own phrases, one a line: a photo of {}",
            default="",
            tooltip=(
                "Your own phrases to learn from instead of those of the kind, one a line, with a "
                "pair of curly brackets where the concept stands. After => the same phrase "
                "without it, if it isn't simply "
                "left out."
            ),
            **_OPTIONAL,
        ),
        _int("steps", 10_000, "Optimiser steps." + preset),
        _int("rank", 256, "Rank of the change, at most." + preset),
        _float(
            "learning_rate",
            (AS_PRESET, 10.0),
            AS_PRESET,
            "Adam's step relative to the size of each matrix." + preset,
        ),
        _float(
            "eta",
            (0.0, 10.0),
            0.0,
            "Push beyond the replacement. Above 0, a negative prompt that names the concept draws "
            "it; leave at 0 unless traces remain.",
        ),
        _float(
            "protection",
            (AS_PRESET, 1e4),
            AS_PRESET,
            "How strongly prompts nobody named are held. Higher keeps more, erases less. "
            "-1: as strongly as still lets the concept move.",
        ),
        *_soft_inputs(),
        _float(
            "stop_below",
            (AS_PRESET, 1.0),
            AS_PRESET,
            "End early once less than this share is left to go on states it doesn't learn from; "
            "0 never does." + preset,
        ),
        _int(
            "batch",
            64,
            "States per step. 1 needs the least memory." + preset,
        ),
        _int(
            "trajectories",
            256,
            "Sampling runs to learn from." + preset,
        ),
        io.Int.Input(
            "resolution",
            default=0,
            min=0,
            max=4096,
            step=8,
            tooltip="Side of the training pictures. 0: the size the model was made for.",
            **_OPTIONAL,
        ),
        _int(
            "captions",
            100_000,
            "Plain captions, and nearly as many words of the text encoder's own, that stand for "
            "the rest of the language." + preset,
        ),
    ]


def _soft_inputs() -> list[Any]:
    return [
        _float(
            "drift_weight",
            (0.0, 1e4),
            1.0,
            "Soft form: weight on the drift of the empty prompt.",
        ),
        _float(
            "keep_weight",
            (0.0, 1e4),
            1.0,
            "Soft form: weight on the drift of kept prompts.",
        ),
        _combo(
            "null_score",
            NULL_SCORES,
            "Soft form: whose prediction for the empty prompt the change is measured from: the "
            "original's (frozen), or that of the model in training, with (student) or without "
            "(detached) learning through it.",
        ),
    ]


def _combo(name: str, options: Iterable[str], tooltip: str) -> Any:
    """A choice; the first option is the default."""
    options = list(options)
    return io.Combo.Input(
        name,
        options=options,
        default=options[0],
        tooltip=tooltip,
        **_OPTIONAL,
    )


def _int(name: str, high: int, tooltip: str) -> Any:
    return io.Int.Input(
        name,
        default=AS_PRESET,
        min=AS_PRESET,
        max=high,
        tooltip=tooltip,
        **_OPTIONAL,
    )


def _float(name: str, limits: tuple[float, float], default: float, tooltip: str) -> Any:
    return io.Float.Input(
        name,
        default=float(default),
        min=float(limits[0]),
        max=float(limits[1]),
        step=0.0005,
        tooltip=tooltip,
        **_OPTIONAL,
    )


_TYPES = ((io.Int.Input, int), (io.Float.Input, float))
# What is set here, with how the host converts it. They once stood on Train Concept Erasure.
EXPERT: dict[str, Callable[[Any], Any]] = {
    one.id: next((kind for made, kind in _TYPES if isinstance(one, made)), str) for one in _inputs()
}
