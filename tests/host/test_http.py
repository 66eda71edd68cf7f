"""The host itself, driven over HTTP: what the tests of the pack take for granted."""

from __future__ import annotations

import io
import time

import pytest
from PIL import Image

from tools import graphs
from tools.host import ComfyHost, GraphRejected


def pixels(server: ComfyHost, seed: int, text: str = "a photo of a cat") -> bytes:
    """Draw a picture in a graph of its own and return its raw pixels."""
    graph = graphs.loader("one-level.safetensors") | graphs.picture("shot", text, seed=seed)
    entry = server.run(graph)
    (record,) = entry["outputs"]["shot"]["images"]
    image = Image.open(io.BytesIO(server.image(record)))
    assert image.size == (64, 64)
    return image.convert("RGB").tobytes()


def predictions(server: ComfyHost, *texts: str) -> list[list[float]]:
    """The noise that the untouched model predicts for each of the texts."""
    graph = graphs.loader("one-level.safetensors")
    for number, text in enumerate(texts):
        graph |= graphs.prompt(f"text-{number}", text)
        graph |= graphs.prediction(f"probe-{number}", conditioning=(f"text-{number}", 0))
    outputs = server.run(graph)["outputs"]
    return [outputs[f"probe-{number}"]["prediction"] for number in range(len(texts))]


def test_server_lists_core_nodes(server):
    info = server.object_info("KSampler")
    assert {"model", "seed", "steps", "positive"} <= set(info["input"]["required"])
    with pytest.raises(LookupError):
        server.object_info("NoSuchNode")


def test_same_seed_gives_same_picture_and_another_seed_another(server):
    first = pixels(server, seed=1)
    server.free()  # or the second picture would come out of the host's cache
    assert pixels(server, seed=1) == first
    assert pixels(server, seed=2) != first
    assert len(set(first)) > 50


def test_prompt_matters_to_the_tiny_checkpoint(server):
    cat, empty = predictions(server, "a cat", "")
    mean = sum(empty) / len(empty)
    variance = sum((value - mean) ** 2 for value in empty) / len(empty)
    difference = sum((a - b) ** 2 for a, b in zip(cat, empty, strict=True)) / len(empty)
    assert difference > 0.05 * variance


def test_progress_and_interrupt(server):
    graph = graphs.loader("one-level.safetensors")
    graph |= graphs.picture("endless", "a cat", steps=2000)
    steps = []

    def stop_at_third(event):
        if event["type"] == "progress":
            steps.append(event["data"]["value"])
            if len(steps) == 3:
                server.interrupt()

    began = time.monotonic()
    entry = server.wait(server.queue(graph), timeout=60, on_progress=stop_at_third)
    assert entry["status"]["status_str"] == "error"
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    assert steps[:3] == sorted(steps[:3])
    assert time.monotonic() - began < 30


def test_rejected_graph_names_the_node(server):
    graph = graphs.loader("no-such-file.safetensors") | graphs.picture("shot", "a cat")
    with pytest.raises(GraphRejected) as refusal:
        server.queue(graph)
    assert list(refusal.value.node_errors) == ["loader"]
