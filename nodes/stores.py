"""Where the host keeps what runs leave, for this user."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..erase_core.artefact.language_store import LanguageStore
from ..erase_core.artefact.results import ResultStore
from ..erase_core.artefact.unfinished import UnfinishedStore
from .messages import warn


def results_folder() -> Path:
    """Where finished erasures lie."""
    return _own_folder() / "results"


def result_store(node_id: str | None) -> ResultStore:
    """Finished erasures; what can't be used of them is said at a node."""
    return ResultStore(results_folder(), lambda text: warn(text, node_id))


def language_store() -> LanguageStore:
    """What was read of ordinary language, by text encoder."""
    return LanguageStore(_own_folder() / "language")


def unfinished_store(node_id: str | None) -> UnfinishedStore:
    """What runs leave that end before their time."""
    return UnfinishedStore(_own_folder() / "unfinished", lambda text: warn(text, node_id))


def picture_store() -> LanguageStore:
    """Small pictures of finished erasures, by their identity: tensors like what is read."""
    return LanguageStore(_own_folder() / "pictures")


def _own_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "concept_surgery"
