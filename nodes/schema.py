"""Building node schemas that older hosts accept too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.v0_0_2 import io

from .words import SEARCH_WORDS, label_of

CATEGORY = "model/concept surgery"
ErasureType = io.Custom("ERASURE")
SettingsType = io.Custom("ERASE_SETTINGS")


def compatible(make: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Call ``make`` without the keywords it doesn't know.

    One unknown keyword in one input (``advanced`` before 0.4, say) would keep the whole pack from
    loading.
    """
    if "node_id" in keywords:  # a whole node
        _name(keywords)
    known = inspect.signature(make).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        keywords = {name: value for name, value in keywords.items() if name in known}
    return make(*args, **keywords)


def _name(node: dict[str, Any]) -> None:
    """Give a node its search words, and each input that has none a label."""
    node.setdefault("search_aliases", list(SEARCH_WORDS.get(node["node_id"], ())))
    for one in node["inputs"]:
        one.display_name = one.display_name or label_of(one.id)
