"""The node that solves the concepts of several erasures together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.v0_0_2 import io

from ..erase_core import Erasure, SettingsError
from ..erase_core.artefact.stack import overlap_warnings
from ..erase_core.artefact.together import settings_together, warnings_together
from .apply import applied_to
from .families import trainable_family
from .matrices import is_base_of
from .messages import upstream_file
from .runs import refuse_without_clip, report_of, run_to_end
from .schema import CATEGORY, ErasureType, compatible

MOST_ERASURES = 10
REQUIRED = 2


class JoinErasures(io.ComfyNode):
    """MODEL, CLIP and several ERASUREs in, one ERASURE of all their concepts out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs as the host shows them."""
        return compatible(
            io.Schema,
            node_id="ConceptSurgeryJoin",
            display_name="Join Erasures",
            category=CATEGORY,
            description=(
                "Solves the concepts of several erasures as one. Applied one after the other they "
                "get in each other's way, and what they change besides adds up. Takes seconds: it "
                "reads what they erase and solves it anew, without training."
            ),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model of the loader, without the erasures. It is not changed.",
                ),
                io.Clip.Input("clip", tooltip="The text encoder that you also use for prompts."),
                *[_erasure_input(number) for number in range(1, MOST_ERASURES + 1)],
            ],
            outputs=[
                ErasureType.Output("joined_erasure", display_name="ERASURE"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls, model, clip, erasure_1: Erasure, erasure_2: Erasure, **more: Erasure | None
    ) -> io.NodeOutput:
        """Solve what they erase, with the host's progress bar and cancel button."""
        refuse_without_clip(clip)
        others = [more.get(f"erasure_{n}") for n in range(REQUIRED + 1, MOST_ERASURES + 1)]
        erasures = distinct([erasure_1, erasure_2, *others])
        records = [erasure.record for erasure in erasures]
        settings, warnings = settings_together(records), warnings_together(records)
        refuse_another_model(model, erasures)
        name = upstream_file(cls.hidden.prompt, cls.hidden.unique_id, "model")
        warnings += other_bases(model, erasures, name)
        ran = run_to_end(model, clip, settings, cls.hidden)
        notes = [f"Joined from {len(erasures)} erasures: {_named(erasures)}.", *warnings]
        report = report_of(ran, model, cls.hidden.unique_id, notes, warnings)
        return io.NodeOutput(ran.erasure, report, ui=ran.ui)


def distinct(erasures: Sequence[Erasure | None]) -> list[Erasure]:
    """The erasures that are connected, each once.

    Raises:
        SettingsError: one and the same is connected twice and no other.
    """
    connected = {erasure.identity: erasure for erasure in erasures if erasure is not None}
    if len(connected) == 1:
        (only,) = connected.values()
        raise SettingsError(
            f"Only the erasure of {only.concept!r} is connected, more than once. Connect another "
            "one to join it with, or apply it as it is."
        )
    return list(connected.values())


def refuse_another_model(model, erasures: Sequence[Erasure]) -> None:
    """What the concepts are solved for is a model that has them.

    Raises:
        SettingsError: a model of another family, or one that has a concept erased already.
    """
    family, wanted = trainable_family(model).name, erasures[0].record.get("family")
    if family != wanted:
        raise SettingsError(
            f"The erasures are for {wanted}, and the connected model is {family}. Connect the "
            "model that they were made for."
        )
    if any(overlap_warnings(applied_to(model), erasure) for erasure in erasures):
        on_it = ", ".join(repr(one.concept) for one in applied_to(model))
        raise SettingsError(
            f"The connected model already has an erasure on it ({on_it}) with a concept that is "
            "to be joined. Connect the MODEL of the loader, and apply the joined erasure to that."
        )


def other_bases(model, erasures: Sequence[Erasure], name: str) -> list[str]:
    """Warnings about erasures that were made on another model of the same family.

    Args:
        name: file name of the connected model; "" if unknown.
    """
    return [
        f"The erasure of {erasure.concept!r} was made on "
        f"{erasure.record['base'].get('name') or 'another model'}. What it erases is solved anew "
        f"for {name or 'the connected model'}."
        for erasure in erasures
        if erasure.record.get("base") and not is_base_of(model, erasure.record)
    ]


def _erasure_input(number: int) -> Any:
    more = {"optional": True} if number > REQUIRED else {}
    return ErasureType.Input(
        f"erasure_{number}",
        tooltip="From Train Concept Erasure or Load Erasure, in the hard form. Concepts, "
        "replacements and kept prompts are taken from it.",
        **more,
    )


def _named(erasures: Sequence[Erasure]) -> str:
    return ", ".join(repr(erasure.concept) for erasure in erasures)
