"""The node that takes concepts out of an erasure again."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..erase_core import Erasure, SettingsError
from ..erase_core.artefact.report import report_text
from ..erase_core.settings.texts import concept_names
from .messages import id_of, show_progress_text, shown
from .refusals import refusal
from .schema import CATEGORY, ErasureType, compatible


class TakeConceptsOut(io.ComfyNode):
    """ERASURE in, another ERASURE without some of its concepts out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs as the host shows them."""
        return compatible(
            io.Schema,
            node_id="ConceptSurgeryTakeOut",
            display_name="Take Concepts Out",
            category=CATEGORY,
            description=(
                "Takes some of its concepts out of an erasure, so that the model draws them again. "
                "The others stay as they were trained; nothing is trained again."
            ),
            inputs=[
                ErasureType.Input(
                    "erasure",
                    tooltip="An erasure of several concepts, from Train Concept Erasure or Load "
                    "Erasure. It stays as it is.",
                ),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    placeholder="what the model shall draw again, one a line",
                    default="",
                    tooltip="The concepts to take out, one a line, as they were typed under "
                    "'erase'. The report lists them.",
                ),
            ],
            outputs=[
                ErasureType.Output("smaller_erasure", display_name="ERASURE"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, concepts: str | None = None) -> bool | str:
        """Refuse an empty or unreadable list before anything is trained."""
        try:
            if concepts is not None:
                named_concepts(concepts)
        except SettingsError as error:
            return refusal(error, cls, "concepts")
        return True

    @classmethod
    def execute(cls, erasure: Erasure, concepts: str) -> io.NodeOutput:
        """Leave the columns of the named concepts away."""
        smaller = erasure.without(named_concepts(concepts))
        show_progress_text(f"Left: {smaller.concept}", None, id_of(cls))  # in place of a refusal
        return io.NodeOutput(smaller, shown(report_text(smaller.record)))


def named_concepts(given: str) -> tuple[str, ...]:
    """The concepts that a text names, one a line.

    Raises:
        SettingsError: none, or a line that can't be read.
    """
    names = concept_names(given)
    if not names:
        raise SettingsError(
            "No concept is named to be taken out. Type one that this erasure erases, for example "
            "'cat', or leave this node out."
        )
    return names
