"""Saving and loading in a running host: what is told, what lies beside, what the list offers."""

from __future__ import annotations

import io
import json
import os
import urllib.parse

import pytest
import torch
from concept_surgery.erase_core import Erasure, erase, preset_settings
from concept_surgery.erase_core.artefact.saving import save_erasure
from concept_surgery.nodes.pictures import small_png
from PIL import Image
from safetensors.torch import save_file

from tools import graphs
from tools.host import ComfyHost, Event, GraphRejected

from ..core.toy import ToyDenoiser


@pytest.fixture(scope="module")
def loras(server):
    return server.models("loras")


@pytest.fixture(scope="module")
def source(server, loras) -> str:
    """An erasure that the graphs of this file load, so that nothing is trained there."""
    values = {"resolution": 32, "captions": 40, "trajectories": 0}
    erasure = erase(preset_settings("instant", concepts="cat => dog", **values), ToyDenoiser())
    save_erasure(erasure, loras, "saving/source")
    return os.path.join("saving", "source.safetensors")


def saving(source: str, filename: str, **values):
    graph = graphs.load(filename=source)
    graph |= graphs.node(
        "save", "ConceptSurgerySave", erasure=("load", 0), filename=filename, **values
    )
    return graph


def said(server: ComfyHost, graph) -> list[str]:
    """Texts under the node that saves, in their order."""
    events: list[Event] = []
    server.run(graph, on_progress=events.append)
    found = [event["data"] for event in events if event["type"] == "progress_text"]
    return [one["text"] for one in found if one["node"] == "save"]


def listed(server: ComfyHost) -> list[str]:
    """As the front end asks for it; older hosts give the names themselves in place of COMBO."""
    kind, *more = server.object_info("ConceptSurgeryLoad")["input"]["required"]["filename"]
    return kind if isinstance(kind, list) else more[0]["options"]


def test_the_name_is_told_before_and_after(server, loras, source):
    graph = saving(source, "saving/%year%/told") | graphs.show("path", ("save", 0))
    before, *_, after = said(server, graph)
    (folder,) = (loras / "saving").glob("20*")
    assert before == f"Will be saved as told.safetensors in {folder}"
    assert after == f"Saved told.safetensors in {folder}"
    other = saving(source, "saving/%year%/told", names="diffusers")
    assert said(server, other)[0].startswith("told.safetensors is there: unless it is the same")
    over = saving(source, "saving/%year%/told", if_taken="overwrite")
    assert said(server, over)[0] == f"Will overwrite told.safetensors in {folder}"
    assert [path.name for path in folder.glob("*.safetensors")] == ["told.safetensors"]


def test_the_concept_can_be_in_the_name(server, loras, source):
    before, *_, after = said(server, saving(source, "saving/no_%concept%"))
    assert before == f"Will be saved in {loras}" and "Saved no_cat.safetensors" in after


def test_the_picture_is_what_the_hosts_library_shows(server, loras, source):
    graph = saving(source, "saving/shown", picture=("sheet", 0))
    graph |= graphs.node(
        "sheet", "EmptyImage", width=1024, height=640, batch_size=2, color=0xFF8000
    )
    server.run(graph)
    with Image.open(loras / "saving" / "shown.preview.png") as beside:
        assert beside.size == (512, 320) and beside.getpixel((5, 5)) == (255, 128, 0)
    place = next(
        number
        for one in server.get("/experiment/models")
        if one["name"] == "loras"
        for number, folder in enumerate(one["folders"])
        if folder == str(loras)
    )
    name = urllib.parse.quote("saving/shown.safetensors")
    shown = server._request(f"/experiment/models/preview/loras/{place}/{name}")
    with Image.open(io.BytesIO(shown)) as image:
        assert image.size == (512, 320)
        assert (
            max(abs(a - b) for a, b in zip(image.getpixel((5, 5)), (255, 128, 0), strict=True)) < 8
        )
    card = json.loads((loras / "saving" / "shown.json").read_text("utf-8"))
    assert card["sd version"] == "SD1" and "cat" in card["description"]


def test_another_file_is_not_overwritten_and_it_is_said_before_anything_runs(server, loras, source):
    save_file({"x": torch.ones(2)}, loras / "saving" / "mine.safetensors")
    kept = (loras / "saving" / "mine.safetensors").read_bytes()
    with pytest.raises(GraphRejected, match="mine.safetensors is there already and is not an eras"):
        server.run(saving(source, "saving/mine", if_taken="overwrite"))
    with pytest.raises(GraphRejected, match="Unknown if taken 'always'"):
        server.run(saving(source, "saving/mine", if_taken="always"))
    server.run(saving(source, "saving/mine"))
    assert (loras / "saving" / "mine.safetensors").read_bytes() == kept
    assert Erasure.load(loras / "saving" / "mine_2.safetensors").concept == "cat"


def test_a_file_that_was_deleted_is_saved_again_though_nothing_else_runs(server, loras, source):
    graph, path = saving(source, "saving/deleted"), loras / "saving" / "deleted.safetensors"

    def run() -> list[str]:
        entry = server.run(graph)
        return next(d["nodes"] for kind, d in entry["status"]["messages"] if "cached" in kind)

    assert "save" not in run()
    assert "save" in run()
    for _ in range(2):
        path.unlink()
        assert "save" not in run()
        assert path.is_file()
        assert "save" in run()


def test_the_list_offers_erasures_alone_and_knows_new_ones(server, loras, source):
    save_file({"x": torch.ones(2)}, loras / "saving" / "a_lora.safetensors")
    (loras / "saving" / "broken.safetensors").write_bytes(b"\xff" * 100)
    names = listed(server)
    assert source in names
    assert not [name for name in names if "a_lora" in name or "broken" in name]
    (loras / "saving" / "new.safetensors").write_bytes((loras / source).read_bytes())
    assert os.path.join("saving", "new.safetensors") in listed(server)
    (loras / "saving" / "new.safetensors").unlink()
    assert os.path.join("saving", "new.safetensors") not in listed(server)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.safetensors", "'gone.safetensors' isn't among the LoRAs .* press R"),
        ("elsewhere/source.safetensors", "There is '.*source.safetensors': choose that"),
        ("saving/a_lora.safetensors", "is not an erasure made by Concept Surgery"),
        ("../../etc/passwd", "isn't among the LoRAs"),
    ],
)
def test_an_old_workflow_says_which_file_is_missing(server, loras, source, name, words):
    save_file({"x": torch.ones(2)}, loras / "saving" / "a_lora.safetensors")
    with pytest.raises(GraphRejected, match=words) as refusal:
        server.run(saving(name, "saving/never"))
    errors = refusal.value.node_errors["load"]["errors"]
    assert [error["extra_info"]["input_name"] for error in errors] == ["filename"]
    assert not list((loras / "saving").glob("never*"))


@pytest.mark.parametrize("picture", [None, torch.zeros(0, 8, 8, 3), torch.zeros(8, 8, 3), "sheet"])
def test_a_picture_that_is_none_is_said(picture):
    with pytest.raises(ValueError, match="'picture' brought no picture.*Compare Erasure"):
        small_png(picture, "Software", "text")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_of_every_kind_become_a_small_one(channels):
    values = torch.full((2, 900, 30, channels), float("nan"))
    values[:, 450:] = 7.0
    with Image.open(io.BytesIO(small_png(values, "Software", "Concept Surgery"))) as image:
        assert image.mode == "RGB" and image.size == (17, 512)
        assert image.getpixel((8, 5)) == (0, 0, 0) and image.getpixel((8, 500)) == (255,) * 3
        assert image.text == {"Software": "Concept Surgery"}


def test_a_node_that_saves_is_warned_of_though_apply_runs_from_the_cache(server, loras):
    """What is exact isn't in the weights; the host doesn't run Apply again for a node behind it."""
    entry = saved_for_the_checkpoint(server, loras)
    graph = graphs.loader("one-level.safetensors") | graphs.load(filename=entry)
    graph |= graphs.apply(erasure=("load", 0), mode="exact")
    graph |= graphs.node("seen", "PreviewAny", source=("apply", 0))
    server.run(graph)
    graph |= graphs.node("keep", "ModelSave", model=("apply", 0), filename_prefix="saved/model")
    events: list[Event] = []
    done = server.run(graph, on_progress=events.append)
    cached = next(d["nodes"] for kind, d in done["status"]["messages"] if "cached" in kind)
    assert "apply" in cached
    texts = [e["data"]["text"] for e in events if e["type"] == "progress_text"]
    assert [t for t in texts if "ModelSave (node keep) takes the weights alone" in t]


def saved_for_the_checkpoint(server: ComfyHost, loras) -> str:
    """An erasure that changes one matrix of the tests' checkpoint, by nothing."""
    values = {"resolution": 32, "captions": 40, "trajectories": 0}
    made = erase(preset_settings("instant", concepts="cat", **values), ToyDenoiser())
    basis = torch.linalg.qr(torch.randn(768, made.rank))[0]
    matrix = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    factors = {matrix: torch.zeros(320, basis.shape[1])}
    save_erasure(Erasure({matrix: basis}, factors, made.record), loras, "saving/applied")
    return os.path.join("saving", "applied.safetensors")
