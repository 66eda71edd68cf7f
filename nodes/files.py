"""The nodes that write an erasure to the host's LoRA folder and read it back."""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths
from comfy_api.v0_0_2 import io
from safetensors import safe_open

from ..erase_core import Erasure, ErasureFileError
from ..erase_core.formats import KOHYA, NAMINGS
from ..erase_core.report import report_text
from .messages import preview, shown
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
                    tooltip="Name of the file, without a folder.",
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
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None) -> bool | str:
        """Refuse a bad name before anything is trained."""
        try:
            if filename is not None:
                checked_name(filename)
        except ErasureFileError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, erasure: Erasure, filename: str, pooled_vector: bool = True, names: str = KOHYA
    ) -> io.NodeOutput:
        """Write the file and show where it is."""
        erasure = erasure if pooled_vector else erasure.without_pooled()
        folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
        path = save_erasure(erasure, folder, filename, names)
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
    def fingerprint_inputs(cls, filename: str) -> float:
        """Read again when the file has changed."""
        path = folder_paths.get_full_path(FOLDER, filename)
        return Path(path).stat().st_mtime if path else 0.0

    @classmethod
    def execute(cls, filename: str) -> io.NodeOutput:
        """Read and check the file."""
        erasure = Erasure.load(Path(folder_paths.get_full_path_or_raise(FOLDER, filename)))
        return io.NodeOutput(erasure, shown(report_text(erasure.record)))


def save_erasure(erasure: Erasure, folder: Path, filename: str, names: str = KOHYA) -> Path:
    """Write the erasure under a free name in ``folder``; the same one twice gives one file.

    Raises:
        ErasureFileError: a name with path parts, a folder that can't be written, or a matrix
            that has no name of that kind.
    """
    stem = checked_name(filename)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ErasureFileError(
            f"The folder {str(folder)!r} can't be made: {error.strerror}. Check its rights."
        ) from error
    path, number = folder / (stem + SUFFIX), 1
    while path.exists():
        if _holds(path, erasure, names):
            return path
        number += 1
        path = folder / f"{stem}_{number}{SUFFIX}"
    erasure.save(path, names)
    return path


def checked_name(filename: str) -> str:
    """The file's name without its ending.

    Raises:
        ErasureFileError: an empty name, one with path parts, or one that some system forbids.
    """
    name = filename.strip().removesuffix(SUFFIX)
    if not name or name.startswith(".") or re.search(r'[\\/:*?"<>|\x00-\x1f]', name):
        raise ErasureFileError(
            f"{filename!r} can't be a file name: give a name alone, without folders, not starting "
            'with a dot and without any of \\ / : * ? " < > |. The file goes into models/loras.'
        )
    return name


def _holds(path: Path, erasure: Erasure, names: str) -> bool:
    try:
        same = Erasure.load(path).identity == erasure.identity
    except ErasureFileError:
        return False
    if not same:
        return False
    with safe_open(str(path), framework="pt") as file:
        return set(file.keys()) == set(erasure.tensors(names))
