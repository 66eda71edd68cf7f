"""The nodes that write an erasure to the host's LoRA folder and read it back."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.v0_0_2 import io

from ..erase_core import Erasure, ErasureFileError, SettingsError
from ..erase_core.artefact.beside import PICTURE_KEY, mark_of, write_beside
from ..erase_core.artefact.formats import KOHYA, NAMINGS
from ..erase_core.artefact.listing import ErasureFiles
from ..erase_core.artefact.report import report_text
from ..erase_core.artefact.saving import (
    ADD_NUMBER,
    IF_TAKEN,
    OVERWRITE,
    SUFFIX,
    checked_name,
    is_erasure_file,
    place_inside,
    planned_path,
    save_erasure,
)
from ..erase_core.settings.widgets import check_choice
from .messages import id_of, preview, show_progress_text, shown, warn_all
from .names import filled, is_open
from .pictures import small_png
from .refusals import refusal
from .schema import CATEGORY, ErasureType, compatible

FOLDER = "loras"
LISTED_FOR = 1.0  # seconds: one look at a page's nodes asks for the list many times
_files = ErasureFiles()
_listed: dict[tuple[str, ...], tuple[float, list[str]]] = {}
# What was saved last under a name as it was typed: where, how it was then, and what said so.
_saved: dict[tuple[Any, ...], tuple[Path, str, str]] = {}
_lost: dict[tuple[Any, ...], str] = {}


class SaveErasure(io.ComfyNode):
    """ERASURE to a file that this pack and every stock LoRA loader read."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs as the host shows them."""
        return compatible(
            io.Schema,
            node_id="ConceptSurgerySave",
            display_name="Save Erasure",
            category=CATEGORY,
            description=(
                "Saves an erasure into models/loras. The file also works in the ordinary LoRA "
                "loaders, at strength 1. A description, and the picture if one is connected, lie "
                "beside it for programs that list LoRAs."
            ),
            search_aliases=["save LoRA", "export erasure"],
            inputs=[
                ErasureType.Input("erasure"),
                io.String.Input(
                    "filename",
                    default="erased_concept",
                    tooltip="Name of the file, with or without folders of models/loras before it: "
                    "no_ink, or styles/no_ink. %date:yyyy-MM-dd% and the like work as in Save "
                    "Image; %concept% is what is erased.",
                ),
                io.Boolean.Input(
                    "pooled_vector",
                    default=True,
                    optional=True,
                    tooltip="SDXL, SD3, Flux: the concept is also taken out of the pooled vector. "
                    "ComfyUI, Forge, Automatic1111 and diffusers from 0.39 on load that part; "
                    "diffusers before refuses an SDXL file that has it. Switch it off for those "
                    "only: a little more of the concept stays.",
                ),
                io.Combo.Input(
                    "names",
                    options=list(NAMINGS),
                    default=KOHYA,
                    optional=True,  # graphs saved before there was a choice
                    tooltip="Names of the matrices in the file. kohya: what most programs read. "
                    "diffusers: for SD3 and Flux in diffusers, which finds nothing under kohya "
                    "names there; ComfyUI reads these, too. Other families have one kind of names.",
                ),
                io.Combo.Input(
                    "if_taken",
                    options=list(IF_TAKEN),
                    default=ADD_NUMBER,
                    optional=True,
                    tooltip="What to do where the name is taken. add a number: name_2, name_3; "
                    "nothing is lost. overwrite: replaces the file if it is an erasure; any other "
                    "file stays, and you get an error. The same erasure twice is one file.",
                ),
                io.Image.Input(
                    "picture",
                    optional=True,
                    tooltip="Shown for this file in lists of LoRAs (ComfyUI's model library, "
                    "Automatic1111, Forge). Connect the sheet of Compare Erasure, for example.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path")],
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(
        cls, filename: str | None = None, names: str = KOHYA, if_taken: str = ADD_NUMBER
    ) -> bool | str:
        """Refuse a bad name before anything is trained, and say which file it will be."""
        try:
            check_choice("names", names, NAMINGS)
            check_choice("if_taken", if_taken, IF_TAKEN)
            if filename is not None:
                show_progress_text(announced(filled(filename), if_taken), None, id_of(cls))
        except (ErasureFileError, SettingsError) as error:
            return refusal(error, cls, "filename")
        return True

    @classmethod
    def fingerprint_inputs(
        cls, filename: str = "", names: str = KOHYA, if_taken: str = ADD_NUMBER, **_: Any
    ) -> str:
        """Something new where the file that was saved is gone or another: then it's saved again."""
        key = (filename, names, if_taken)
        if key not in _saved:
            return _lost.get(key, "")
        path, then, said = _saved[key]
        now = _state(path)
        return said if now == then else _lost.setdefault(key, f"{time.time_ns()}")

    @classmethod
    def execute(
        cls,
        erasure: Erasure,
        filename: str,
        pooled_vector: bool = True,
        names: str = KOHYA,
        if_taken: str = ADD_NUMBER,
        picture=None,
    ) -> io.NodeOutput:
        """Write the file and show where it is."""
        for name, value, choices in (("names", names, NAMINGS), ("if_taken", if_taken, IF_TAKEN)):
            check_choice(name, value, choices)
        erasure = erasure if pooled_vector else erasure.without_pooled()
        drawn = b"" if picture is None else small_png(picture, PICTURE_KEY, mark_of(erasure))
        name = filled(filename, getattr(cls.hidden, "prompt", None), erasure.concept)
        path = save_erasure(erasure, _loras(), name, names, if_taken=if_taken)
        problem = write_beside(path, erasure, drawn)
        key = (filename, names, if_taken)
        _saved[key] = (path, _state(path), _lost.pop(key, ""))
        text = f"Saved {path.name} in {path.parent}"
        warn_all([problem] if problem else [], id_of(cls), text)  # in place of a refusal
        return io.NodeOutput(str(path), ui=preview(text))


class LoadErasure(io.ComfyNode):
    """A file from the host's LoRA folder to ERASURE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs as the host shows them."""
        return compatible(
            io.Schema,
            node_id="ConceptSurgeryLoad",
            display_name="Load Erasure",
            category=CATEGORY,
            description="Reads an erasure that was saved into models/loras.",
            search_aliases=["load LoRA", "open erasure"],
            inputs=[
                io.Combo.Input(
                    "filename",
                    options=erasure_names(),
                    tooltip="The erasures in models/loras. A file that was put there since is "
                    "listed after pressing R. Ordinary LoRAs aren't listed here.",
                ),
            ],
            outputs=[
                ErasureType.Output("erasure", display_name="ERASURE"),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None) -> bool | str:
        """Say which file is missing, before anything runs; the host would quote its whole list."""
        try:
            if filename is not None:
                _found(filename)
        except ErasureFileError as error:
            return refusal(error, cls, "filename")
        return True

    @classmethod
    def fingerprint_inputs(cls, filename: str = "") -> str:
        """Read again when the file has changed; what is wrong with it is said by reading it."""
        path = folder_paths.get_full_path(FOLDER, filename)
        return _state(Path(path)) if path else ""

    @classmethod
    def execute(cls, filename: str) -> io.NodeOutput:
        """Read and check the file."""
        erasure = Erasure.load(_found(filename))
        return io.NodeOutput(erasure, shown(report_text(erasure.record)))


def announced(filename: str, if_taken: str) -> str:
    """Which file a name will give, in words.

    Raises:
        ErasureFileError: none.
    """
    if is_open(filename):  # known when it is saved
        place_inside(_loras(), checked_name(filename))
        return f"Will be saved in {_loras()}"
    path = planned_path(_loras(), filename, if_taken)
    if if_taken == OVERWRITE and os.path.lexists(path):
        return f"Will overwrite {path.name} in {path.parent}"
    wanted = checked_name(filename).rpartition("/")[2] + SUFFIX
    if path.name != wanted:
        return f"{wanted} is there: unless it is the same erasure, {path.name} in {path.parent}"
    return f"Will be saved as {path.name} in {path.parent}"


def erasure_names() -> list[str]:
    """The host's names of the LoRA files that are erasures."""
    names = tuple(folder_paths.get_filename_list(FOLDER))
    when, known = _listed.get(names, (0.0, []))
    if names in _listed and time.monotonic() - when < LISTED_FOR:
        return known
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    files = {name: _first_of(folders, name) for name in names}
    found = _files.among(files)
    _listed.clear()
    _listed[names] = (time.monotonic(), found)
    return found


def _first_of(folders: list[Path], name: str) -> Path:
    """The file that the host means by a name: of several folders that have it the first."""
    places = [folder / name for folder in folders]
    return next((path for path in places[:-1] if path.exists()), places[-1])


def _found(filename: str) -> Path:
    """The file of a name in the list.

    Raises:
        ErasureFileError: it isn't there, or isn't an erasure.
    """
    path = folder_paths.get_full_path(FOLDER, filename)
    if path is None:
        base = filename.replace("\\", "/").rpartition("/")[2]
        same = [name for name in erasure_names() if Path(name).name == base]
        advice = f"There is {same[0]!r}: choose that." if same else "Put it there and press R."
        raise ErasureFileError(
            f"The erasure {filename[:200]!r} isn't among the LoRAs ({_loras()}) any more. {advice} "
            "Or choose another from the list."
        )
    if not is_erasure_file(Path(path)):
        Erasure.load(Path(path))  # says what is wrong with it
    return Path(path)


def _state(path: Path) -> str:
    """Something that is another where a file has changed; "" of one that can't be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"


def _loras() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0])
