"""What the record of an erasure holds, and what is amiss with one that was read from a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..version import VERSION

# What became of the training: there was none, the closed form moved far enough, a few steps didn't
# help, the caller stopped those, it was run, or it ended worse than it began.
NO_TRAINING, NOT_NEEDED, NO_HELP = "none", "not needed", "no help"
STOPPED, TRAINED, WORSE = "stopped", "trained", "worse"

# What drifts and the change of unnamed words are of.
PREDICTION, KEYS_AND_VALUES, GUIDANCE = "prediction", "keys and values", "guidance"

LONGEST_INTEGER = 20  # digits: as many as the largest seed has
DEEPEST = 32  # lists and mappings in one another; a record has five
_VERSION = re.compile(r"[\w.+-]{1,40}")
_NUMBER = (int, float)
_TEXTS_WITH_DRIFT = [{"text": str, "drift": _NUMBER}]
_MOVED = {"overall": _NUMBER}


class _OrNone:
    """Something that may be None."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


# Of older versions there is none.
_MEMORY = _OrNone(
    {
        "at_once": int,
        "checkpointing": bool,
        "ran_out": int,
        "needed_whole": int,
        "needed": int,
        "free": int,
    }
)

_OTHERS = _OrNone(
    {
        "change": _NUMBER,
        "words": _TEXTS_WITH_DRIFT,
        "nearest": _TEXTS_WITH_DRIFT,
        "most_changed": _TEXTS_WITH_DRIFT,
    }
)


class _Finite:
    """A number that isn't infinite and not "not a number"."""


# What a run that solves several erasures together reads of their settings, where they say it.
_SETTINGS = {
    "kind": str,
    "keep": [str],
    "templates": [str],
    "layers": str,
    "rank": int,
    "captions": int,
    "eta": _Finite,
    "guidance_scale": _Finite,
}

# What is read of a record: types, of mappings the keys, of a list what each entry is.
_SHAPE = {
    "version": str,
    "created": str,
    "family": str,
    "base": {"name": str, "fingerprint": [_NUMBER]},
    "text_encoder": [_NUMBER],
    "settings": {
        "negative_prompts": [str],
        "steps": int,
        "stop_below": _NUMBER,
        "eta": _NUMBER,
        "guidance_scale": _NUMBER,
        "resolution": int,
    },
    "form": str,
    "concepts": [
        {
            "text": str,
            "alternative": str,
            "share_left": _NUMBER,
            "keys_and_values_moved": _OrNone(_NUMBER),
            "moved": _OrNone(_NUMBER),
            "columns": _OrNone([int]),
        }
    ],
    "matrices": int,
    "rank": int,
    "subspace": {"share_left": _NUMBER},
    "protection": _NUMBER,
    "measures": {
        "moved_held_out": _OrNone(
            {**_MOVED, "high": _NUMBER, "middle": _NUMBER, "low": _NUMBER, "erased_change": _NUMBER}
        ),
        "moved_sampled": _OrNone(_MOVED),
        "pooled": _OrNone({"leak": _NUMBER}),
        "drift_of": str,
        "null_drift": _NUMBER,
        "zeroed_drift": _NUMBER,
        "negative_prompts": _TEXTS_WITH_DRIFT,
        "kept": [{"text": str, "exact": bool, "drift": _NUMBER}],
        "unnamed": _TEXTS_WITH_DRIFT,
        "unnamed_drift": _NUMBER,
    },
    "warnings": [str],
    "losses": [_NUMBER],
    "steps_done": int,
    "converged": bool,
    "complete": bool,
    "stopped_early": bool,
    "ended_by": str,
    "forward_equivalents": int,
    "seconds": _NUMBER,
}


def read_record(text: str) -> Any:
    """The values of a record as it stands in a file: nothing that a reader could trip over.

    Raises:
        ValueError: no JSON, or JSON that is too deep, with integers too long for any number that is
            meant, or with half of a character.
    """
    try:
        record = json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("its record is nested too deeply.") from error
    level = [record]
    for _ in range(DEEPEST):
        for value in level:
            _refuse_half_characters(value)
        level = [item for value in level for item in _items(value)]
        if not level:
            return record
    raise ValueError("its record is nested too deeply.")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > LONGEST_INTEGER:
        raise ValueError(f"its record has an integer of {len(digits)} digits.")
    return int(digits)


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _refuse_half_characters(value: Any) -> None:
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError as error:
        near = value[max(0, error.start - 20) : error.end]
        raise ValueError(f"its record has half of a character, in {near!r}.") from error


def record_problem(record: Any, rank: int) -> str:
    """What keeps a record from being used, and what to do about it; "" if nothing does.

    Args:
        record: what a file gave.
        rank: columns of the erasure's narrowest R.
    """
    amiss = list(_amiss(record, _SHAPE, "")) or list(_amiss_together(record, rank))
    if not amiss:
        return ""
    what = f"lacks or has wrong: {', '.join(amiss[:3])}"
    if len(amiss) > 3:
        what += f" and {len(amiss) - 3} more"
    version = record.get("version") if isinstance(record, Mapping) else None
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        return (
            f"is damaged: its record names no version and {what}. Get the file again, or use it "
            "in the host's own LoRA loader."
        )
    if version == VERSION:
        return (
            f"is damaged: its record, of this version {VERSION}, {what}. Get the file again, or "
            "use it in the host's own LoRA loader."
        )
    return (
        f"was written by version {version} of Concept Surgery and this is {VERSION}: its record "
        f"{what}. Train the erasure again with this version, install that one, or use the file in "
        "the host's own LoRA loader, which reads it as it is."
    )


def _amiss(value: Any, shape: Any, path: str) -> Iterator[str]:
    """Paths at which a value isn't of a shape."""
    if isinstance(shape, _OrNone):
        if value is not None:
            yield from _amiss(value, shape.shape, path)
    elif isinstance(shape, Mapping) and isinstance(value, Mapping):
        for key, inner in shape.items():
            place = f"{path}.{key}" if path else key
            if key in value:
                yield from _amiss(value[key], inner, place)
            else:
                yield place
    elif isinstance(shape, list) and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _amiss(item, shape[0], f"{path}[{index}]")
    elif isinstance(shape, Mapping | list) or not _is_of(value, shape):
        yield path or "everything"


def _is_of(value: Any, types: Any) -> bool:
    if types is _Finite:
        return _is_of(value, _NUMBER) and math.isfinite(value)
    return isinstance(value, types) and (types is bool or not isinstance(value, bool))


def _amiss_together(record: Mapping[str, Any], rank: int) -> Iterator[str]:
    """Paths at which values of the right shape don't fit each other."""
    concepts, measures = record["concepts"], record["measures"]
    sampled = measures["moved_held_out"] is not None
    if not _VERSION.fullmatch(record["version"]):
        yield "version"
    yield from _amiss(record.get("taken_out", []), [str], "taken_out")
    yield from _amiss(record.get("memory"), _MEMORY, "memory")
    yield from _amiss(record.get("others"), _OTHERS, "others")
    yield from _amiss(record.get("training", ""), str, "training")
    yield from _amiss(measures.get("unnamed_of", ""), str, "measures.unnamed_of")
    settings = {key: _OrNone(shape) for key, shape in _SETTINGS.items()}
    given = {key: record["settings"].get(key) for key in settings}
    yield from _amiss(given, settings, "settings")
    guidance = measures.get("unnamed_guidance", 0.0)
    yield from _amiss(guidance, _NUMBER, "measures.unnamed_guidance")
    yield from _amiss(record.get("pooled_left_out", False), bool, "pooled_left_out")
    left = (measures["pooled"] or {}).get("left")
    yield from _amiss(left, _OrNone(_NUMBER), "measures.pooled.left")
    if not concepts:
        yield "concepts"
    if sampled != (measures["moved_sampled"] is not None):
        yield "measures.moved_sampled"
    for index, concept in enumerate(concepts):
        yield from _amiss(concept.get("kind"), _OrNone(str), f"concepts[{index}].kind")
        columns = concept["columns"]
        if columns is not None and not (len(columns) == 2 and 0 <= columns[0] < columns[1] <= rank):
            yield f"concepts[{index}].columns"
        if concept["keys_and_values_moved"] is None and (not sampled or concept["moved"] is None):
            yield f"concepts[{index}].keys_and_values_moved"
