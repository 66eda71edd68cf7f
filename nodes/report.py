"""The node that says what an erasure does: verdict, details, numbers and a picture."""

from __future__ import annotations

import json

from comfy_api.v0_0_2 import io, ui

from ..erase_core import Erasure, report_markdown, report_numbers, verdict
from ..faces.labels import map_picture
from .messages import id_of, preview, warn_all
from .schema import CATEGORY, ErasureType, compatible


class ErasureReport(io.ComfyNode):
    """ERASURE in; the report as Markdown, its numbers as JSON and a bar chart out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs as the host shows them."""
        return compatible(
            io.Schema,
            node_id="ConceptSurgeryReport",
            display_name="Erasure Report",
            category=CATEGORY,
            description=(
                "Says what an erasure does: whether the concept is gone, what was kept exactly, "
                "and what else changes. Works for any erasure, trained just now or loaded."
            ),
            search_aliases=["erase report", "verdict", "check erasure", "map of neighbours"],
            inputs=[
                ErasureType.Input(
                    "erasure",
                    display_name="erasure",
                    tooltip="From Train Concept Erasure, Load Erasure, Join Erasures or Take "
                    "Concepts Out.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The whole report as Markdown. Connect it to Preview as Text.",
                ),
                io.String.Output(
                    "numbers",
                    display_name="numbers (JSON)",
                    tooltip="The report's numbers as JSON, for programs.",
                ),
                io.Image.Output(
                    "map",
                    display_name="map",
                    tooltip="What is gone, what stays and what else changes, as a bar chart.",
                ),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, erasure: Erasure) -> io.NodeOutput:
        """Show the verdict and the chart, and hand the rest on."""
        lines = verdict(erasure.record)
        picture = map_picture(erasure.record)[None]
        warn_all([], id_of(cls), " ".join(lines))
        shown = {
            **ui.PreviewImage(picture, cls=cls).as_dict(),
            **preview("\n".join(lines)).as_dict(),
        }
        numbers = json.dumps(report_numbers(erasure.record), indent=2, allow_nan=False)
        # Every text of the record is escaped in it already, as Markdown and as HTML.
        return io.NodeOutput(report_markdown(erasure.record), numbers, picture, ui=shown)
