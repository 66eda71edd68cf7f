"""From what a person typed and chose to settings, the same in every face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .families import Family
from .layers import RULE_DEFAULTS
from .settings import EraseSettings, preset_settings
from .texts import SettingsError, parse_concepts, refuse_unfinished

AS_PRESET = -1
AUTO = "auto"  # as the model's family says
DISTILLED_MODEL = "distilled"
MODEL_TYPES = ("standard", DISTILLED_MODEL)


def settings_of(widgets: Mapping[str, Any], family: Family | None = None) -> EraseSettings:
    """The engine's settings from what was typed and chosen; -1 leaves a value to the preset.

    Args:
        widgets: values by name: "erase", "replace_with", "training_seed", "model_type", and fields
            of :class:`EraseSettings`.
        family: of the model; None where it isn't known yet.

    Raises:
        SettingsError: a value that can't work.
    """
    check_choice("model_type", widgets.get("model_type", MODEL_TYPES[0]), MODEL_TYPES)
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
    as_they_are += ["keep_room", "drift_weight", "keep_weight", "null_score"]
    chosen = {
        name: None if _is(AUTO, widgets.get(name, AUTO)) else widgets[name]
        for name in ("form", "layers")
    }
    defaults = dict(family.defaults) if family else {}
    if (family is None or not family.readers_known) and isinstance(chosen["layers"], str):
        defaults |= RULE_DEFAULTS.get(chosen["layers"], {})
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


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a choice that isn't there, which some hosts let through.

    Raises:
        SettingsError: another value.
    """
    if not isinstance(value, str) or value not in choices:
        raise SettingsError(
            f"Unknown {name.replace('_', ' ')} {value!r}. Choose one of: {', '.join(choices)}.",
            name,
        )
