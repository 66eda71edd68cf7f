"""What the record of an erasure holds, and what is amiss with one that was read from a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import (
    Any,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

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


class Base(TypedDict):
    """The model that an erasure was made on, as it was unpatched."""

    name: str
    fingerprint: list[float]


class _AskedOptional(TypedDict, total=False):
    kind: str | None
    keep: list[str] | None
    templates: list[str] | None
    layers: str | None
    rank: int | None
    captions: int | None
    keep_room: float | None


class Asked(_AskedOptional):
    """Settings that are read again; a record holds all of :class:`EraseSettings`."""

    negative_prompts: list[str]
    steps: int
    stop_below: float
    eta: float
    guidance_scale: float
    resolution: int


class _ConceptOptional(TypedDict, total=False):
    kind: str | None
    also: list[str]


class ConceptRecord(_ConceptOptional):
    """What became of a concept.

    ``columns`` are where its own begin and end in R and B; None in the soft form.
    """

    text: str
    alternative: str
    share_left: float
    keys_and_values_moved: float | None
    moved: float | None
    columns: list[int] | None


class MovementRecord(TypedDict):
    """How far the guidance went on held-out states; see :class:`guidance.Movement`."""

    overall: float
    high: float
    middle: float
    low: float
    erased_change: float


class OverallMovement(TypedDict):
    """The same on the edited model's own states, of which only this is read."""

    overall: float


class _PooledOptional(TypedDict, total=False):
    left: float | None


class PooledRecord(_PooledOptional):
    """What comes through the pooled vector alone, and what is left of it where it is edited."""

    leak: float


class Drift(TypedDict):
    """How far something changed."""

    text: str
    drift: float


class _KeptOptional(TypedDict, total=False):
    share_left: float
    share_first: float | None
    share_without_negatives: float | None


class KeptRecord(Drift, _KeptOptional):
    """What became of a keep prompt, and what share of the edit it would leave if it were exact.

    The other shares are of the same with it at the top, and without the negative prompts.
    """

    exact: bool


class _MeasuresOptional(TypedDict, total=False):
    unnamed_of: str
    unnamed_guidance: float


class Measures(_MeasuresOptional):
    """What was measured, drifts and changes relative to what they are of."""

    moved_held_out: MovementRecord | None
    moved_sampled: OverallMovement | None
    pooled: PooledRecord | None
    drift_of: str
    null_drift: float
    zeroed_drift: float
    negative_prompts: list[Drift]
    kept: list[KeptRecord]
    unnamed: list[Drift]
    unnamed_drift: float


class Memory(TypedDict):
    """How a batch went through the model, and why; bytes."""

    at_once: int
    checkpointing: bool
    ran_out: int
    needed_whole: int
    needed: int
    free: int


class OthersRecord(TypedDict):
    """What else keys and values change by, see :meth:`collateral.Others.report`."""

    change: float
    words: list[Drift]
    nearest: list[Drift]
    most_changed: list[Drift]


class ReaderRecord(TypedDict):
    """Layers that read the prompt alone, found by predictions.

    ``edited`` says whether the erasure is in them; else ``why`` says why they stay as they are.
    """

    name: str
    matrices: int
    width: int
    edited: bool
    why: str


class Room(TypedDict):
    """What is left of the edit beside the exact prompts."""

    share_left: float


class _RecordOptional(TypedDict, total=False):
    taken_out: list[str]
    memory: Memory | None
    others: OthersRecord | None
    training: str
    pooled_left_out: bool
    curve: list[list[float | None]]
    steps_added: list[list[int]]
    diffusers_layers: list[str]
    readers: list[ReaderRecord]


class Record(_RecordOptional):
    """What an erasure says of itself, plain JSON values: all that is read of it.

    What older versions didn't write may be missing; a record may hold more.
    """

    version: str
    created: str
    family: str
    base: Base
    text_encoder: list[float]
    settings: Asked
    form: str
    concepts: list[ConceptRecord]
    matrices: int
    rank: int
    subspace: Room
    protection: float
    measures: Measures
    warnings: list[str]
    losses: list[float]
    steps_done: int
    converged: bool
    complete: bool
    stopped_early: bool
    ended_by: str
    forward_equivalents: int
    seconds: float


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
    amiss = list(_amiss(record, Record, "")) or list(_amiss_together(record, rank))
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


def _amiss(value: Any, hint: Any, path: str) -> Iterator[str]:
    """Paths at which a value isn't of a type of :class:`Record`."""
    if is_typeddict(hint) and isinstance(value, Mapping):
        for key, inner in get_type_hints(hint).items():
            place = f"{path}.{key}" if path else key
            if key in value:
                yield from _amiss(value[key], inner, place)
            elif key in hint.__required_keys__:
                yield place
    elif get_origin(hint) is list and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _amiss(item, get_args(hint)[0], f"{path}[{index}]")
    elif get_origin(hint) in (Union, UnionType):  # something or None
        if value is not None:
            yield from _amiss(value, get_args(hint)[0], path)
    elif is_typeddict(hint) or get_origin(hint) is list or not _is_of(value, hint):
        yield path or "everything"


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a plain type; whole numbers are numbers, truth values aren't."""
    kinds = (int, float) if kind is float else kind
    return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))


def _amiss_together(record: Record, rank: int) -> Iterator[str]:
    """Paths at which values of the right type can't be, or don't fit each other."""
    concepts, measures, settings = record["concepts"], record["measures"], record["settings"]
    sampled = measures["moved_held_out"] is not None
    if not _VERSION.fullmatch(record["version"]):
        yield "version"
    for name in ("eta", "guidance_scale"):
        if not math.isfinite(settings[name]):  # type: ignore[literal-required]
            yield f"settings.{name}"
    if not concepts:
        yield "concepts"
    if sampled != (measures["moved_sampled"] is not None):
        yield "measures.moved_sampled"
    for index, concept in enumerate(concepts):
        columns = concept["columns"]
        if columns is not None and not (len(columns) == 2 and 0 <= columns[0] < columns[1] <= rank):
            yield f"concepts[{index}].columns"
        if concept["keys_and_values_moved"] is None and (not sampled or concept["moved"] is None):
            yield f"concepts[{index}].keys_and_values_moved"
