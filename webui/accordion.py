"""Erasures that are always on: an accordion in txt2img and img2img, and what it does to a picture.

They go into the picture through the host's own LoRA machinery, as a tag that is put into the prompt
of a batch before the host reads tags; neither the prompt nor the info text shows it. The info text
has a line of its own, from which the accordion is filled in again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from modules import scripts

from ..erase_core import Erasure, ErasureFileError, SettingsError
from ..erase_core.artefact.stack import STRONGEST
from . import loras
from .errors import UnsupportedModelError

TITLE = "Concept Surgery"
NAMES, STRENGTH = "Concept Surgery", "Concept Surgery strength"  # in the info text
BETWEEN = " | "  # names in it
_FLAGS = {"SD1.x": "is_sd1", "SD2": "is_sd2", "SD2 (v)": "is_sd2", "SDXL": "is_sdxl"}


@dataclass(frozen=True)
class Applied:
    """Which erasures a picture is drawn with, and how strongly."""

    names: tuple[str, ...] = ()
    strength: float = 1.0

    def __bool__(self) -> bool:
        return bool(self.names) and self.strength != 0


class Everywhere:
    """What the API has switched on for every picture, whatever its accordion says."""

    def __init__(self) -> None:
        self.applied = Applied()

    def set(self, names: Any, strength: Any) -> Applied:
        """Switch on, or with no names off.

        Raises:
            SettingsError, ErasureFileError: values that can't work.
        """
        applied = checked(names, strength)
        for name in applied.names:
            loras.path_of(name)
        self.applied = applied
        return applied


EVERYWHERE = Everywhere()


def checked(names: Any, strength: Any) -> Applied:
    """What was chosen.

    Raises:
        SettingsError: something else than names and a number.
    """
    if isinstance(names, str):
        names = [names]
    if not isinstance(names or [], Iterable) or not all(isinstance(n, str) for n in names or []):
        raise SettingsError(f"erasures must be a list of names, not {names!r:.60}.", "erasures")
    try:
        number = float(strength)
    except (TypeError, ValueError):
        number = float("nan")
    if not -STRONGEST <= number <= STRONGEST:
        raise SettingsError(
            f"strength must be a number from -{STRONGEST:g} to {STRONGEST:g}, not "
            f"{strength!r:.60}. 1 is as trained.",
            "strength",
        )
    return Applied(tuple(dict.fromkeys(filter(None, names or []))), number)


class ConceptSurgeryScript(scripts.Script):
    """Shown under every prompt; with nothing chosen it does nothing at all."""

    def title(self) -> str:
        """The script's name, by which the host's API calls it, too."""
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        """In both tabs."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """The accordion."""
        tab = "img2img" if is_img2img else "txt2img"
        with gr.Accordion(TITLE, open=False, elem_id=f"{tab}_concept_surgery"):
            names = gr.Dropdown(
                loras.erasures(),
                value=[],
                multiselect=True,
                label="Erasures that are applied to every picture",
                elem_id=f"{tab}_concept_surgery_names",
            )
            strength = gr.Slider(
                -2.0,
                2.0,
                value=1.0,
                step=0.05,
                label="Strength of the erasures",
                elem_id=f"{tab}_concept_surgery_strength",
            )
            refresh = gr.Button("Refresh the list", elem_id=f"{tab}_concept_surgery_refresh")
        refresh.click(
            lambda: gr.update(choices=loras.erasures()), [], [names], show_progress="hidden"
        )
        self.infotext_fields = [(names, pasted), (strength, strength_in)]
        self.paste_field_names = [NAMES, STRENGTH]
        return [names, strength]

    def process(self, p: Any, names: Any = (), strength: Any = 1.0, *_: Any) -> None:
        """Write down what the picture is drawn with, before any of it is.

        Raises:
            SettingsError, ErasureFileError: values that can't work.
        """
        applied = both(names, strength)
        p.concept_surgery_applied = applied
        for one in applied:
            for name in one.names:
                _warn_of_another_base(p, name)
        written = [name for one in applied for name in one.names]
        if written:
            p.extra_generation_params[NAMES] = BETWEEN.join(written)
            strengths = {f"{one.strength:g}" for one in applied}
            p.extra_generation_params[STRENGTH] = BETWEEN.join(sorted(strengths))

    def before_process_batch(self, p: Any, *_: Any, **__: Any) -> None:
        """Tags for the host's LoRA code, which takes them out again before anything is drawn."""
        applied = getattr(p, "concept_surgery_applied", ())
        p.prompts[:] = [prompt + tags_for(prompt, applied) for prompt in p.prompts]

    def process_batch(self, p: Any, *_: Any, **__: Any) -> None:
        """The same for the second pass of a picture that is drawn in two sizes."""
        from modules import extra_networks

        wanted = getattr(p, "hr_extra_network_data", None)
        if not getattr(p, "enable_hr", False) or not isinstance(wanted, Mapping):
            return
        there = wanted.get("lora", [])
        known = {params.items[0] for params in there if params.items}
        more = [
            extra_networks.ExtraNetworkParams(items=[name, f"{one.strength:g}"])
            for one in getattr(p, "concept_surgery_applied", ())
            for name in one.names
            if name not in known
        ]
        if more:
            wanted["lora"] = [*there, *more]  # type: ignore[index]


def both(names: Any, strength: Any) -> list[Applied]:
    """What the accordion and the API have switched on; each erasure once.

    Raises:
        SettingsError, ErasureFileError: values that can't work, an erasure that isn't there.
    """
    own, everywhere = checked(names, strength), EVERYWHERE.applied
    rest = Applied(tuple(n for n in everywhere.names if n not in own.names), everywhere.strength)
    applied = [one for one in (own, rest) if one]
    for one in applied:
        for name in one.names:
            loras.path_of(name)
    return applied


def tags_for(prompt: str, applied: Sequence[Applied]) -> str:
    """Tags of the erasures that a prompt doesn't name itself: twice would be twice as strong."""
    from modules import extra_networks

    _, tags = extra_networks.parse_prompt(prompt)
    known = {params.items[0] for params in tags.get("lora", ()) if params.items}
    return "".join(
        loras.tag_of(name, one.strength)
        for one in applied
        for name in one.names
        if name not in known
    )


def names_in(params: Mapping[str, Any]) -> list[str]:
    """The erasures that an info text names, as far as they are there; none where it names none."""
    names = [name for name in str(params.get(NAMES, "")).split(BETWEEN) if name]
    there = loras.erasures() if names else []
    return [name for name in names if name in there]


def pasted(params: Mapping[str, Any]) -> Any:
    """What an info text makes of the list. Pages drop a value that isn't among the choices."""
    return gr.update(choices=loras.erasures(), value=names_in(params))


def strength_in(params: Mapping[str, Any]) -> float | None:
    """The strength that an info text names."""
    try:
        return float(str(params[STRENGTH]).split(BETWEEN)[0])
    except (KeyError, ValueError):
        return None


def _warn_of_another_base(p: Any, name: str) -> None:
    """An erasure of another family of models does nothing, or harm."""
    from modules import shared

    try:
        family = Erasure.load(loras.path_of(name)).record.get("family", "")
    except (ErasureFileError, UnsupportedModelError) as error:
        _comment(p, str(error))
        return
    sd_model, flag = shared.sd_model, _FLAGS.get(family)
    known = any(getattr(sd_model, other, False) for other in _FLAGS.values())
    if known and (flag is None or not getattr(sd_model, flag, False)):
        _comment(
            p,
            f"The erasure {name!r} was made for {family} and does nothing for the model that is "
            "loaded. Train it on this model, or switch it off.",
        )


def _comment(p: Any, text: str) -> None:
    comment = getattr(p, "comment", None)
    if comment is not None:
        comment(f"Concept Surgery: {text}")
