"""The node that trains an erasure on the model that is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.v0_0_2 import io

from ..erase_core import KINDS, PRESETS, Erasure
from ..erase_core.artefact.identity import REUSE, USE_IF_THERE
from ..erase_core.settings.prompts import prompt_pairs
from ..erase_core.settings.texts import SettingsError
from ..erase_core.settings.widgets import MODEL_TYPES
from .families import trainable_family
from .refusals import Place, is_link, refusal, sent_behind, sent_values, unwrapped
from .runs import refuse_without_clip, report_of, run_to_end
from .schema import CATEGORY, ErasureType, SettingsType, compatible
from .settings import EXPERT, TITLE, expert_values, settings_from_widgets

LINKED = "concept from a link"  # stands for a concept that isn't known yet


class TrainErasure(io.ComfyNode):
    """Text in, ERASURE out. It returns no MODEL, so nothing can be applied twice by accident."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs as the host shows them."""
        return compatible(
            io.Schema,
            node_id="ConceptSurgeryTrain",
            display_name="Train Concept Erasure",
            category=CATEGORY,
            description=(
                "Learns to stop drawing something, from words alone, on the model that is loaded. "
                "The model itself is not changed: connect ERASURE to Apply Erased UNet."
            ),
            inputs=[*_main_inputs(), *_more_inputs()],
            outputs=[
                ErasureType.Output("erasure", display_name="ERASURE"),
                io.Custom("LOSS_MAP").Output("losses", display_name="losses"),
                io.String.Output("report", display_name="report"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(
        cls,
        erase: str | None = None,
        *,
        replace_with: str | None = None,
        keep: str | None = None,
        negative_prompts: str | None = None,
        kind: str | None = None,
        preset: str | None = None,
        model_type: str | None = None,
        form: str | None = None,
        layers: str | None = None,
        templates: str | None = None,
        null_score: str | None = None,
        steps: int | None = None,
        trajectories: int | None = None,
        resolution: int | None = None,
        stored_result: str | None = None,
    ) -> bool | str:
        """Refuse what can't work before anything runs. Linked values are checked when they come.

        The host hands on the first value alone, so that an error is told once. It is moved to its
        own input, and the other values are read from the graph that the host was sent.
        """
        typed = {
            "erase": erase,
            "replace_with": replace_with,
            "keep": keep,
            "negative_prompts": negative_prompts,
            "kind": kind,
            "preset": preset,
            "model_type": model_type,
            "form": form,
            "layers": layers,
            "templates": templates,
            "null_score": null_score,
            "steps": steps,
            "trajectories": trajectories,
            "resolution": resolution,
            "stored_result": stored_result,
        }
        given = sent_values(cls) or {k: v for k, v in typed.items() if v is not None}
        behind, wired = sent_behind(cls, "settings") or ("", None)
        if wired is not None:  # there may be a node between that passes it on
            wired = {name: wired[name] for name in EXPERT if name in wired}
        try:
            widgets = widgets_of({"erase": LINKED, **given}, wired)
            prompt_pairs(settings_from_widgets(widgets))
        except SettingsError as error:
            there = Place(error.setting, behind) if error.setting in (wired or {}) else None
            return refusal(error, cls, told_at="erase", elsewhere=there)
        return True

    @classmethod
    def execute(
        cls, model, clip, settings: Mapping[str, Any] | None = None, **widgets: Any
    ) -> io.NodeOutput:
        """Train, with the host's progress bar and cancel button."""
        refuse_without_clip(clip)
        widgets = widgets_of({**undeclared_values(cls.hidden), **widgets}, settings)
        asked = settings_from_widgets(widgets, trainable_family(model))
        reuse = widgets.get("stored_result", USE_IF_THERE)
        ran = run_to_end(model, clip, asked, cls.hidden, reuse)
        report = report_of(ran, model, cls.hidden.unique_id)
        losses = {"loss": _loss_curve(ran.erasure)}
        return io.NodeOutput(ran.erasure, losses, report, ui=ran.ui)


def widgets_of(given: Mapping[str, Any], wired: Mapping[str, Any] | None) -> dict[str, Any]:
    """All values of a run by name: the node's own, and those of Erasure Settings.

    Args:
        given: the node's inputs. Graphs of before there was Erasure Settings give expert values
            among them, which keep their effect.
        wired: what Erasure Settings gives; None where it isn't connected.

    Raises:
        SettingsError: expert values from both places, or one that can't be converted.
    """
    old = expert_values(given)
    if wired is None:
        return {**given, **old}
    if not isinstance(wired, Mapping) or set(wired).difference(EXPERT):
        raise SettingsError(f"settings must come from {TITLE}, not {wired!r:.60}.", "settings")
    if old:
        raise SettingsError(
            f"{', '.join(old)} came with this node, from a graph of an older version, and {TITLE} "
            f"is connected, too. Set them there alone, or disconnect it.",
            "settings",
        )
    return {**given, **expert_values(wired)}


def undeclared_values(hidden: Any) -> dict[str, Any]:
    """Expert values that a graph gives the node directly, which the host doesn't hand on."""
    node = (hidden.prompt or {}).get(hidden.unique_id) or {}
    inputs = node.get("inputs", {})
    plain = {name: unwrapped(value) for name, value in inputs.items()}
    return {name: plain[name] for name in EXPERT if name in plain and not is_link(plain[name])}


def _loss_curve(erasure: Erasure) -> list[float]:
    """At least two values that differ, which the host's plot node needs.

    It begins with 1, nothing moved, and ends with the loss on held-out states, or where nothing
    was sampled with that of keys and values.
    """
    record = erasure.record
    held_out = record["measures"]["moved_held_out"]
    moved = (
        held_out["overall"]
        if held_out
        else min(concept["keys_and_values_moved"] for concept in record["concepts"])
    )
    return [1.0, *record["losses"], 1 - moved]


def _main_inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The model to learn on. It is not changed."),
        io.Clip.Input(
            "clip",
            tooltip="The text encoder that you also use for your prompts.",
        ),
        io.String.Input(
            "erase",
            multiline=True,
            placeholder="what to stop drawing, one a line: cat => dog",
            default="",
            tooltip=(
                "What the model must stop drawing, for example: cat. Several: one a line. Other "
                "names of one thing: on its line, with a vertical bar between them. "
                "cat => dog says what to draw instead."
            ),
        ),
        io.String.Input(
            "replace_with",
            default="",
            tooltip=(
                "What to draw instead, for example: dog, for lines that don't say it with =>. "
                'Empty: nothing in particular, as if you had written "thing".'
            ),
        ),
        io.String.Input(
            "keep",
            multiline=True,
            placeholder="prompts that must not change, one a line",
            default="",
            tooltip=(
                "Prompts whose pictures must not change at all, one a line, most important first. "
                "A handful stays exact; the report says which. Short prompts leave more room."
            ),
        ),
        io.String.Input(
            "negative_prompts",
            multiline=True,
            placeholder="one a line",
            default="",
            tooltip="Negative prompts you use, one a line. They stay exact, like the empty one.",
        ),
        *_choices(),
    ]


def _choices() -> list[Any]:
    return [
        io.Combo.Input(
            "kind",
            options=list(KINDS),
            default=KINDS[0],
            tooltip=(
                "A thing, a style, a person, or tags as anime models use them: decides the phrases "
                "it is learned from."
            ),
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default="balanced",
            tooltip=(
                "instant: seconds; nothing is sampled, so the report can't say how far the "
                "pictures go. balanced: about 200 evaluations of the model, and up to 900 where "
                "training helps. thorough: about 2,000, trained in any case."
            ),
        ),
        io.Int.Input(
            "training_seed",
            display_name="Training seed",
            default=0,
            min=0,
            max=2**64 - 1,
            tooltip="Seed of the training. It stays as it is, so queueing twice trains once.",
        ),
    ]


def _more_inputs() -> list[Any]:
    """Those that graphs of older versions may lack."""
    return [
        SettingsType.Input(
            "settings",
            optional=True,
            tooltip=f"From {TITLE}, for who wants to set steps, rank and the like. Not needed.",
        ),
        io.Combo.Input(
            "model_type",
            options=list(MODEL_TYPES),
            default=MODEL_TYPES[0],
            optional=True,
            tooltip="distilled: Turbo, Lightning, LCM, DMD2 and the like, which sample in a few "
            "steps at CFG 1. At CFG 1 negative prompts do nothing.",
        ),
        io.Combo.Input(
            "stored_result",
            options=list(REUSE),
            default=REUSE[0],
            optional=True,
            tooltip="A finished training is kept on disk and used again where model, LoRAs, text "
            "encoder and all settings are the same. train again: replaces what is stored. "
            "use only: an error where nothing is stored, for batches that must not train. "
            "A training that was cancelled goes on by itself where it was. resume: goes on with "
            "one that was stopped, or adds steps to a finished one.",
        ),
    ]
