"""The report's node: what it shows and hands on, in the host and in its own front end."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import folder_paths
import pytest
import torch
from concept_surgery.erase_core import Erasure, report_markdown, report_numbers, verdict
from concept_surgery.erase_core.artefact.chart import MARGIN, NAMES, neighbour_chart
from concept_surgery.faces import labels
from concept_surgery.nodes import messages
from concept_surgery.nodes.report import ErasureReport
from PIL import ImageFont

from tools import graphs
from tools.environment import ROOT

OLD_FILES = sorted((ROOT / "tests" / "core" / "old_files").glob("*.safetensors"))
SCRIPTS = ("猫", "🐱👩‍👩‍👧", "قطة", "गाय", "\u202e\x00\ud800", "é" * 400, "<script>|`")


@pytest.fixture(autouse=True)
def told(monkeypatch, tmp_path) -> list[str]:
    """What the node shows, outside a graph, with a temp folder of its own."""
    texts: list[str] = []
    monkeypatch.setattr(messages, "_send_text", lambda text, _: texts.append(messages.shown(text)))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    return texts


def record_of(path: Path) -> dict:
    return copy.deepcopy(dict(Erasure.load(path).record))


def test_the_node_shows_verdict_and_chart_and_hands_all_on(finished, told, tmp_path):
    given = ErasureReport.execute(finished)
    markdown, numbers, picture = given.args
    record = finished.record
    assert markdown == report_markdown(record) and "tiger" in markdown
    assert json.loads(numbers) == json.loads(json.dumps(report_numbers(record)))
    assert torch.equal(picture[0], labels.map_picture(record)) and picture.ndim == 4
    assert told == [messages.shown(" ".join(verdict(record)))]
    assert given.ui["text"] == (messages.shown("\n".join(verdict(record))),)
    (image,) = given.ui["images"]
    assert (tmp_path / image["subfolder"] / image["filename"]).exists()


@pytest.mark.parametrize("text", SCRIPTS)
@pytest.mark.parametrize("old_pillow", [False, True], ids=["free type", "bitmap letters"])
def test_no_script_breaks_the_chart(text, old_pillow, monkeypatch):
    if old_pillow:
        bitmap = ImageFont.load_default_imagefont()
        monkeypatch.setattr(labels, "_font", lambda *_: bitmap)
    record = record_of(OLD_FILES[-1])
    record["concepts"][0]["text"] = text
    record["measures"]["kept"][0]["text"] = text
    record["others"]["nearest"][0]["text"] = text
    picture = labels.map_picture(record)
    chart = neighbour_chart(record)
    assert picture.shape == (chart.height, chart.width, 3)
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    assert (picture[:, : MARGIN + NAMES] < 0.5).any()  # something is written
    bars = [box for box in chart.boxes if box.right > box.left]
    for box in bars:  # no name runs into its bar
        edge = picture[box.top : box.bottom, box.left - 8 : box.left]
        assert torch.equal(edge, picture[0, 0].expand_as(edge))


def test_the_chart_can_be_read_at_half_its_size():
    chart = neighbour_chart(record_of(OLD_FILES[-1]))
    assert chart.width == 1024 and min(line.size for line in chart.lines) / 2 >= 12


@pytest.mark.parametrize("path", OLD_FILES, ids=lambda path: path.stem)
def test_every_old_file_has_a_chart(path):
    assert labels.map_picture(Erasure.load(path).record).ndim == 3


def test_the_report_of_a_loaded_file_in_the_host(server):
    name = "for_report.safetensors"
    (server.models("loras") / name).write_bytes(OLD_FILES[-1].read_bytes())
    graph = graphs.load(filename=name) | graphs.report(erasure=("load", 0))
    graph |= graphs.show("markdown", ("report", 0)) | graphs.show("numbers", ("report", 1))
    graph |= graphs.node("preview", "PreviewImage", images=("report", 2))
    outputs = server.run(graph)["outputs"]
    lines = verdict(Erasure.load(OLD_FILES[-1]).record)
    assert "".join(outputs["report"]["text"]) == "\n".join(lines)
    assert len(outputs["report"]["images"]) == len(outputs["preview"]["images"]) == 1
    assert outputs["markdown"]["text"][0].startswith(f"**{lines[0]}**")
    assert json.loads(outputs["numbers"]["text"][0])["grade"] == "good"


def test_the_node_has_labels_tooltips_and_a_page(server):
    info = server.object_info("ConceptSurgeryReport")
    assert info["display_name"] == "Erasure Report" and info["output_node"]
    assert info["output_name"] == ["report", "numbers (JSON)", "map"]
    assert all(info["output_tooltips"])
    page = (ROOT / "web" / "docs" / "ConceptSurgeryReport.md").read_text("utf-8")
    assert all(f"**{name}**" in page for name in ("erasure", *info["output_name"]))
