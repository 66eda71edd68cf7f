"""Purify Image in the host: pictures in and out, what can't be done is said in words."""

from __future__ import annotations

import dataclasses
import io

import comfy.latent_formats
import comfy.model_management
import comfy.sd
import comfy.utils
import numpy as np
import pytest
import torch
from concept_surgery.erase_core import SettingsError
from concept_surgery.erase_core.run import purify as engine
from concept_surgery.nodes import messages
from concept_surgery.nodes import purify as module
from concept_surgery.nodes.apply import ApplyError, apply_erasure
from concept_surgery.nodes.families import UnsupportedModelError
from concept_surgery.nodes.host import ComfyDenoiser
from concept_surgery.nodes.purify import PurifyImage, usable_pixels
from PIL import Image

from tools import graphs
from tools.environment import ROOT
from tools.host import GraphFailed, GraphRejected

from .small import built_model
from .tiny import weights_hash

CHECKPOINT = "one-level.safetensors"
EVERYWHERE = {"area": "everywhere", "steps": 3, "start_level": 0.6}


@pytest.fixture(scope="module")
def vae(checkpoint):
    with torch.inference_mode():
        loaded = comfy.sd.load_checkpoint_guess_config(
            str(checkpoint), output_clip=False, output_model=False
        )
    return loaded[2]


@pytest.fixture(autouse=True)
def texts(monkeypatch) -> list[str]:
    """What the node shows, outside a graph."""
    told: list[str] = []
    monkeypatch.setattr(messages, "_send_text", lambda text, _: told.append(messages.shown(text)))
    fields = [(name, object, None) for name in ("prompt", "unique_id")]
    monkeypatch.setattr(PurifyImage, "hidden", dataclasses.make_dataclass("Hidden", fields)())
    return told


def image(count=1, height=48, width=64, channels=3) -> torch.Tensor:
    shape = (count, height, width, channels)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def purified(loaded, erasure, vae, given=None, **values):
    with torch.inference_mode():  # as the host runs nodes
        picture = image() if given is None else given
        return PurifyImage.execute(
            loaded[0], erasure, loaded[1], vae, picture, **{**EVERYWHERE, **values}
        ).args


def test_each_picture_of_a_batch_is_drawn_again_and_the_model_stays(loaded, finished, vae, texts):
    model = loaded[0]
    before = weights_hash(model)
    batch = image(2)
    pictures, again, mask, report = purified(loaded, finished, vae, batch)
    assert pictures.shape == again.shape == batch.shape and mask.shape == (2, 48, 64)
    assert mask.all() and not torch.equal(pictures, again)
    assert weights_hash(model) == before and not model.patches
    assert report.count("drawn again as a whole") == 2 and "dB" in report
    assert texts[-1].startswith("Picture 1 was drawn")
    alone = purified(loaded, finished, vae, batch[1:])[0]
    assert torch.equal(alone[0], pictures[1])  # what else is in the batch doesn't matter


def test_the_reconstruction_is_the_vaes_and_the_same_through_the_erased_model(
    loaded, finished, vae
):
    _, again, _, report = purified(loaded, finished, vae, steps=6)
    with torch.inference_mode():
        own = vae.decode(vae.encode(image()))[..., :3].clamp(0, 1)
    assert module.psnr(own, again) > 30
    asked = module.purification("", steps=6, start_level=0.6)
    with torch.inference_mode(False), ComfyDenoiser(*loaded, "", 1, 64) as denoiser:
        latent = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(1))
        plain, erased = engine.reconstructed(latent, asked, finished, denoiser)
    assert (plain - erased).norm() / plain.norm() < 1e-5


def test_where_it_is_not_seen_pixels_stay_and_where_it_is_the_edge_is_soft(
    loaded, finished, vae, monkeypatch
):
    half = torch.zeros(1, 1, 6, 8)
    half[..., :4] = 1
    for mask in (torch.zeros(1, 1, 6, 8), half):
        monkeypatch.setattr(engine, "places", lambda *_, mask=mask: mask)
        pictures, _, shown, report = purified(loaded, finished, vae, area="where it is seen")
        away = image()[:, :, 40:]
        assert torch.equal(pictures[:, :, 40:], away)
        assert torch.equal(pictures, image()) == (not mask.any())
        assert (0 < shown).logical_and(shown < 1).any() == bool(mask.any())
    assert "drawn again in 50%" in report and "'a photo of a cat'" in report


def test_level_0_gives_the_picture_back(loaded, finished, vae, monkeypatch):
    monkeypatch.setattr(ComfyDenoiser, "predict_x0", lambda *_: pytest.fail("predicted"))
    pictures, *_, report = purified(loaded, finished, vae, start_level=0.0)
    assert torch.equal(pictures, image()) and "no difference" in report


def test_sizes_channels_and_alpha_are_as_in_vae_encode_and_said(loaded, finished, vae):
    pixels, notes = usable_pixels(image(1, 53, 70, 4), vae)
    assert pixels.shape == (1, 48, 64, 3)
    assert torch.equal(pixels, vae.vae_encode_crop_pixels(image(1, 53, 70, 4)[..., :3]))
    assert "alpha" in notes[0] and "70 x 53 to 64 x 48" in notes[1]
    grey, none = usable_pixels(image(1, 48, 64, 1), vae)
    assert grey.shape == (1, 48, 64, 3) and not none
    pictures = purified(loaded, finished, vae, image(1, 53, 70, 4), steps=1)[0]
    assert pictures.shape == (1, 48, 64, 3)
    for wrong in (image(1, 5, 64), torch.zeros(0, 8, 8, 3), "a picture", torch.zeros(8, 8, 3)):
        with pytest.raises(SettingsError, match="image is") as refused:
            usable_pixels(wrong, vae)
        assert refused.value.setting == "image"


def test_what_does_not_fit_is_refused_in_words(loaded, finished, vae, monkeypatch):
    model, clip = loaded
    with pytest.raises(ApplyError, match="already on this model"):
        purified((apply_erasure(model, finished, 1.0), clip), finished, vae)
    names = {f"lora_unet_elsewhere_{n}": name for n, name in enumerate(finished.factors)}
    other = dataclasses.replace(
        finished,
        bases={new: finished.bases[old] for new, old in names.items()},
        factors={new: finished.factors[old] for new, old in names.items()},
    )
    with pytest.raises(ApplyError, match="lacks .* matrices"):
        purified(loaded, other, vae)
    with pytest.raises(ValueError, match="No CLIP is connected"):
        purified((model, None), finished, vae)
    with pytest.raises(ValueError, match="No VAE is connected"):
        purified(loaded, finished, None)

    style = dataclasses.replace(
        finished, record={**finished.record, "concepts": [{"text": "ink", "kind": "style"}]}
    )
    with pytest.raises(SettingsError, match="Type what is on the picture"):
        purified(loaded, style, vae)

    class OtherVae:
        def __getattr__(self, name):
            return getattr(vae, name)

        def encode(self, pixels):
            return torch.zeros(1, 16, 6, 8)

    with pytest.raises(UnsupportedModelError, match="Connect the VAE that belongs"):
        purified(loaded, finished, OtherVae())
    monkeypatch.setattr(model.model, "concat_keys", ("mask",), raising=False)
    with pytest.raises(UnsupportedModelError, match="it is an inpainting model"):
        purified(loaded, finished, vae)
    monkeypatch.setattr(model.model.latent_format, "latent_dimensions", 1, raising=False)
    with pytest.raises(UnsupportedModelError, match="draws no pictures"):
        purified(loaded, finished, vae)


def test_a_cancel_passes_and_leaves_the_model(loaded, finished, vae, monkeypatch):
    before = weights_hash(loaded[0])

    def cancel(text, *_):
        if "drawing" in text.casefold():
            comfy.model_management.interrupt_current_processing(True)

    monkeypatch.setattr(module, "show_progress_text", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        purified(loaded, finished, vae)
    assert weights_hash(loaded[0]) == before


def test_the_bar_goes_over_all_pictures(loaded, finished, vae, monkeypatch, texts):
    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: seen.append((done, total))
    )
    purified(loaded, finished, vae, image(2), steps=2)
    own = [done for done, total in seen if total == 2000]
    assert own == sorted(own) and own[-1] > 1800
    assert "Picture 2 of 2: inverting the picture" in texts


@pytest.mark.parametrize("architecture", ["flux", "sd3", "wan"])
def test_flows_and_models_of_videos_invert_one_picture(architecture):
    """By the host's own sampling object; Wan takes a picture for a video of one frame."""
    model, clip = built_model(architecture)
    asked = module.purification("", steps=4, start_level=0.7)
    with torch.inference_mode(False), torch.no_grad(), ComfyDenoiser(model, clip, "", 1, 32) as d:
        latent = torch.randn(1, *d.latent_shape(64), generator=torch.Generator().manual_seed(1))
        (null,) = d.encode([""])
        sigmas = engine.schedule(d, asked)

        def predict(x, sigma):
            return d.predict_x0(x, torch.full((1,), sigma), [null])

        way = engine.inverted(latent, sigmas, predict)
        again = engine.sampled(way[0], sigmas, predict)
    assert not torch.allclose(way[0], latent, atol=0.1)
    assert (again - latent).norm() / latent.norm() < 0.03


def test_its_inputs_are_explained_and_named():
    schema = PurifyImage.define_schema()
    assert all(given.tooltip and given.display_name for given in schema.inputs)
    page = (ROOT / "web" / "docs" / "ConceptSurgeryPurify.md").read_text("utf-8")
    assert not [one.display_name for one in schema.inputs if f"**{one.display_name}**" not in page]


def purify_graph(server, **values):
    folder = server.work / "input"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.tile(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (1, 72, 4))
    Image.fromarray(pixels, "RGBA").save(folder / "to_purify.png")
    graph = graphs.loader(CHECKPOINT) | graphs.load(filename="purified.safetensors")
    graph |= graphs.node("picture", "LoadImage", image="to_purify.png")
    graph |= graphs.node(
        "purify",
        "ConceptSurgeryPurify",
        model=("loader", 0),
        erasure=("load", 0),
        clip=("loader", 1),
        vae=("loader", 2),
        image=("picture", 0),
        **{**EVERYWHERE, **values},
    )
    graph |= graphs.show("said", ("purify", 3))
    for name, output in {"purified": 0, "reconstruction": 1}.items():
        graph |= graphs.node(
            name, "SaveImage", images=("purify", output), filename_prefix=f"purify-{name}"
        )
    return graph


def test_in_a_graph_pictures_and_report_come_out(server, finished):
    finished.save(server.models("loras") / "purified.safetensors")
    outputs = server.run(purify_graph(server), timeout=240)["outputs"]
    pages = [
        Image.open(io.BytesIO(server.image(outputs[name]["images"][0])))
        for name in ("purified", "reconstruction")
    ]
    assert [page.size for page in pages] == [(72, 64)] * 2
    assert pages[0].tobytes() != pages[1].tobytes()
    assert "dB against what the VAE makes" in outputs["said"]["text"][0]
    with pytest.raises(GraphFailed, match="start level is 0.001"):
        linked = graphs.node("typed", "PrimitiveFloat", value=0.001)
        server.run(purify_graph(server, start_level=("typed", 0)) | linked)


@pytest.mark.parametrize(
    "name, value", [("steps", 0), ("start_level", 1.5), ("area", "here"), ("prompt", "a\ud800")]
)
def test_a_wrong_value_is_told_once_at_its_input(server, finished, name, value):
    finished.save(server.models("loras") / "purified.safetensors")
    with pytest.raises(GraphRejected) as rejected:
        server.queue(purify_graph(server, **{name: value}))
    (error,) = rejected.value.node_errors["purify"]["errors"]
    assert error["extra_info"]["input_name"] == name
