"""What moves beside a text encoder that has meaning in it, and what doesn't.

Random text encoders give prompts that are alike in everything but their words, and a caption then
moves with whatever is erased. The emoji model's encoder was trained: related words are near, and
unrelated ones aren't. The networks are the shrunken ones with random weights.
"""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from concept_surgery.erase_core import erase, preset_settings
from concept_surgery.nodes.apply import apply_erasure
from concept_surgery.nodes.host import ComfyDenoiser, encode_prompts, model_family
from concept_surgery.nodes.store import LanguageStore

from benchmarks.emoji.build import WEIGHTS, build_emoji_checkpoint
from tools.environment import BUILD

from .encoder import RememberingClip
from .small import built_model, load_family
from .test_families import relative_change, sampled_x0
from .trained_encoder import trained_sdxl_encoder

KEPT = "a photo of a rabbit"
ERASED = ("a photo of a cat", "a cat sleeping", "a drawing of a cat in a garden")
SIGMAS = {"sdxl": (0.5, 2.0, 8.0), "sd3": (0.3, 0.6, 0.9), "flux": (0.3, 0.6, 0.9)}
QUICK = {
    **{"concepts": "cat => dog", "keep": (KEPT,), "resolution": 64, "captions": 150},
    **{"trajectories": 6, "sampling_steps": 5, "steps": 40},
}
# Keys and values of many layers have farther to go than one matrix.
WHOLE = {"captions": 300, "trajectories": 8}


@pytest.fixture(scope="module")
def sdxl():
    model, _ = load_family("sdxl")
    with torch.inference_mode():
        return model, RememberingClip(trained_sdxl_encoder(model.model.model_config))


@pytest.fixture(scope="module")
def clip():
    with torch.inference_mode():
        path = build_emoji_checkpoint(BUILD / "checkpoints" / "emoji.safetensors", WEIGHTS)
        return comfy.sd.load_checkpoint_guess_config(str(path), output_model=False)[1]


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return LanguageStore(tmp_path_factory.mktemp("language"))


def train(model, clip, language, **values):
    family = model_family(model)
    settings = preset_settings("balanced", family=family.defaults, **{**QUICK, **values})
    with torch.inference_mode(False), torch.enable_grad():
        with ComfyDenoiser(model, clip, "", 6, 64, settings.layers) as denoiser:
            *_, last = erase(settings, denoiser, language)
    return last.erasure


def test_sdxl_moves_nine_tenths_and_the_pooled_vector_brings_nothing_back(sdxl, language):
    model, clip = sdxl
    erasure = train(model, clip, language, **WHOLE, steps=24)
    measures = erasure.record["measures"]
    assert measures["moved_held_out"]["overall"] >= 0.9
    assert measures["moved_sampled"]["overall"] >= 0.8
    assert measures["pooled"]["leak"] > 0.005
    assert measures["pooled"]["left"] < 0.15 * measures["pooled"]["leak"]
    edited = apply_erasure(model, erasure, 1.0)
    null, kept = encode_prompts(clip, ["", KEPT], pooled=True)
    for prompt in (null, null.zeroed(), kept):
        assert relative_change(model, edited, prompt) <= 1e-5


@pytest.mark.parametrize("architecture", ["sdxl", "sd3", "flux"])
def test_what_nobody_named_moves_a_twentieth_of_what_is_erased(architecture, language, request):
    if architecture == "sdxl":
        (model, clip), more = request.getfixturevalue("sdxl"), {**WHOLE, "steps": 60}
    else:
        model, clip, more = built_model(architecture)[0], request.getfixturevalue("clip"), {}
    pooled = model_family(model).pooled
    erasure = train(model, clip, language, form="soft", **more)
    measures = erasure.record["measures"]
    assert measures["moved_held_out"]["overall"] >= 0.9
    edited = apply_erasure(model, erasure, 1.0)

    def squared_change(text):
        prompt = encode_prompts(clip, [text], pooled=pooled)[0]
        found = []
        for sigma in SIGMAS[architecture]:
            before, after = (sampled_x0(m, prompt, sigma) for m in (model, edited))
            found.append(float((after - before).norm() / before.norm()) ** 2)
        return sum(found) / len(found)

    def mean(texts):
        return sum(map(squared_change, texts)) / len(texts)

    most = mean(ERASED) / 20
    assert mean([prompt["text"] for prompt in measures["unnamed"]]) <= most
    assert squared_change(KEPT) <= most
    assert squared_change("") <= most
