"""What stands between percent signs in a file name, as the host's own Save nodes understand it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

# As the host's front end has it: what no file name may have, in the value of a widget.
_NOT_IN_NAMES = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')
_TOKEN = re.compile(r"%([^%]+)%")
# The parts of a date, as the host's front end spells them. A letter may stand once or twice.
_DATE_PARTS = {"d": "%d", "M": "%m", "h": "%H", "m": "%M", "s": "%S"}
_DATE = re.compile(r"dd?|MM?|hh?|mm?|ss?|yyyy|yy")
_WORDS = {
    "date": "yyyy-MM-dd",
    "year": "yyyy",
    "month": "MM",
    "day": "dd",
    "hour": "hh",
    "minute": "mm",
    "second": "ss",
}
CONCEPT = "concept"
_LONGEST_CONCEPT = 60  # letters


def filled(
    filename: str, prompt: Mapping[str, Any] | None = None, concept: str | None = None
) -> str:
    """A file name with what its tokens stand for; tokens that mean nothing stay.

    ``%date:yyyy-MM-dd%``, ``%year%`` and its like are of now, ``%KSampler.seed%`` is the value of a
    widget of another node, by its title or its kind, and ``%concept%`` is what is erased.

    Args:
        prompt: the graph in the host's API format.
        concept: what is erased, if that is known already.
    """
    now = time.localtime()
    for word, pattern in _WORDS.items():
        filename = filename.replace(f"%{word}%", _date(pattern, now))
    if concept is not None:
        filename = filename.replace(f"%{CONCEPT}%", _as_name(concept))
    return _TOKEN.sub(lambda found: _meaning(found[1], now, prompt or {}) or found[0], filename)


def is_open(filename: str) -> bool:
    """Whether a filled name has tokens that only a graph or an erasure gives a meaning."""
    return any(token == CONCEPT or "." in token for token in _TOKEN.findall(filename))


def _meaning(token: str, now: time.struct_time, prompt: Mapping[str, Any]) -> str:
    if token.startswith("date:"):
        return _date(token.removeprefix("date:"), now)
    node, dot, widget = token.partition(".")
    if not dot or "." in widget:
        return ""
    for called in (_kind, _title):
        for one in prompt.values():
            value = one.get("inputs", {}).get(widget)
            if called(one) == node and isinstance(value, str | int | float):
                return _NOT_IN_NAMES.sub("_", str(value))
    return ""


def _date(pattern: str, now: time.struct_time) -> str:
    return _DATE.sub(lambda part: _date_part(part[0], now), pattern)


def _date_part(part: str, now: time.struct_time) -> str:
    if part[0] == "y":
        return time.strftime("%Y" if len(part) == 4 else "%y", now)
    return f"{int(time.strftime(_DATE_PARTS[part[0]], now)):0{len(part)}}"


def _kind(node: Mapping[str, Any]) -> Any:
    return node.get("class_type")


def _title(node: Mapping[str, Any]) -> Any:
    return node.get("_meta", {}).get("title")


def _as_name(concept: str) -> str:
    """A text that someone typed, as a part of a file name on any system."""
    name = re.sub(r"[^\w ().-]+", "_", concept)[:_LONGEST_CONCEPT]
    return name.strip(" ._") or CONCEPT
