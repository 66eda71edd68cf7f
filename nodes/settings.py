"""From widgets to settings, and the optional node with those that few people change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from comfy_api.v0_0_2 import io

from ..erase_core import PRESETS, EraseSettings, SettingsError
from ..erase_core.artefact.identity import REUSE
from ..erase_core.settings.families import Family
from ..erase_core.settings.layers import LAYER_RULES
from ..erase_core.settings.settings import FORMS, NULL_SCORES
from ..erase_core.settings.texts import label
from ..erase_core.settings.widgets import AS_PRESET, AUTO, check_choice, settings_of
from .schema import CATEGORY, SettingsType, compatible

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
    """The engine's settings from the node's widgets, see :func:`widgets.settings_of`.

    Raises:
        SettingsError: a value that can't work.
    """
    check_choice("stored_result", widgets.get("stored_result", REUSE[0]), REUSE)
    return settings_of(widgets, family)


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
            "What trains; auto: key-value on U-Nets, text-input on SD3 and Flux, readers on other "
            "architectures: the layers that read the prompt alone, found by trying. first-readers: "
            "of those the first after the text encoder. Others need the soft form.",
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
        _float(
            "keep_room",
            (0.02, 1.0),
            EraseSettings.keep_room,
            "Hard form: the share of a concept that prompts kept exactly must leave to it. With "
            "less room more of them are exact, and other words change more; the report says how "
            "much. Below 0.1 they changed a lot on one of two models.",
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
