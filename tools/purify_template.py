"""The example workflow that purifies a picture; ``python -m tools.purify_template`` writes it."""

from __future__ import annotations

import json
from typing import Any

from tools.templates import FOLDER, SD15, TRAINED, Workflow

STEM = "purify_a_picture"
NOTE = (
    "### Three steps\n\n1. Pick a checkpoint.\n2. Pick your picture, and type what must go from "
    "it, under *erase*.\n3. Press *Run*.\n\n*Purify Image* finds where the picture shows it, draws "
    "that place again, and leaves the rest as it is. In the mask it is white. The reconstruction "
    "shows what the inversion alone loses.\n\nIf nothing is found, describe the picture in *Purify "
    "Image*, with the concept in it: *a cat on a bench*. A style can't do without."
)
PURIFIED = ["", "auto", 20, 0.8, 4.0, 1.0]  # the widgets of Purify Image


def workflow() -> dict[str, Any]:
    """What the file holds. Everything that is shown hangs on Purify Image."""
    graph = Workflow()
    graph.add("MarkdownNote", (40, 70, 360, 440), [NOTE])
    outputs = (("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE"))
    models = [SD15.model()]
    box = (60, 640, 320, 110)
    loader = graph.add("CheckpointLoaderSimple", box, [SD15.name], outputs=outputs, models=models)
    graph.group("1  Pick a checkpoint", (40, 560, 360, 220))
    typed = list({**TRAINED, "erase": "cat", "replace_with": "dog"}.values())
    trained = graph.add(
        "ConceptSurgeryTrain",
        (480, 150, 420, 800),
        typed,
        {
            "model": ("MODEL", (loader, 0)),
            "clip": ("CLIP", (loader, 1)),
            "settings": ("ERASE_SETTINGS", None),
        },
        (("ERASURE", "ERASURE"), ("losses", "LOSS_MAP"), ("report", "STRING")),
    )
    images = (("IMAGE", "IMAGE"), ("MASK", "MASK"))
    picture = graph.add("LoadImage", (480, 1050, 420, 440), ["example.png"], outputs=images)
    graph.group("2  Pick a picture, type what must go", (460, 70, 460, 1440), "#A88")
    purified = graph.add(
        "ConceptSurgeryPurify",
        (1000, 150, 440, 800),
        PURIFIED,
        {
            "model": ("MODEL", (loader, 0)),
            "erasure": ("ERASURE", (trained, 0)),
            "clip": ("CLIP", (loader, 1)),
            "vae": ("VAE", (loader, 2)),
            "image": ("IMAGE", (picture, 0)),
        },
        (
            ("purified", "IMAGE"),
            ("reconstruction", "IMAGE"),
            ("mask", "MASK"),
            ("report", "STRING"),
        ),
    )
    for kind, box, output, type_, values in (
        ("SaveImage", (1520, 150, 420, 460), 0, "images IMAGE", ["purified"]),
        ("PreviewImage", (1980, 150, 420, 460), 1, "images IMAGE", []),
        ("MaskPreview", (1980, 700, 420, 460), 2, "mask MASK", []),
        ("PreviewAny", (1520, 700, 420, 300), 3, "source *", []),
    ):
        name, wanted = type_.split()
        graph.add(kind, box, values, {name: (wanted, (purified, output))})
    graph.group("3  Press Run: purified, reconstruction, mask", (980, 70, 1440, 1110), "#88A")
    return graph.content()


def text() -> str:
    """The content of the file."""
    return json.dumps(workflow(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (FOLDER / f"{STEM}.json").write_text(text(), encoding="utf-8")
