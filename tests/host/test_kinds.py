"""A CLIP of another kind than the model: refused at once, or warned about where it only checks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from comfy import sd1_clip, sdxl_clip
from comfy.text_encoders import sd2_clip, sd3_clip
from concept_surgery.erase_core import preset_settings
from concept_surgery.nodes import join, messages, runs
from concept_surgery.nodes.apply import ApplyErasure
from concept_surgery.nodes.encoding import encode_null
from concept_surgery.nodes.families import UnsupportedModelError
from concept_surgery.nodes.host import ComfyDenoiser
from concept_surgery.nodes.join import JoinErasures
from concept_surgery.nodes.kinds import misfit
from concept_surgery.nodes.train import TrainErasure

from .small import REAL_WIDTHS, built_model, load_family
from .test_text_encoders import small_clip


class CountingClip:
    """A CLIP that counts what it encodes."""

    def __init__(self, clip):
        self._clip, self.encoded = clip, 0

    def __getattr__(self, name):
        return getattr(self._clip, name)

    def encode_from_tokens(self, tokens, **options):
        self.encoded += 1
        return self._clip.encode_from_tokens(tokens, **options)


@pytest.fixture(scope="module")
def clips():
    """Text encoders of three kinds, a few layers deep."""
    return {
        "SD1": small_clip(sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
        "SD2": small_clip(sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel),
        "SDXL": small_clip(sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
    }


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """What the nodes show, outside a graph."""
    texts: list[str] = []
    monkeypatch.setattr(messages, "_send_text", lambda text, _: texts.append(text))
    monkeypatch.setattr(runs, "result_store", lambda node_id: None)
    fields = [("prompt", dict, None), ("unique_id", str, None)]
    for node in (ApplyErasure, JoinErasures, TrainErasure):
        hidden = dataclasses.make_dataclass("Hidden", fields)()
        monkeypatch.setattr(node, "hidden", hidden, raising=False)
    return texts


@pytest.fixture(scope="module")
def networks(loaded):
    """A model of each kind."""
    return {
        "SD1": loaded[0],
        "SD2": load_family("sd2")[0],
        "SDXL": load_family("sdxl")[0],
        "SD3": built_model("sd3")[0],
        "Flux": built_model("flux")[0],
        "PixArt": built_model("pixart")[0],
        "Lumina": built_model("lumina")[0],
        "Wan": built_model("wan")[0],
    }


GIVES = {"SD1": (768, 768), "SD2": (1024, 1024), "SDXL": (2048, 1280)}


@pytest.mark.parametrize("text", GIVES)
def test_each_model_takes_its_own_kind_and_no_other(networks, clips, text):
    null = encode_null(clips[text])
    assert (null.tokens.shape[-1], len(null.pooled)) == GIVES[text]
    # The small transformers read 768 numbers, as SD1 does.
    reads = {"SD2": "SD2", "SDXL": "SDXL"}
    for name, model in networks.items():
        problem = misfit(model, null)
        assert bool(problem) == (reads.get(name, "SD1") != text), name
        if problem:
            wanted = GIVES[reads.get(name, "SD1")][0]
            assert f"gives {GIVES[text][0]} numbers for each token" in problem
            assert f"reads {wanted}. Connect the CLIP" in problem


@pytest.mark.parametrize(
    "model, loader",
    [
        ("SD1", "Load CLIP with clip_l and the type stable_diffusion"),
        ("SDXL", "DualCLIPLoader with clip_l and clip_g and the type sdxl"),
        ("SD2", "OpenCLIP-H"),
    ],
)
def test_training_ends_before_more_than_one_prompt_is_encoded(
    networks, clips, model, loader, shown
):
    clip = CountingClip(clips["SDXL" if model == "SD1" else "SD1"])
    with torch.inference_mode(), pytest.raises(UnsupportedModelError, match=loader):
        TrainErasure.execute(networks[model], clip, erase="cat => dog", preset="instant")
    assert clip.encoded == 1


def test_joining_on_it_is_refused_too(networks, clips, monkeypatch, finished, shown):
    monkeypatch.setattr(join, "distinct", lambda erasures: [finished])
    settings = preset_settings("instant", concepts="cat => dog", captions=24)
    monkeypatch.setattr(join, "settings_together", lambda records: settings)
    monkeypatch.setattr(join, "warnings_together", lambda records: [])
    clip = CountingClip(clips["SDXL"])
    with torch.inference_mode(), pytest.raises(UnsupportedModelError, match="2048 numbers .* 768"):
        JoinErasures.execute(networks["SD1"], clip, finished, finished)
    assert clip.encoded == 1


def test_apply_warns_with_both_widths_and_patches_all_the_same(networks, clips, finished, shown):
    with torch.inference_mode():
        patched = ApplyErasure.execute(networks["SD1"], finished, 1.0, clip=clips["SDXL"]).args[0]
    assert len(patched.patches) == len(finished.factors)
    (warning,) = shown
    assert "gives 2048 numbers for each token, and this model (SD1.x) reads 768" in warning


def test_the_pooled_vector_counts_too(networks, clips):
    """Flux's and SD3's encoders give tokens alike, and pooled vectors that aren't."""
    clip = small_clip(sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(dtype_t5=torch.float16))
    null = encode_null(clip)
    assert (null.tokens.shape[-1], len(null.pooled)) == (4096, 2048)
    sd3, flux = (built_model(name, **REAL_WIDTHS[name])[0] for name in ("sd3", "flux"))
    assert not misfit(sd3, null)
    assert "gives a pooled vector of 2048, and this model (Flux) reads 768" in misfit(flux, null)
    assert "gives no pooled vector, and this model (Flux)" in misfit(flux, type(null)(null.tokens))
    assert not misfit(flux, type(null)(null.tokens, null.pooled[:768]))
    sdxl = type(null)(torch.zeros(77, 2048), torch.zeros(768))
    assert "a pooled vector of 768, and this model (SDXL) reads 1280" in misfit(
        networks["SDXL"], sdxl
    )


def test_an_architecture_whose_entrance_has_no_known_name_is_measured_by_its_weights(
    networks, clips, monkeypatch
):
    monkeypatch.setattr("concept_surgery.nodes.kinds.ENTRANCES", ())
    network = networks["Lumina"]
    assert not misfit(network, encode_null(clips["SD1"]))
    problem = misfit(network, encode_null(clips["SDXL"]))
    assert "gives 2048 numbers" in problem and "has no layer that reads as many" in problem
    with pytest.raises(UnsupportedModelError, match="Load CLIP with the type"):
        ComfyDenoiser(network, clips["SDXL"], "", 6, 64)
