"""Building node schemas that older hosts accept too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.v0_0_2 import io

CATEGORY = "model/concept surgery"
ErasureType = io.Custom("ERASURE")
SettingsType = io.Custom("ERASE_SETTINGS")


def compatible(make: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Call ``make`` without the keywords it doesn't know.

    One unknown keyword in one input (``advanced`` before 0.4, say) would keep the whole pack from
    loading.
    """
    known = inspect.signature(make).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        keywords = {name: value for name, value in keywords.items() if name in known}
    return make(*args, **keywords)
