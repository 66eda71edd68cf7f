"""What lies beside an erasure's file, for programs that list LoRAs with a picture and a text.

Automatic1111 and Forge show the description of ``NAME.json`` and take the weight from it; they and
ComfyUI's model library show ``NAME.preview.png``. A person may have put either there, or changed
it since: what isn't as it was written here is left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.disk import create_whole, write_whole
from ..settings.families import SD1, SD2, SD2_V, SDXL
from .erasure import Erasure
from .formats import concept_list

# What those programs call a base; of others they only say that they don't know it.
_SD_VERSIONS = {SD1.name: "SD1", SD2.name: "SD2", SD2_V.name: "SD2", SDXL.name: "SDXL"}
_OURS = "concept surgery"  # key of a hash of all the rest, in the file of texts
PICTURE_KEY = "Software"  # the text in a PNG that names the program it is of
PICTURE_ENDINGS = ("png", "jpg", "jpeg", "webp", "gif")  # that those programs look for
_LONGEST_CARD = 100_000  # bytes
_MARKED_WITHIN = 4096  # bytes of a PNG; texts stand before the pixels


def mark_of(erasure: Erasure) -> str:
    """The text that a picture of the erasure has under :data:`PICTURE_KEY`."""
    return f"Concept Surgery {erasure.identity}"


def card(record: Mapping[str, Any]) -> dict[str, Any]:
    """What Automatic1111 and Forge show of a LoRA, in their words."""
    # Some have their lists read descriptions as HTML.
    concepts = concept_list(record).translate({ord("<"): "\u2039", ord(">"): "\u203a"})
    texts: dict[str, Any] = {
        "description": f"Concept erasure. Removes {concepts}; apply at weight 1.",
        "preferred weight": 1,
    }
    if record["family"] in _SD_VERSIONS:
        texts["sd version"] = _SD_VERSIONS[record["family"]]
    return {**texts, _OURS: _hash(texts)}


def write_beside(path: Path, erasure: Erasure, picture: bytes = b"") -> str:
    """Write texts, and where there is one a picture, beside the file of an erasure.

    Args:
        picture: a PNG that shows what the erasure does, with :func:`mark_of` it as a text.

    Returns:
        A sentence about what couldn't be written, "" if all could; the erasure itself is there.
    """
    texts = path.with_suffix(".json")
    preview = path.with_suffix(".preview.png")
    data = json.dumps(card(erasure.record), indent=4, ensure_ascii=False).encode()
    try:
        _put(texts, data, _is_our_card(texts))
        whose = _picture_of(preview)
        if picture and (whose or not _has_picture(path)):
            _put(preview, picture, bool(whose))
        elif not picture and whose and whose != mark_of(erasure):
            preview.unlink()  # shows what was overwritten
    except OSError as error:
        return (
            f"{path.name} is saved, but its picture or description for other programs isn't: "
            f"{error.strerror or error}."
        )
    return ""


def _put(path: Path, data: bytes, ours: bool) -> None:
    """Write a file that isn't there, or that is there as it was written here."""
    if ours:
        write_whole(path, data)
        return
    try:
        create_whole(path, data)
    except FileExistsError:
        pass


def _has_picture(path: Path) -> bool:
    return any(
        path.with_suffix(f"{middle}.{ending}").exists()
        for middle in ("", ".preview")
        for ending in PICTURE_ENDINGS
    )


def _picture_of(path: Path) -> str:
    """The mark of a picture that was written here; "" of any other."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        start = file.read(_MARKED_WITHIN)
    _, found, rest = start.partition(f"tEXt{PICTURE_KEY}\0Concept Surgery ".encode())
    return f"Concept Surgery {rest[:16].decode('ascii', 'replace')}" if found else ""


def _is_our_card(path: Path) -> bool:
    """Whether a file of texts is as it was written here."""
    if not path.is_file() or path.stat().st_size > _LONGEST_CARD:
        return False
    try:
        texts = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        return False
    if not isinstance(texts, dict) or _OURS not in texts:
        return False
    return texts.pop(_OURS) == _hash(texts)


def _hash(texts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]
