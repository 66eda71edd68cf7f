"""The nodes that write an erasure to the host's LoRA folder and read it back."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.v0_0_2 import io

from ..erase_core import Erasure, ErasureFileError, SettingsError
from ..erase_core.artefact.formats import KOHYA, NAMINGS
from ..erase_core.artefact.report import report_text
from ..erase_core.artefact.saving import checked_name, place_inside, save_erasure
from ..erase_core.settings.widgets import check_choice
from .messages import id_of, preview, show_progress_text, shown
from .refusals import refusal
from .schema import CATEGORY, ErasureType, compatible

FOLDER = "loras"


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


def _loras() -> Path:
    return Path(folder_paths.get_folder_paths(FOLDER)[0])
