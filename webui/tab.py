"""The tab "Concept Surgery": what the node of ComfyUI shows, in the host's own Gradio (3 or 4)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..erase_core import KINDS, PRESETS, EraseSettings, ErasureFileError, SettingsError
from ..erase_core.artefact.identity import REUSE
from ..erase_core.settings.layers import LAYER_RULES
from ..erase_core.settings.settings import FORMS, NULL_SCORES
from ..erase_core.settings.widgets import AS_PRESET, AUTO, MODEL_TYPES
from . import draw, form, loras, shown, suggest
from .errors import InterruptedByUserError
from .jobs import ENDED, JOBS, Job, NoSuchJobError, told

TITLE, ID = "Concept Surgery", "concept_surgery"
EVERY = 0.5  # seconds between two looks at a run
DEFAULT_NAME = "erased_concept"


def on_ui_tabs() -> list[tuple[gr.Blocks, str, str]]:
    """What the host asks for when it builds its page."""
    return [(build(), TITLE, ID)]


def build() -> gr.Blocks:
    """The tab."""
    with gr.Blocks(analytics_enabled=False) as tab:
        number = gr.State("")
        with gr.Row():
            with gr.Column():
                inputs = {**_main_inputs(), **_expert_inputs()}
                names = _names()
                with gr.Row():
                    train = gr.Button("Train", variant="primary", elem_id=f"{ID}_train")
                    stop = gr.Button("Stop and keep", elem_id=f"{ID}_stop")
                    cancel = gr.Button("Cancel", elem_id=f"{ID}_cancel")
                watch = gr.Button("Show the latest training", elem_id=f"{ID}_watch")
            with gr.Column():
                seen = _outputs()
                kept = _saving()
                seen["report"] = gr.Markdown("", elem_id=f"{ID}_report")
        shows = [number, *seen.values()]
        given = [inputs[name] for name in form.INPUTS]
        _at_once(train, start, given, shows)
        _at_once(watch, follow_latest, [], shows)
        quietly: dict[str, Any] = {"show_progress": "hidden"}
        # Not behind what Gradio has in its queue: that may be what is to stop.
        stop.click(stop_job, [number], [seen["status"]], queue=False, **quietly)
        cancel.click(cancel_job, [number], [seen["status"]], queue=False, **quietly)
        saving = [kept["tag"], kept["saved"]]
        kept["save"].click(save_job, [number, kept["filename"]], saving, **quietly)
        _at_once(
            kept["draw"],
            draw_job,
            [number, kept["filename"], kept["prompts"]],
            [kept["gallery"], kept["sheet"], *saving],
        )
        read = [inputs["erase"], inputs["kind"]]
        _at_once(names["suggest"], suggest_job, read, [names[name] for name in _NAMES])
    return tab


def _at_once(button: Any, does: Any, inputs: list[Any], outputs: list[Any]) -> None:
    """An event that takes long: Gradio 4 would let one of them run at a time."""
    named: dict[str, Any] = {"show_progress": "hidden"}
    if "concurrency_limit" in inspect.signature(button.click).parameters:
        named["concurrency_limit"] = None
    button.click(does, inputs, outputs, **named)


# What the buttons do.


def start(*values: Any) -> Iterator[tuple[Any, ...]]:
    """Begin a training and follow it."""
    try:
        job = JOBS.start(dict(zip(form.INPUTS, values, strict=True)))
    except (SettingsError, ValueError) as error:
        yield "", shown.status(None, message=told(error)), "", [], "", ""
        return
    yield from _follow(job)


def follow_latest() -> Iterator[tuple[Any, ...]]:
    """Follow the newest training, whoever began it: a page that was reloaded has lost its own."""
    try:
        job = JOBS.get("")
    except NoSuchJobError:
        yield "", shown.status(None), "", [], "", ""
        return
    yield from _follow(job)


def _follow(job: Job) -> Iterator[tuple[Any, ...]]:
    pictures: Any = None
    while True:
        ended = job.state in ENDED
        changed = job.pictures is not pictures
        pictures = job.pictures
        yield (
            job.id,
            shown.status(job, JOBS.before(job)),
            shown.curve(job.curve),
            list(pictures) if changed else gr.update(),
            shown.chart(None if job.erasure is None else job.erasure.record),
            job.report(markdown=True),
        )
        if ended:
            return
        job.wait(EVERY)


def stop_job(number: str) -> str:
    """End soon and keep what was learned."""
    return _ask(number, "stop")


def cancel_job(number: str) -> str:
    """End at once and keep nothing."""
    return _ask(number, "cancel")


def _ask(number: str, what: str) -> str:
    try:
        job = JOBS.get(number)
    except NoSuchJobError:
        return shown.status(None)
    if job.state not in ENDED:
        job.stop() if what == "stop" else job.cancel()
    return shown.status(job, JOBS.before(job))


def save_job(number: str, filename: str) -> tuple[str, str]:
    """Save what was trained, and say how a prompt calls it."""
    try:
        return _saved(number, filename)
    except (ErasureFileError, NoSuchJobError) as error:
        return "", shown.status(None, message=told(error))


def _saved(number: str, filename: str, picture: Any = None) -> tuple[str, str]:
    job = JOBS.get(number)
    if job.erasure is None:
        raise ErasureFileError("There is nothing to save yet. Train an erasure first.")
    path, problem = loras.save(job.erasure, filename.strip() or DEFAULT_NAME, picture)
    job.saved = path
    text = " ".join([f"Saved as {path}.", problem]).strip()
    return loras.tag_of(path.stem), shown.said(text)


def draw_job(number: str, filename: str, prompts: str) -> tuple[Any, Any, str, str]:
    """Draw before and after; the erasure is saved first, where it isn't yet."""
    try:
        tag, text = _saved(number, filename)
        job = JOBS.get(number)
        assert job.erasure is not None and job.saved is not None
        record = job.erasure.record
        pairs = draw.before_and_after(job.saved.stem, record, prompts)
        tag, text = _saved(number, filename, draw.as_preview(pairs))
        return draw.as_gallery(pairs), draw.as_sheet(pairs, draw.drawing_for(record)), tag, text
    except (
        ErasureFileError,
        NoSuchJobError,
        SettingsError,
        InterruptedByUserError,
        RuntimeError,
    ) as error:
        return gr.update(), gr.update(), "", shown.status(None, message=told(error))


def suggest_job(erase: str, kind: str) -> tuple[Any, Any, str]:
    """Look for other names of what is to be erased, and for near things."""
    try:
        names, neighbours = suggest.suggestions(erase, kind)
    except (SettingsError, InterruptedByUserError, RuntimeError) as error:
        return gr.update(), gr.update(), shown.status(None, message=told(error))
    text = "Look through them: what is near in the text encoder is no name of it for sure."
    return names, neighbours, shown.said(text)


# What there is to type and to see.


def _main_inputs() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["erase"] = gr.Textbox(
        label="Erase",
        lines=3,
        placeholder="what to stop drawing, one a line: cat => dog",
        info="Other names of one thing: cat | kitten. cat => dog says what to draw instead.",
        elem_id=f"{ID}_erase",
    )
    made["replace_with"] = gr.Textbox(
        label="Replace with",
        info="For lines that don't say it with =>. Empty: nothing in particular.",
        elem_id=f"{ID}_replace_with",
    )
    made["keep"] = gr.Textbox(
        label="Keep",
        lines=3,
        placeholder="prompts that must not change, one a line, most important first",
        info="A handful stays exact; the report says which. Short prompts leave more room.",
        elem_id=f"{ID}_keep",
    )
    made["negative_prompts"] = gr.Textbox(
        label="Negative prompts you use",
        lines=2,
        placeholder="one a line",
        info="They stay exact, like the empty one.",
        elem_id=f"{ID}_negative_prompts",
    )
    with gr.Row():
        kinds, presets = list(KINDS), list(PRESETS)
        made["kind"] = gr.Dropdown(kinds, value=kinds[0], label="Kind", elem_id=f"{ID}_kind")
        made["preset"] = gr.Dropdown(
            presets, value="balanced", label="Preset", elem_id=f"{ID}_preset"
        )
        made["training_seed"] = gr.Number(
            0, label="Training seed", precision=0, elem_id=f"{ID}_training_seed"
        )
    return made


# Label, default and hint of each expert value; those with choices have them instead of a default.
_EXPERT: dict[str, tuple[str, Any, str]] = {
    "model_type": ("Model type", list(MODEL_TYPES), "distilled: Turbo, Lightning, LCM, DMD2."),
    "form": ("Form", [AUTO, *FORMS], "hard holds kept prompts exactly, soft by a penalty."),
    "layers": ("Layers that train", [AUTO, *LAYER_RULES], "Others than auto need the soft form."),
    "templates": ("Own phrases", "", "One a line, with {} where the concept stands."),
    "steps": ("Steps", AS_PRESET, "-1: as the preset says; so in all that follow."),
    "rank": ("Rank", AS_PRESET, "Of the change, at most."),
    "learning_rate": ("Learning rate", AS_PRESET, "Relative to the size of each matrix."),
    "eta": ("Eta (push beyond)", 0.0, "Above 0, the concept in a negative prompt draws it."),
    "protection": ("Protection of the rest", AS_PRESET, "Higher keeps more and erases less."),
    "drift_weight": ("Drift weight (soft form)", 1.0, "On the drift of the empty prompt."),
    "keep_weight": ("Keep weight (soft form)", 1.0, "On the drift of kept prompts."),
    "null_score": ("Null score (soft form)", list(NULL_SCORES), "Whose prediction counts."),
    "keep_room": (
        "Room beside kept prompts",
        EraseSettings.keep_room,
        "Less: more of them are exact, and other words change more.",
    ),
    "stop_below": ("Stop below (share left)", AS_PRESET, "Ends early; 0 never does."),
    "batch": ("Batch (states per step)", AS_PRESET, "1 needs the least memory."),
    "trajectories": ("Trajectories (sampling runs)", AS_PRESET, "To learn from."),
    "resolution": ("Resolution", 0, "0: the size the model was made for."),
    "captions": ("Captions (language read)", AS_PRESET, "They stand for the rest."),
    form.REUSE_INPUT: ("Stored result", list(REUSE), "The same training is found again."),
}


def _expert_inputs() -> dict[str, Any]:
    with gr.Accordion("Expert settings", open=False, elem_id=f"{ID}_expert"):
        return {name: _expert_input(name, *what) for name, what in _EXPERT.items()}


def _expert_input(name: str, label: str, value: Any, hint: str) -> Any:
    named: dict[str, Any] = {"label": label, "info": hint, "elem_id": f"{ID}_{name}"}
    if isinstance(value, list):
        return gr.Dropdown(value, value=value[0], **named)
    if isinstance(value, str):
        return gr.Textbox(value, lines=2, **named)
    if name in form.WHOLE:
        return gr.Number(value, precision=0, **named)
    return gr.Number(value, **named)


_NAMES = ("lines", "neighbours", "found")


def _names() -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Accordion("Other names, and what is near", open=False, elem_id=f"{ID}_names"):
        made["suggest"] = gr.Button("Suggest names", elem_id=f"{ID}_suggest")
        for name, text in (
            ("lines", "The lines under Erase with other names, to be copied there"),
            ("neighbours", "Near things that you may want to keep"),
        ):
            made[name] = gr.Textbox(
                label=text, lines=2, show_copy_button=True, elem_id=f"{ID}_{name}"
            )
        made["found"] = gr.HTML("", elem_id=f"{ID}_found")
    return made


def _outputs() -> dict[str, Any]:
    """What a run shows, in the order in which it is told; the chart begins with the verdict."""
    status = gr.HTML(shown.status(None), elem_id=f"{ID}_status")
    curve = gr.HTML("", elem_id=f"{ID}_curve")
    chart = gr.HTML("", elem_id=f"{ID}_chart")
    pictures = gr.Gallery(
        label="Pictures of the training", columns=4, height=220, elem_id=f"{ID}_pictures"
    )
    return {
        "status": status,
        "curve": curve,
        "pictures": pictures,
        "chart": chart,
    }


def _saving() -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Row():
        made["filename"] = gr.Textbox(
            DEFAULT_NAME, label="File name in models/Lora", elem_id=f"{ID}_filename"
        )
        made["save"] = gr.Button("Save", elem_id=f"{ID}_save")
    made["saved"] = gr.HTML("", elem_id=f"{ID}_saved")
    made["tag"] = gr.Textbox(
        label="For your prompts",
        interactive=False,
        show_copy_button=True,
        elem_id=f"{ID}_tag",
    )
    made["prompts"] = gr.Textbox(
        label="Prompts to draw before and after",
        lines=2,
        placeholder="one a line; empty: what was erased, what was kept, and what nobody named",
        elem_id=f"{ID}_prompts",
    )
    made["draw"] = gr.Button("Draw before and after", elem_id=f"{ID}_draw")
    made["gallery"] = gr.Gallery(label="Before and after", columns=2, elem_id=f"{ID}_gallery")
    made["sheet"] = gr.Image(
        label="All of it on one sheet", type="pil", interactive=False, elem_id=f"{ID}_sheet"
    )
    return made
