"""The demo: train an erasure in a graph on a real host, and draw before and after.

Runs in ``build/venv``. The graph is the one a user would build, in API format. The model is the
small one of ``benchmarks/emoji``, which draws sixty named things in four named styles: it stands
in for Stable Diffusion, takes minutes on a CPU and needs no download.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat

from benchmarks.emoji.build import build_emoji_checkpoint
from tools import graphs
from tools.environment import BUILD, ToolError
from tools.host import ComfyHost, Event, GraphFailed, GraphRejected, HostError

OUTPUT = BUILD / "demo"
CHECKPOINT = "emoji.safetensors"
ABOUT_CHECKPOINT = (
    "a small model in the shape of Stable Diffusion 1.5, trained on emoji art: sixty things in the "
    "styles cartoon, flat, clay and ink"
)
METADATA_KEY = "concept_surgery"

CONCEPT, REPLACEMENT = "cat", "rabbit"
KEPT = ("a photo of a dog",)
STRENGTH = 1.0
# The role of a prompt and the prompt; none is a template that the erasure trains on but the first.
PROMPTS = (
    ("erased", "a photo of a cat"),
    ("erased", "the flat cat"),
    ("kept", "a photo of a dog"),
    ("never named", "a tiger, ink"),
    ("never named", "a fox in clay style"),
    ("never named", "a picture of a house"),
)
TRAINING: dict[str, Any] = {"resolution": 64, "captions": 200, "steps": -1}
SEED = 7
PICTURE: dict[str, Any] = {"size": 64, "steps": 20, "cfg": 4.0}

_TIMEOUT = 1800.0
_CELL = 192
_MARGIN = 16
_ROW_LABEL = 72


def run_demo(host_threads: int = 2) -> Path:
    """Run the demo and return the folder with the picture, the report and the graph."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    print(f"The demo trains on {ABOUT_CHECKPOINT}.", flush=True)
    began = time.monotonic()
    checkpoint = build_emoji_checkpoint(BUILD / "checkpoints" / CHECKPOINT)
    seconds = {"checkpoint": time.monotonic() - began}
    log = BUILD / "logs" / "host-demo.log"
    host = ComfyHost(checkpoints=[checkpoint], threads=host_threads, log=log)
    try:
        outputs, rows = _run_on(host, seconds)
    except (GraphFailed, GraphRejected, HostError, TimeoutError) as error:
        raise ToolError(f"The demo failed: {error}\nThe host's log is {log}") from error
    title = f"Erased: {CONCEPT!r}, replaced with {REPLACEMENT!r}, strength {STRENGTH:g}"
    sheet(rows, PROMPTS, title).save(OUTPUT / "before_after.png")
    erasure = Path(outputs["saved-path"]["text"][0])
    report = {
        "checkpoint": ABOUT_CHECKPOINT,
        "strength": STRENGTH,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "pictures": _changes(rows),
        "erasure_file": erasure.name,
        "record": read_record(erasure),
    }
    _write_json(OUTPUT / "report.json", report)
    _say_where_to_look(seconds, erasure)
    return OUTPUT


def _run_on(
    host: ComfyHost, seconds: dict[str, float]
) -> tuple[dict[str, Any], dict[str, list[Image.Image]]]:
    """Run the graph on a host of its own; its outputs and the pictures, row by row."""
    graph = demo_graph()
    _write_json(OUTPUT / "workflow.json", graph)
    progress = _Progress(graph)
    with host:
        seconds["host_start"] = host.start_seconds
        began = time.monotonic()
        try:
            outputs = host.run(graph, _TIMEOUT, progress)["outputs"]
        finally:
            progress.close()
        seconds["graph"] = time.monotonic() - began
        seconds["training"] = progress.seconds.get("train", 0.0)
        return outputs, {row: _pictures(host, outputs, row) for row in ("before", "after")}


def demo_graph() -> graphs.Graph:
    """Train, save and apply an erasure; draw each prompt without and with it."""
    graph = (
        graphs.loader(CHECKPOINT)
        | graphs.train(
            erase=CONCEPT,
            replace_with=REPLACEMENT,
            keep="\n".join(KEPT),
            training_seed=SEED,
            stored_result="train again",
            **TRAINING,
        )
        | graphs.save(filename=f"demo-{CONCEPT}")
        | graphs.show("saved-path", ("save", 0))
        | graphs.show("training-report", ("train", 2))
        | graphs.apply(strength=STRENGTH)
    )
    for row, model in (("before", "loader"), ("after", "apply")):
        for number, (_, text) in enumerate(PROMPTS):
            name = f"{row}-{number}"
            graph |= graphs.picture(name, text, seed=SEED, model=(model, 0), **PICTURE)
    return graph


def read_record(path: Path) -> Any:
    """The record that an erasure file carries about itself in its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return json.loads(header["__metadata__"][METADATA_KEY])


def sheet(
    rows: Mapping[str, Sequence[Image.Image]], prompts: Sequence[tuple[str, str]], title: str
) -> Image.Image:
    """Pictures in rows under their prompts, enlarged."""
    head = 4 * _MARGIN + 60
    width = _ROW_LABEL + len(prompts) * (_CELL + _MARGIN) + _MARGIN
    height = head + len(rows) * (_CELL + _MARGIN)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(22), ImageFont.load_default(15)
    draw.text((_MARGIN, _MARGIN), title, "black", large)
    draw.text((_MARGIN, _MARGIN + 28), f"On {ABOUT_CHECKPOINT}.", "#555555", small)
    for column, (role, text) in enumerate(prompts):
        left = _ROW_LABEL + column * (_CELL + _MARGIN)
        draw.text((left, head - 40), role, "black", small)
        draw.text((left, head - 21), f"“{text}”", "#555555", small)
    for row, (label, pictures) in enumerate(rows.items()):
        top = head + row * (_CELL + _MARGIN)
        draw.text((_MARGIN, top + _CELL // 2 - 10), label, "black", small)
        for column, picture in enumerate(pictures):
            left = _ROW_LABEL + column * (_CELL + _MARGIN)
            enlarged = picture.resize((_CELL, _CELL), Image.Resampling.BICUBIC)
            canvas.paste(enlarged, (left, top))
    return canvas


def _pictures(host: ComfyHost, outputs: Mapping[str, Any], row: str) -> list[Image.Image]:
    records = [outputs[f"{row}-{number}"]["images"][0] for number in range(len(PROMPTS))]
    return [Image.open(io.BytesIO(host.image(record))).convert("RGB") for record in records]


def _changes(rows: Mapping[str, Sequence[Image.Image]]) -> list[dict[str, Any]]:
    """How far each picture moved: the mean difference of a colour value, as part of its range."""
    pairs = zip(rows["before"], rows["after"], strict=True)
    moved = [ImageStat.Stat(ImageChops.difference(before, after)).mean for before, after in pairs]
    return [
        {"prompt": text, "role": role, "change": round(sum(bands) / len(bands) / 255, 4)}
        for (role, text), bands in zip(PROMPTS, moved, strict=True)
    ]


class _Progress:
    """One line on the terminal that follows the graph, and the seconds each node took."""

    def __init__(self, graph: graphs.Graph) -> None:
        self.seconds: dict[str, float] = {}
        self._graph = graph
        self._node: str | None = None
        self._began = 0.0
        self._width = 0

    def __call__(self, event: Event) -> None:
        data = event["data"]
        if event["type"] == "executing":
            self._enter(data.get("node"))
        elif event["type"] == "progress" and data.get("node") == self._node:
            share = data["value"] / data["max"]
            self._show(f"{self._label()}: {share:.0%}")
        elif event["type"] == "progress_text" and data.get("node") == self._node:
            self._show(f"{self._label()}: {data['text']}")

    def close(self) -> None:
        """End the line, so that what follows starts on its own."""
        if self._width:
            self._show("")
            sys.stdout.write("\r")
            sys.stdout.flush()

    def _enter(self, node: str | None) -> None:
        now = time.monotonic()
        if self._node is not None:
            self.seconds[self._node] = now - self._began
        self._node, self._began = node, now
        if node is None:
            return
        if sys.stdout.isatty():
            self._show(self._label())
        elif self._graph[node]["class_type"] in ("ConceptSurgeryTrain", "KSampler"):
            print(self._label(), flush=True)

    def _label(self) -> str:
        node = self._node or ""
        kind = self._graph.get(node, {}).get("class_type", "")
        if kind == "ConceptSurgeryTrain":
            return f"Training the erasure of {CONCEPT!r}"
        if kind == "KSampler":
            row, _, number = node.removesuffix("-sampler").partition("-")
            return f"Drawing {row}: {PROMPTS[int(number)][1]}"
        return kind

    def _show(self, text: str) -> None:
        if sys.stdout.isatty():
            sys.stdout.write("\r" + text.ljust(self._width))
            sys.stdout.flush()
            self._width = len(text)


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _say_where_to_look(seconds: Mapping[str, float], erasure: Path) -> None:
    print(
        f"Trained in {seconds['training']:.1f} s; the whole graph took {seconds['graph']:.1f} s.\n"
        "Look at:\n"
        f"  {OUTPUT / 'before_after.png'}\n"
        f"  {OUTPUT / 'report.json'}\n"
        f"  {OUTPUT / 'workflow.json'}\n"
        f"  {erasure}",
        flush=True,
    )
