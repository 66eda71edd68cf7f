"""The sheet that compares: its pictures are the host's own, and the model stays as it was."""

from __future__ import annotations

import dataclasses
import io
import itertools

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from concept_surgery.erase_core import Erasure, SettingsError
from concept_surgery.erase_core.artefact.sheet import EMPTY, ERASED, Layout, Row
from concept_surgery.faces import labels
from concept_surgery.nodes import compare, messages
from concept_surgery.nodes.apply import ApplyError, apply_erasure
from concept_surgery.nodes.compare import CompareErasure
from concept_surgery.nodes.families import UnsupportedModelError
from PIL import Image, ImageFont

from nodes import CLIPTextEncode, EmptyLatentImage, KSampler, VAEDecode
from tools import graphs
from tools.environment import ROOT
from tools.host import GraphFailed, GraphRejected

from .tiny import weights_hash

CHECKPOINT = "one-level.safetensors"
CAT, TREE = "a photo of a cat", "a tree"
SMALL = {"steps": 2, "width": 64, "height": 64, "seed": 5, "cfg": 3.0}
HOSTILE = ("🐱 猫 ‮cat\x00\x1b[0m", "x" * 5000, '<img src="x">[[a|b]]{}%s', "é" * 90)


@pytest.fixture(scope="module")
def vae(checkpoint):
    with torch.inference_mode():
        loaded = comfy.sd.load_checkpoint_guess_config(
            str(checkpoint), output_clip=False, output_model=False
        )
    return loaded[2]


@pytest.fixture(autouse=True)
def texts(monkeypatch, tmp_path) -> list[str]:
    """What the node shows, outside a graph, with a temp folder of its own."""
    told: list[str] = []
    monkeypatch.setattr(messages, "_send_text", lambda text, _: told.append(messages.shown(text)))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    fields = [(name, object, None) for name in ("prompt", "unique_id", "extra_pnginfo")]
    hidden = dataclasses.make_dataclass("Hidden", fields)()
    monkeypatch.setattr(CompareErasure, "hidden", hidden)
    return told


def compared(loaded, erasure, vae, **values):
    with torch.inference_mode():  # as the host runs nodes
        return CompareErasure.execute(loaded[0], erasure, loaded[1], vae, **{**SMALL, **values})


def host_picture(model, clip, vae, text, negative="", **values):
    """(height, width, 3) by the host's own nodes."""
    how = {"sampler_name": "euler", "scheduler": "normal", **SMALL, **values}
    with torch.inference_mode():
        pair = [CLIPTextEncode().encode(clip, words)[0] for words in (text, negative)]
        (latent,) = EmptyLatentImage().generate(how.pop("width"), how.pop("height"))
        (latent,) = KSampler().sample(
            model, positive=pair[0], negative=pair[1], latent_image=latent, **how
        )
        return VAEDecode().decode(vae, latent)[0][0]


def cell_of(sheet, layout, row, column):
    left, top = layout.cell(row, column)
    return sheet[0, top : top + layout.height, left : left + layout.width]


def test_each_column_is_what_the_hosts_nodes_give(loaded, finished, vae, tmp_path):
    model, clip = loaded
    before = weights_hash(model)
    out = compared(
        loaded, finished, vae, prompts=f"{CAT}\n{TREE}", strengths="1, 0", negative="mud"
    )
    sheet, untouched, last = out.args
    layout = Layout(2, 2, 64, 64)
    assert sheet.shape == (1, layout.size[1], layout.size[0], 3) and sheet.dtype == torch.float32
    assert untouched.shape == last.shape == (2, 64, 64, 3)
    assert torch.equal(untouched, last)  # the last strength is 0
    erased = apply_erasure(model, finished, 1.0)
    for row, text in enumerate((CAT, TREE)):
        for column, patched in enumerate((erased, model)):
            expected = host_picture(patched, clip, vae, text, "mud")
            assert torch.equal(cell_of(sheet, layout, row, column), expected)
        assert torch.equal(untouched[row], expected)
        assert not torch.equal(cell_of(sheet, layout, row, 0), expected)
    assert weights_hash(model) == before and not model.patches
    (saved,) = out.ui.as_dict()["images"]
    assert saved["type"] == "temp" and Image.open(tmp_path / saved["filename"]).size == layout.size


def test_exact_columns_samplers_and_sizes_are_as_asked(loaded, finished, vae):
    model, clip = loaded
    how = {"sampler_name": "dpmpp_2m", "scheduler": "karras", "width": 96, "height": 48, "seed": 9}
    sheet, untouched, last = compared(
        loaded, finished, vae, prompts=CAT, strengths="0.5", mode="exact", **how
    ).args
    layout = Layout(1, 2, 96, 48)
    assert sheet.shape[1:3] == (layout.size[1], layout.size[0])
    assert torch.equal(untouched[0], host_picture(model, clip, vae, CAT, **how))
    half = apply_erasure(model, finished, 0.5, "exact")
    assert torch.equal(last[0], host_picture(half, clip, vae, CAT, **how))
    assert torch.equal(cell_of(sheet, layout, 0, 0), untouched[0])
    assert torch.equal(cell_of(sheet, layout, 0, 1), last[0])


def test_left_alone_it_shows_concepts_kept_prompts_and_others(loaded, finished, vae, monkeypatch):
    asked = []

    def note(layout, rows, strengths, caption):
        asked.append((rows, strengths, caption))
        return torch.zeros(layout.size[1], layout.size[0], 3)

    monkeypatch.setattr(compare, "labelled", note)
    (sheet, *_) = compared(loaded, finished, vae, steps=1, cfg=0.0, width=0, height=0).args
    ((rows, strengths, caption),) = asked
    kinds = [row.kind for row in rows]
    assert kinds == ["erased", "kept", *["nobody named"] * (len(rows) - 3), "empty"]
    assert 4 <= len(rows) <= 6 and strengths == (0.0, 0.5, 1.0)
    assert [rows[0].text, rows[1].text] == [CAT, "a photo of a tiger"]
    settings = finished.record["settings"]
    size = settings["resolution"]
    assert f"cfg {settings['guidance_scale']:g}" in caption and f"{size} x {size}" in caption
    assert sheet.shape[1] == Layout(len(rows), 3, size, size).size[1]


def test_each_prompt_is_encoded_once_and_the_bar_goes_over_all_steps(
    loaded, finished, vae, monkeypatch, texts
):
    encoded, seen = [], []

    class Counting:
        def __getattr__(self, name):
            return getattr(loaded[1], name)

        def encode_from_tokens_scheduled(self, tokens):
            encoded.append(repr(tokens))
            return loaded[1].encode_from_tokens_scheduled(tokens)

    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: seen.append((done, total))
    )
    prompts, strengths = f'{CAT}\n""\n{TREE}', "0, 0.5, 1"
    compared((loaded[0], Counting()), finished, vae, prompts=prompts, strengths=strengths)
    assert len(encoded) == len(set(encoded)) == 3  # the empty prompt is the negative one, too
    steps = 3 * 3 * SMALL["steps"]
    own = [done for done, total in seen if total == steps]
    assert own == sorted(own) and set(own) == set(range(steps + 1))
    pictures = [text for text in texts if text.startswith("Picture")]
    assert len(pictures) == 9 and pictures[-1] == f"Picture 9 of 9, strength 1: {TREE}"
    assert "Picture 5 of 9, strength 0.5: no prompt" in pictures
    assert texts[-1].endswith("Drawn with seed 5, 2 steps, cfg 3, euler normal, 64 x 64.")


@pytest.mark.parametrize("mode", ["merge", "exact"])
def test_an_interrupt_passes_and_leaves_the_model_as_it_was(
    loaded, finished, vae, monkeypatch, mode
):
    model, clip = loaded
    before, plain = weights_hash(model), host_picture(model, clip, vae, CAT)

    def report(*_):
        place = []

        def stop(column, row, done):
            place.append((column, row, done))
            if (column, row, done) == (1, 1, 1):
                comfy.model_management.interrupt_current_processing(True)
            assert place[-1] <= (1, 1, 1)

        return stop

    monkeypatch.setattr(compare, "progress_of", report)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        compared(loaded, finished, vae, prompts=f"{CAT}\n{TREE}", strengths="0, 1, 2", mode=mode)
    assert weights_hash(model) == before and not model.patches
    assert torch.equal(host_picture(model, clip, vae, CAT), plain)


def test_hostile_prompts_are_drawn_and_shown_as_text(loaded, finished, vae, texts):
    prompts = "\n".join(HOSTILE)
    out = compared(loaded, finished, vae, prompts=prompts, strengths="0", steps=1)
    assert out.args[1].shape[0] == len(HOSTILE)
    assert not any("<img" in text or "[[a" in text or "\x00" in text for text in texts)
    refused = CompareErasure.validate_inputs(prompts="a \ud83d cat")
    assert "prompts has half of a character" in refused


@pytest.mark.parametrize(
    "text",
    [*HOSTILE, "\ud83d\udc00", "\x00" * 9, "\u200b", "a\ud800" * 99],
    ids=["emoji", "long", "markup", "accents", "pair", "nulls", "no width", "halves"],
)
@pytest.mark.parametrize("font", ["own", "old"])
def test_any_text_can_be_a_label_and_stays_in_its_place(text, font, monkeypatch):
    if font == "old":  # Pillow before 10.1
        old = ImageFont.load_default_imagefont
        monkeypatch.setattr(ImageFont, "load_default", lambda: old())
    layout = Layout(2, 2, 64, 64)
    drawn = labels.labelled(layout, [Row(text, ERASED), Row("", EMPTY)], (0.0, 1.0), text)
    assert drawn.shape == (layout.size[1], layout.size[0], 3)
    paper = torch.tensor(labels.BACKGROUND) / 255
    ink = (drawn - paper).abs().amax(-1) > 1e-6
    (left, top), bottom = layout.first, layout.cell(2, 0)[1]
    assert not ink[top : bottom - layout.gap, left:].any()  # where the pictures come
    assert not ink[:, layout.margin + layout.label_width :][top : bottom - layout.gap].any()
    assert not ink[:, : layout.margin // 2].any() and not ink[: layout.margin // 2].any()
    for row in range(2):
        left, top = layout.margin, layout.cell(row, 0)[1]
        assert ink[top : top + 2 * layout.line, left:].any()
        assert not ink[top + layout.height : top + layout.height + layout.gap // 2, left:].any()
    for column in range(2):
        place = layout.cell(0, column)[0]
        assert ink[: layout.first[1], place : place + layout.width].any()


@pytest.mark.parametrize("strengths", ["abc", "nan", "1e9", "", "1,2,3,4,5,-1,-2"])
def test_bad_strengths_are_refused_before_and_where_a_link_brings_them(
    loaded, finished, vae, strengths
):
    refused = CompareErasure.validate_inputs(strengths=strengths)
    assert isinstance(refused, str) and "strength" in refused
    with pytest.raises(SettingsError) as late:
        compared(loaded, finished, vae, strengths=strengths)
    assert str(late.value) == refused and late.value.setting == "strengths"


def test_what_is_linked_is_not_known_yet():
    assert CompareErasure.validate_inputs() is True
    assert CompareErasure.validate_inputs(prompts=CAT, negative="", strengths="0, 1") is True
    assert "negative has half" in CompareErasure.validate_inputs(negative="\ud83d")


def test_what_does_not_fit_is_refused_in_words_before_a_picture(loaded, finished, vae, monkeypatch):
    model, clip = loaded
    monkeypatch.setattr(compare, "sampled", lambda *_: pytest.fail("drawn all the same"))
    names = {f"lora_unet_elsewhere_{n}": name for n, name in enumerate(finished.factors)}
    bases, factors = (
        {new: tensors[old] for new, old in names.items()}
        for tensors in (finished.bases, finished.factors)
    )
    other = Erasure(bases, factors, finished.record)
    for strengths in ("0, 1", "0"):
        with pytest.raises(ApplyError, match="lacks .* matrices.*Load the kind of model"):
            compared(loaded, other, vae, strengths=strengths)
    with pytest.raises(ApplyError, match="already on this model"):
        compared((apply_erasure(model, finished, 1.0), clip), finished, vae)
    for name in ("mode", "sampler_name", "scheduler"):
        with pytest.raises(SettingsError, match=f"Unknown {name.replace('_', ' ')} 'none such'"):
            compared(loaded, finished, vae, **{name: "none such"})
    with pytest.raises(ValueError, match="No CLIP is connected"):
        compared((model, None), finished, vae)
    with pytest.raises(ValueError, match="No VAE is connected"):
        compared(loaded, finished, None)
    with pytest.raises(SettingsError, match="width is 8"):
        compared(loaded, finished, vae, width=8)


def test_a_video_is_drawn_as_one_frame_and_sound_is_refused(loaded, monkeypatch):
    model, latent_format = loaded[0], loaded[0].model.latent_format
    drawing = compare.Drawing("", 0, 2, 1.0, 96, 64, "euler", "normal")
    assert compare.empty_latent(model, drawing).shape == (1, 4, 8, 12)

    class FrameVae:
        def decode(self, latent):
            return torch.arange(3.0).view(1, 3, 1, 1, 1).expand(1, 3, 16, 16, 4)

    assert compare.decoded(FrameVae(), torch.zeros(1)).shape == (16, 16, 3)
    assert not compare.decoded(FrameVae(), torch.zeros(1)).any()
    monkeypatch.setattr(latent_format, "latent_dimensions", 1, raising=False)
    with pytest.raises(UnsupportedModelError, match="draws no pictures"):
        compare.empty_latent(model, drawing)


def test_its_inputs_are_explained_and_in_the_order_of_the_widgets():
    schema = CompareErasure.define_schema()
    assert all(given.tooltip for given in schema.inputs)
    assert [given.id for given in schema.inputs if not given.optional] == [
        "model",
        "erasure",
        "clip",
        "vae",
    ]
    page = (ROOT / "web" / "docs" / "ConceptSurgeryCompare.md").read_text("utf-8")
    shown = [given.id.split("_")[0] for given in schema.inputs]
    assert not [name for name in shown if f"**{name}" not in page]


def pixels(server, record) -> Image.Image:
    return Image.open(io.BytesIO(server.image(record))).convert("RGB")


def test_in_a_graph_the_sheet_is_on_the_node_and_the_ends_are_the_hosts(server, finished):
    finished.save(server.models("loras") / "compared.safetensors")
    graph = graphs.loader(CHECKPOINT) | graphs.load(filename="compared.safetensors")
    how = {"steps": 3, "cfg": 4.0, "seed": 2}
    prompts = f"{CAT}\n{TREE}"
    graph |= graphs.compare(prompts=prompts, strengths="0, 1", width=64, height=64, **how)
    for name, output in {"before": 1, "after": 2}.items():
        graph |= graphs.node(name, "SaveImage", images=("compare", output), filename_prefix=name)
    graph |= graphs.apply(erasure=("load", 0))
    for name, model in {"before": "loader", "after": "apply"}.items():
        graph |= graphs.picture(f"host-{name}", CAT, model=(model, 0), **how)
    entry = server.run(graph, timeout=240)
    (record,) = entry["outputs"]["compare"]["images"]
    layout = Layout(2, 2, 64, 64)
    sheet = pixels(server, record)
    assert record["type"] == "temp" and sheet.size == layout.size
    for column, name in enumerate(("before", "after")):
        mine, (his,) = (entry["outputs"][one]["images"] for one in (name, f"host-{name}"))
        expected = pixels(server, his).tobytes()
        assert len(mine) == 2 and pixels(server, mine[0]).tobytes() == expected
        left, top = layout.cell(0, column)
        assert sheet.crop((left, top, left + 64, top + 64)).tobytes() == expected
    assert pixels(server, entry["outputs"]["before"]["images"][0]).tobytes() != expected


@pytest.mark.parametrize(
    "name, value",
    [
        *itertools.product(["strengths"], ["abc", "nan", "1e9", "", "0,1,2,3,4,5,-1"]),
        ("prompts", "a\ud800"),
        ("negative", "a\ud800"),
        ("steps", 0),
        ("mode", "exacter"),
        ("sampler_name", "none such"),
        ("scheduler", "none such"),
    ],
)
def test_a_wrong_value_is_told_once_at_its_input(server, finished, name, value):
    finished.save(server.models("loras") / "refused-at-compare.safetensors")
    graph = graphs.loader(CHECKPOINT) | graphs.load(filename="refused-at-compare.safetensors")
    graph |= graphs.compare(**{name: value})
    with pytest.raises(GraphRejected) as rejected:
        server.queue(graph)
    (error,) = rejected.value.node_errors["compare"]["errors"]
    assert error["extra_info"]["input_name"] == name


def test_a_strength_that_a_link_brings_is_refused_at_the_node(server, finished):
    finished.save(server.models("loras") / "linked.safetensors")
    graph = graphs.loader(CHECKPOINT) | graphs.load(filename="linked.safetensors")
    graph |= graphs.node("typed", "PrimitiveString", value="0; much")
    graph |= graphs.compare(strengths=("typed", 0))
    with pytest.raises(GraphFailed, match="'much' is no strength"):
        server.run(graph)
