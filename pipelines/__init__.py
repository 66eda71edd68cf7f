"""Concept Surgery for pipelines of diffusers: erase, save, apply.

Needs ``pip install concept-surgery[diffusers]``; to read files and reports it isn't needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..erase_core import ErasureFileError, SettingsError
from .erasure import Erasure
from .networks import PipelineError

if TYPE_CHECKING:
    from .erasing import erase

__all__ = ["Erasure", "ErasureFileError", "PipelineError", "SettingsError", "erase"]


def __getattr__(name: str) -> Any:
    """What needs diffusers is imported when it is asked for."""
    if name != "erase":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .erasing import erase

    return erase
