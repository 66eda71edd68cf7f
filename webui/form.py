"""From what was typed at the tab, or sent to the API, to the engine's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..erase_core import EraseSettings, SettingsError
from ..erase_core.artefact.identity import REUSE, USE_IF_THERE
from ..erase_core.settings.families import Family
from ..erase_core.settings.texts import distinct_lines, label
from ..erase_core.settings.widgets import check_choice, settings_of

REUSE_INPUT = "stored_result"
MAIN = ("erase", "replace_with", "keep", "negative_prompts", "kind", "preset", "training_seed")
WHOLE = ("training_seed", "steps", "rank", "batch", "trajectories", "captions", "resolution")
NUMBERS = (
    "learning_rate",
    "eta",
    "protection",
    "keep_room",
    "drift_weight",
    "keep_weight",
    "stop_below",
)
CHOICES = ("model_type", "form", "layers", "null_score", "templates", REUSE_INPUT)
INPUTS = (*MAIN, *(name for name in (*WHOLE, *NUMBERS, *CHOICES) if name not in MAIN))
_PROMPTS = ("keep", "negative_prompts")


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a form, converted, of which it is known that they can work.

    Args:
        given: values by name, see :data:`INPUTS`; what is missing is as the preset says.

    Raises:
        SettingsError: an unknown name, or a value that can't work.
    """
    unknown = sorted(set(map(str, given)) - set(INPUTS))
    if unknown:
        raise SettingsError(
            f"Unknown input {unknown[0]!r}. There are: {', '.join(INPUTS)}.", unknown[0]
        )
    values = {name: value for name, value in given.items() if value is not None}
    for kind, names in ((int, WHOLE), (float, NUMBERS)):
        values |= {name: _number(name, values[name], kind) for name in names if name in values}
    values |= {name: _prompts(name, values[name]) for name in _PROMPTS if name in values}
    check_choice(REUSE_INPUT, values.get(REUSE_INPUT, USE_IF_THERE), REUSE)
    settings_of(values)
    return values


def chosen(values: Mapping[str, Any], family: Family) -> EraseSettings:
    """The settings for a family of models."""
    return settings_of(values, family)


def reuse_of(values: Mapping[str, Any]) -> str:
    """What to do about a stored result."""
    return str(values.get(REUSE_INPUT, USE_IF_THERE))


def _number(name: str, value: Any, kind: type[int] | type[float]) -> int | float:
    """A number; pages send whole ones as text, or with a fraction of 0."""
    what = "a whole number" if kind is int else "a number"
    wrong = SettingsError(f"{label(name)} must be {what}, not {value!r:.60}.", name)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if kind is int and isinstance(value, float) and number != value:
        raise wrong
    return number


def _prompts(name: str, given: Any) -> list[str]:
    """Prompts as the text encoder is given them: one that doesn't change while it is drawn.

    Raises:
        SettingsError: one that does, or has tags in it.
    """
    lines = distinct_lines(name, given)
    for line in lines:
        _refuse_what_isnt_one_prompt(name, line)
    return list(lines)


def _refuse_what_isnt_one_prompt(name: str, line: str) -> None:
    from modules import extra_networks, prompt_parser

    _, tags = extra_networks.parse_prompt(line)
    if tags:
        raise SettingsError(
            f"{line!r:.80} under {label(name)} has a tag in it, <{next(iter(tags))}:...>. Tags "
            "aren't read by the text encoder, and the LoRAs of your prompts aren't in the model "
            "while it is trained on. Leave the tag out.",
            name,
        )
    (schedule,) = prompt_parser.get_learned_conditioning_prompt_schedules([line], 20)
    texts: Sequence[str] = [text for _, text in schedule]
    if len(texts) > 1:
        raise SettingsError(
            f"{line!r:.80} under {label(name)} changes while a picture is drawn, so it is several "
            f"prompts. Write each on a line of its own: {', '.join(map(repr, texts[:2]))}",
            name,
        )
    if " AND " in line:
        raise SettingsError(
            f"{line!r:.80} under {label(name)} is several prompts joined by AND. Write each on a "
            "line of its own.",
            name,
        )
