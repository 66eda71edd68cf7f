"""The example workflows: a line of description each, and the files that the front end opens.

``python -m tools templates`` writes them into ``example_workflows/``; ``--pictures`` also trains
on the small model of the demo and draws their thumbnails.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.environment import ROOT

FOLDER = ROOT / "example_workflows"
# Sizes and places are those of the newer renderer. Told so, the front end shrinks everything alike
# for the older one; otherwise it stretches the nodes for the newer one and leaves some of them
# where they were. It also moves nodes off their groups where it has to find the view itself.
EXTRA = {"workflowRendererVersion": "Vue", "ds": {"scale": 0.65, "offset": [110, 135]}}
HUGGING_FACE = "https://huggingface.co"


@dataclass(frozen=True)
class Checkpoint:
    """One that people use, and where the front end may get it."""

    name: str
    url: str

    def model(self) -> dict[str, str]:
        """As the front end wants it in a node's properties, to offer the download."""
        return {"name": self.name, "url": self.url, "directory": "checkpoints"}


SD15 = Checkpoint(
    "v1-5-pruned-emaonly-fp16.safetensors",
    f"{HUGGING_FACE}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
    "v1-5-pruned-emaonly-fp16.safetensors",
)
SDXL = Checkpoint(
    "sd_xl_base_1.0.safetensors",
    f"{HUGGING_FACE}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/"
    "sd_xl_base_1.0.safetensors",
)
TURBO = Checkpoint(
    "sd_xl_turbo_1.0_fp16.safetensors",
    f"{HUGGING_FACE}/stabilityai/sdxl-turbo/resolve/main/sd_xl_turbo_1.0_fp16.safetensors",
)
PONY = Checkpoint(
    "ponyDiffusionV6XL_v6StartWithThisOne.safetensors",
    "https://civitai.com/api/download/models/290640",
)
ILLUSTRIOUS = Checkpoint(
    "Illustrious-XL-v0.1.safetensors",
    f"{HUGGING_FACE}/OnomaAIResearch/Illustrious-xl-early-release-v0/resolve/main/"
    "Illustrious-XL-v0.1.safetensors",
)
NOOBAI = Checkpoint(
    "NoobAI-XL-v1.1.safetensors",
    f"{HUGGING_FACE}/Laxhar/noobai-XL-1.1/resolve/main/NoobAI-XL-v1.1.safetensors",
)


@dataclass(frozen=True)
class Template:
    """What one workflow does.

    Attributes:
        stem: name of its files; the front end shows it.
        typed: values of *Train Concept Erasure*, by widget; None for a file that is loaded.
        file: the file that is saved, or loaded, without its ending.
        advice: what else its note says.
        drawn: values of *Compare Erasure*, by widget.
        resolution: side of the training pictures; 0 for the model's own.
        shown: what its thumbnail shows: a case of :mod:`tools.thumbnails`.
    """

    stem: str
    checkpoint: Checkpoint
    typed: dict[str, Any] | None
    file: str
    advice: str = ""
    drawn: dict[str, Any] = field(default_factory=dict)
    resolution: int = 0
    shown: str = "replace"


_BLURRY = "blurry, low quality"
_TAGS = "Write one tag a line as in your prompts, brackets as \\\\( and \\\\)."
_ANIME = {"kind": "tags", "erase": "cat ears => hair ribbon", "keep": "1girl, solo, smile"}


def _tags(stem: str, checkpoint: Checkpoint, negative: str) -> Template:
    return Template(
        stem,
        checkpoint,
        {**_ANIME, "negative_prompts": negative},
        "no_cat_ears",
        _TAGS,
        {"negative": negative},
        shown="tags",
    )


TEMPLATES = (
    Template(
        "replace_an_object",
        SD15,
        {
            "erase": "cat",
            "replace_with": "dog",
            "keep": "a photo of a tiger",
            "negative_prompts": _BLURRY,
        },
        "cat_to_dog",
        drawn={"negative": _BLURRY},
    ),
    Template(
        "remove_an_object",
        SD15,
        {"erase": "umbrella", "keep": "a photo of a raincoat", "negative_prompts": _BLURRY},
        "no_umbrella",
        "Nothing is named in its place. If traces stay, name something under *replace with*.",
        {"negative": _BLURRY},
        shown="remove",
    ),
    Template(
        "erase_a_style",
        SD15,
        {
            "erase": "Van Gogh",
            "keep": "a painting in Monet style",
            "negative_prompts": _BLURRY,
            "kind": "style",
        },
        "no_van_gogh",
        drawn={"negative": _BLURRY},
        shown="style",
    ),
    Template(
        "erase_several",
        SD15,
        {
            "erase": "cat | kitten => dog\ncar | automobile => bicycle\numbrella",
            "negative_prompts": _BLURRY,
        },
        "no_cats_cars_umbrellas",
        "One concept a line. Other names of the same thing stand between | signs.",
        {"negative": _BLURRY},
        shown="several",
    ),
    _tags("erase_tags_pony", PONY, "score_4, score_5, score_6"),
    _tags("erase_tags_illustrious", ILLUSTRIOUS, "worst quality, low quality"),
    _tags("erase_tags_noobai", NOOBAI, "worst quality, old, early, low quality"),
    Template(
        "erase_on_sdxl",
        SDXL,
        {
            "erase": "cat",
            "replace_with": "dog",
            "keep": "a photo of a tiger",
            "negative_prompts": _BLURRY,
        },
        "cat_to_dog_xl",
        "It needs 8 GB of GPU memory.",
        {"negative": _BLURRY},
        shown="sdxl",
    ),
    Template(
        "erase_on_a_distilled_model",
        TURBO,
        {
            "erase": "cat",
            "replace_with": "dog",
            "keep": "a photo of a tiger",
            "model_type": "distilled",
        },
        "cat_to_dog_turbo",
        "*model type* is distilled: few steps, and CFG 1, where negative prompts do nothing. For "
        "Lightning, LCM and DMD2 set steps and sampler as you use them. Turbo was made for 512 "
        "pixels, which *Erasure Settings* says; take that node out for others.",
        {"steps": 4, "cfg": 1.0, "sampler_name": "euler_ancestral"},
        512,
        shown="distilled",
    ),
    Template(
        "apply_a_saved_erasure",
        SD15,
        None,
        "cat_to_dog",
        "The sheet shows the file at several strengths. In a graph of your own put *Apply Erased "
        "UNet* between loader and sampler, or any LoRA loader.",
        {"strengths": "0, 0.25, 0.5, 0.75, 1, 1.25", "negative": _BLURRY},
        shown="sweep",
    ),
)

TRAINED = {
    "erase": "",
    "replace_with": "",
    "keep": "",
    "negative_prompts": "",
    "kind": "object",
    "preset": "balanced",
    "training_seed": 0,
    "model_type": "standard",
    "stored_result": "use if there",
}
DRAWN = {
    "prompts": "",
    "negative": "",
    "strengths": "0, 1",
    "mode": "merge",
    "seed": 7,
    "control": "fixed",  # what the front end does about the seed after a run
    "steps": 20,
    "cfg": 0.0,
    "sampler_name": "euler",
    "scheduler": "normal",
    "width": 0,
    "height": 0,
}
# The widgets of Erasure Settings in their order; the last but two is the resolution.
EXPERT = [
    *("auto", "auto", "", -1, -1, -1.0, 0.0, -1.0, 1.0, 1.0, "frozen", -1.0, -1, -1),
    *(0, -1, 0.25),
]
SAVED = [True, "kohya", "add a number"]

_NOTES = (
    "### Three steps\n\n1. Pick a checkpoint.\n2. Type what must go, under *erase*.\n3. Press "
    "*Run*.\n\nThe sheet shows each prompt before and after, with the same seed. The file is in "
    "`models/loras`, and works in every LoRA loader."
)
_APPLY_NOTES = (
    "### Three steps\n\n1. Pick the checkpoint.\n2. Pick the file of the erasure.\n3. Press *Run*."
)


class Workflow:
    """A graph in the format of the front end's files, put together node by node."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.groups: list[dict[str, Any]] = []

    def add(
        self,
        kind: str,
        box: tuple[int, int, int, int],
        values: list[Any],
        inputs: dict[str, tuple[str, tuple[int, int] | None]] | None = None,
        outputs: tuple[tuple[str, str], ...] = (),
        **properties: Any,
    ) -> int:
        """A node; its id.

        Args:
            box: left, top, width and height in pixels, without the title over it.
            values: of its widgets.
            inputs: type, and node and output that it is linked to, by the input's name.
            outputs: name and type of each.
        """
        number = len(self.nodes) + 1
        entries = []
        for slot, (name, (type_, source)) in enumerate((inputs or {}).items()):
            link = None if source is None else self._link(source, (number, slot), type_)
            entries.append({"name": name, "type": type_, "link": link})
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": list(box[:2]),
                "size": list(box[2:]),
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": entries,
                "outputs": [{"name": n, "type": t, "links": []} for n, t in outputs],
                "properties": {"Node name for S&R": kind, **properties},
                "widgets_values": values,
            }
        )
        return number

    def _link(self, source: tuple[int, int], target: tuple[int, int], type_: str) -> int:
        output = self.nodes[source[0] - 1]["outputs"][source[1]]
        number = len(self.links) + 1
        kind = output["type"] if type_ == "*" else type_  # what takes anything
        self.links.append([number, *source, *target, kind])
        output["links"].append(number)
        return number

    def group(self, title: str, box: tuple[int, int, int, int], colour: str = "#3f789e") -> None:
        """A frame with a title around some nodes."""
        entry = {"id": len(self.groups) + 1, "title": title, "bounding": list(box)}
        self.groups.append({**entry, "color": colour, "font_size": 24, "flags": {}})

    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": EXTRA,
            "version": 0.4,
        }


def workflow(template: Template) -> dict[str, Any]:
    """The workflow of a template."""
    graph = Workflow()
    note = _NOTES if template.typed is not None else _APPLY_NOTES
    text = f"{note}\n\n{template.advice}".strip()
    graph.add("MarkdownNote", (40, 70, 360, 330), [text])
    name = template.checkpoint.name
    outputs = (("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE"))
    loader = graph.add(
        "CheckpointLoaderSimple",
        (60, 640, 320, 110),
        [name],
        outputs=outputs,
        models=[template.checkpoint.model()],
    )
    graph.group("1  Pick a checkpoint", (40, 560, 360, 220))
    if template.typed is None:
        erasure = _loaded(graph, template)
    else:
        erasure = _trained(graph, template, loader)
    sheet = _compared(graph, template, loader, erasure)
    if template.typed is not None:
        _saved(graph, template, erasure, sheet)
    return graph.content()


def _loaded(graph: Workflow, template: Template) -> int:
    outputs = (("ERASURE", "ERASURE"), ("report", "STRING"))
    box = (480, 150, 420, 110)
    number = graph.add("ConceptSurgeryLoad", box, [f"{template.file}.safetensors"], outputs=outputs)
    graph.group("2  Pick the erasure", (460, 70, 460, 220), "#8A8")
    return number


def _trained(graph: Workflow, template: Template, loader: int) -> int:
    inputs: dict[str, tuple[str, tuple[int, int] | None]] = {
        "model": ("MODEL", (loader, 0)),
        "clip": ("CLIP", (loader, 1)),
        "settings": ("ERASE_SETTINGS", None),
    }
    height = 900
    if template.resolution:
        values = [*EXPERT[:-3], template.resolution, *EXPERT[-2:]]
        wire = (("SETTINGS", "ERASE_SETTINGS"),)
        box = (480, 1050, 420, 680)
        settings = graph.add("ConceptSurgerySettings", box, values, outputs=wire)
        inputs["settings"] = ("ERASE_SETTINGS", (settings, 0))
        height = 1700
    outputs = (("ERASURE", "ERASURE"), ("losses", "LOSS_MAP"), ("report", "STRING"))
    values = list({**TRAINED, **(template.typed or {})}.values())
    graph.group("2  Type what must go", (460, 70, 460, height), "#A88")
    return graph.add("ConceptSurgeryTrain", (480, 150, 420, 800), values, inputs, outputs)


def _compared(graph: Workflow, template: Template, loader: int, erasure: int) -> int:
    values = list({**DRAWN, **template.drawn}.values())
    inputs: dict[str, tuple[str, tuple[int, int] | None]] = {
        "model": ("MODEL", (loader, 0)),
        "erasure": ("ERASURE", (erasure, 0)),
        "clip": ("CLIP", (loader, 1)),
        "vae": ("VAE", (loader, 2)),
    }
    outputs = (("sheet", "IMAGE"), ("before", "IMAGE"), ("after", "IMAGE"))
    width = 480 if template.typed is not None else 1100
    graph.group("3  Press Run: before and after", (980, 70, width + 40, 1500), "#88A")
    box = (1000, 150, width, 1400)
    return graph.add("ConceptSurgeryCompare", box, values, inputs, outputs)


def _saved(graph: Workflow, template: Template, erasure: int, sheet: int) -> None:
    inputs: dict[str, tuple[str, tuple[int, int] | None]] = {
        "erasure": ("ERASURE", (erasure, 0)),
        "picture": ("IMAGE", (sheet, 0)),
    }
    outputs, values = (("path", "STRING"),), [template.file, *SAVED]
    graph.group("The file, in models/loras", (1560, 70, 420, 420), "#444")
    graph.add("ConceptSurgerySave", (1580, 150, 380, 300), values, inputs, outputs)


def write(folder: Path = FOLDER) -> None:
    """Write the files of all templates."""
    for template in TEMPLATES:
        (folder / f"{template.stem}.json").write_text(text_of(template), encoding="utf-8")


def text_of(template: Template) -> str:
    """The content of a template's file."""
    return json.dumps(workflow(template), indent=1, ensure_ascii=False) + "\n"
