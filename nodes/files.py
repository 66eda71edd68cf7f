"""The nodes that write an erasure to the host's LoRA folder and read it back."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import folder_paths
from comfy_api.v0_0_2 import io
from safetensors import safe_open

from ..erase_core import Erasure, ErasureFileError, SettingsError
from ..erase_core.artefact.formats import KOHYA, NAMINGS, RECORD_KEY
from ..erase_core.artefact.report import report_text
from ..erase_core.files.disk import remove_abandoned
from ..erase_core.files.filenames import path_problem
from .messages import id_of, preview, show_progress_text, shown
from .refusals import check_choice, refusal
from .schema import CATEGORY, ErasureType, compatible

FOLDER = "loras"
SUFFIX = ".safetensors"


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
                "loaders, at strength 1. Nothing is overwritten: a number is added."
            ),
            inputs=[
                ErasureType.Input("erasure"),
                io.String.Input(
                    "filename",
                    default="erased_concept",
                    tooltip="Name of the file, with or without folders of models/loras before it: "
                    "no_ink, or styles/no_ink.",
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
            ],
            outputs=[io.String.Output("path", display_name="path")],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None, names: str = KOHYA) -> bool | str:
        """Refuse a bad name before anything is trained."""
        try:
            check_choice("names", names, NAMINGS)
            if filename is not None:
                place_inside(_loras(), checked_name(filename))
        except (ErasureFileError, SettingsError) as error:
            return refusal(error, cls, "filename")
        return True

    @classmethod
    def execute(
        cls, erasure: Erasure, filename: str, pooled_vector: bool = True, names: str = KOHYA
    ) -> io.NodeOutput:
        """Write the file and show where it is."""
        erasure = erasure if pooled_vector else erasure.without_pooled()
        path = save_erasure(erasure, _loras(), filename, names)
        show_progress_text(f"Saved {path.name}", None, id_of(cls))  # in place of a refusal
        return io.NodeOutput(str(path), ui=preview(f"Saved {path.name} in {path.parent}"))


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
            inputs=[
                io.Combo.Input("filename", options=folder_paths.get_filename_list(FOLDER)),
            ],
            outputs=[
                ErasureType.Output("erasure", display_name="ERASURE"),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, filename: str) -> str:
        """Read again when the file has changed; what is wrong with it is said by reading it."""
        path = folder_paths.get_full_path(FOLDER, filename)
        try:
            status = os.stat(path) if path else None
        except OSError:
            status = None
        return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}" if status else ""

    @classmethod
    def execute(cls, filename: str) -> io.NodeOutput:
        """Read and check the file."""
        erasure = Erasure.load(Path(folder_paths.get_full_path_or_raise(FOLDER, filename)))
        return io.NodeOutput(erasure, shown(report_text(erasure.record)))


def save_erasure(erasure: Erasure, folder: Path, filename: str, names: str = KOHYA) -> Path:
    """Write the erasure under a free name in ``folder``; the same one twice gives one file.

    Several that save under one name at once each get a file.

    Args:
        filename: with or without folders inside of ``folder`` before it, and / between them.

    Raises:
        ErasureFileError: a name that can't be one, a place outside of ``folder``, or one that can't
            be written, or a matrix that has no name of that kind.
    """
    wanted = checked_name(filename)
    place = place_inside(folder, wanted)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ErasureFileError(
            f"The folder {str(place)!r} can't be made: {error.strerror or error}. Check its rights."
        ) from error
    place_inside(folder, wanted)  # another process may have put a link there meanwhile
    remove_abandoned(place, shared=True, mark=f'"{RECORD_KEY}"'.encode())
    stem = wanted.rpartition("/")[2]
    for number in itertools.count(1):
        path = place / (f"{stem}_{number}{SUFFIX}" if number > 1 else stem + SUFFIX)
        if not os.path.lexists(path):
            try:
                erasure.save_new(path, names)
            except FileExistsError:  # another saver was faster
                pass
            else:
                return path
        if _holds(path, erasure, names):
            return path


def checked_name(filename: str) -> str:
    """The file's name without its ending, with the folders before it.

    Raises:
        ErasureFileError: it can't be a name on every system, or leads out of the folder.
    """
    ending = filename[-len(SUFFIX) :].lower() == SUFFIX
    name = filename[: -len(SUFFIX)] if ending else filename
    problem = path_problem(name)
    if problem:
        raise ErasureFileError(
            f"{_short(filename)} can't be a file name: {problem}. Give a name with or without "
            "folders of models/loras before it, such as no_ink or styles/no_ink."
        )
    return name


def place_inside(folder: Path, name: str) -> Path:
    """The folder that a file goes into.

    Args:
        folder: that of the host.
        name: of the file, with the folders before it.

    Raises:
        ErasureFileError: a link on the way leads out of ``folder``, or a file is in the way.
    """
    place = folder.joinpath(*name.split("/")[:-1])
    try:
        outside = not place.resolve().is_relative_to(folder.resolve())
        in_the_way = [
            one for one in (place, *place.parents) if one.is_relative_to(folder) and one.is_file()
        ]
    except (OSError, RuntimeError) as error:  # no rights, or links that lead in a circle
        raise ErasureFileError(
            f"The folder {str(place)!r} can't be looked into: {error}. Check its rights."
        ) from error
    if outside:
        raise ErasureFileError(
            f"{_short(name)} would lie outside of {str(folder)!r}: a link on the way leads to "
            f"{str(place.resolve())!r}. Choose another folder."
        )
    if in_the_way:
        raise ErasureFileError(
            f"The folder {str(in_the_way[0])!r} can't be made: there is a file of that name. "
            "Check its rights, or choose another folder."
        )
    return place


def _loras() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def _short(text: str) -> str:
    """A text in quotes, of a long one the beginning."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _holds(path: Path, erasure: Erasure, names: str) -> bool:
    try:
        same = Erasure.load(path).identity == erasure.identity
    except ErasureFileError:
        return False
    if not same:
        return False
    with safe_open(str(path), framework="pt") as file:
        return set(file.keys()) == set(erasure.tensors(names))
