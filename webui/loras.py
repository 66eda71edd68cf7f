"""The host's own Lora extension, and the erasures among its files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ..erase_core import Erasure, ErasureFileError
from ..erase_core.artefact.beside import PICTURE_KEY, mark_of, write_beside
from ..erase_core.artefact.listing import ErasureFiles
from ..erase_core.artefact.saving import SUFFIX, checked_name, place_inside, save_erasure

_files = ErasureFiles()


def lora_extension(function: str = "list_available_networks") -> Any:
    """The module of the host's own Lora extension; None where it is switched off.

    Args:
        function: what it must have.
    """
    if "networks" not in sys.modules:
        return None
    import networks

    return networks if hasattr(networks, function) else None


def loras_folder() -> Path:
    """Where the host looks for LoRAs."""
    from modules import shared

    return Path(shared.cmd_opts.lora_dir)


def erasures() -> list[str]:
    """Names of the erasures among the host's LoRAs, as prompts call them."""
    return _files.among(_loras())


def path_of(name: str) -> Path:
    """The file of an erasure by its name.

    Raises:
        ErasureFileError: there is none.
    """
    path = _loras().get(name)
    if path is None:
        raise ErasureFileError(
            f"There is no erasure {name!r:.80} among the host's LoRAs. Refresh the list, and "
            "choose one of it."
        )
    return path


def tag_of(name: str, strength: float = 1.0) -> str:
    """What a prompt says to have an erasure applied."""
    return f"<lora:{name}:{strength:g}>"


def save(erasure: Erasure, filename: str, picture: Any = None) -> tuple[Path, str]:
    """Write an erasure into the host's folder, with what its cards show, and refresh its list.

    Args:
        picture: a Pillow image that shows what it does; None for none.

    Returns:
        The file, and a sentence about what couldn't be written beside it.

    Raises:
        ErasureFileError: a name that can't be one, or that prompts can't say.
    """
    refuse_unspeakable(filename)
    path = save_erasure(erasure, loras_folder(), filename)
    problem = write_beside(path, erasure, b"" if picture is None else _png(erasure, picture))
    networks = lora_extension()
    if networks is not None:
        networks.list_available_networks()
    return path, problem


def refuse_unspeakable(filename: str) -> None:
    """Refuse names that a prompt can't say in a tag.

    Raises:
        ErasureFileError: the name is of that kind, or can't be one at all.
    """
    name = checked_name(filename)
    place_inside(loras_folder(), name)
    stem = name.rpartition("/")[2]
    wrong = [letter for letter in ":<>=" if letter in stem]
    if wrong or stem.casefold() in ("none", "addams"):  # the hosts keep these names for themselves
        what = " and ".join(map(repr, wrong)) or f"called {stem!r}"
        raise ErasureFileError(
            f"{stem!r} can't be said in a prompt: a LoRA's name can't have {what} in it. Choose "
            "another name, such as no_cat."
        )


def _loras() -> dict[str, Path]:
    """Every file that can be a LoRA, by the name that prompts use."""
    from modules import shared

    found: dict[str, Path] = {}
    # Forge Neo takes further folders, whose files count where the first has none of that name.
    for where in (loras_folder(), *(getattr(shared.cmd_opts, "lora_dirs", None) or ())):
        for folder, folders, names in os.walk(where, followlinks=True):
            folders.sort()
            for name in sorted(names):
                if name.endswith(SUFFIX):
                    found.setdefault(name.removesuffix(SUFFIX), Path(folder) / name)
    return found


def _png(erasure: Erasure, picture: Any) -> bytes:
    """A Pillow image as a small PNG that says of which erasure it is."""
    import io

    from PIL.PngImagePlugin import PngInfo

    small = picture.convert("RGB")
    small.thumbnail((768, 768))
    info, file = PngInfo(), io.BytesIO()
    info.add_text(PICTURE_KEY, mark_of(erasure))
    small.save(file, "PNG", pnginfo=info, optimize=True)
    return file.getvalue()
