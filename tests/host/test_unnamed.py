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
from concept_surgery.erase_core.artefact.language_store import LanguageStore
from concept_surgery.nodes.apply import apply_erasure
from concept_surgery.nodes.encoding import encode_prompts
from concept_surgery.nodes.families import model_family
from concept_surgery.nodes.host import ComfyDenoiser

from benchmarks.emoji.build import WEIGHTS, build_emoji_checkpoint
from benchmarks.erasure.run import leave_out_empty_layers
from tools.environment import BUILD

from ..long import long
from .small import built_model
from .test_families import sampled_x0

KEPT = "a photo of a rabbit"
ERASED = ("a photo of a cat", "a cat sleeping", "a drawing of a cat in a garden")
QUICK = {
    **{"concepts": "cat => dog", "keep": (KEPT,), "resolution": 64, "captions": 100},
    **{"trajectories": 6, "sampling_steps": 5, "steps": 40},
}


@pytest.fixture(scope="module")
def clip():
    with torch.inference_mode():
        path = build_emoji_checkpoint(BUILD / "checkpoints" / "emoji.safetensors", WEIGHTS)
        clip = comfy.sd.load_checkpoint_guess_config(str(path), output_model=False)[1]
        leave_out_empty_layers(clip)
        return clip


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return LanguageStore(tmp_path_factory.mktemp("language"))


def train(model, clip, language, **values):
    family = model_family(model)
    settings = preset_settings("balanced", family=family.defaults, **{**QUICK, **values})
    with torch.inference_mode(False), torch.enable_grad():
        with ComfyDenoiser(model, clip, "", 6, 64, settings.layers) as denoiser:
            last = erase(settings, denoiser, language)
    return last


def check_a_twentieth(model, clip, erasure, sigmas):
    """That kept, null and unnamed prompts change at most a twentieth as much, squared."""
    pooled, measures = model_family(model).pooled, erasure.record["measures"]
    assert measures["moved_held_out"]["overall"] >= 0.9
    edited = apply_erasure(model, erasure, 1.0)
    unnamed = [prompt["text"] for prompt in measures["unnamed"]]
    texts = list(dict.fromkeys([*ERASED, *unnamed, KEPT, ""]))
    prompts = encode_prompts(clip, texts, pooled=pooled)
    # One model after the other: the host patches the weights anew at each change.
    before, after = (
        [[sampled_x0(m, prompt, sigma) for sigma in sigmas] for prompt in prompts]
        for m in (model, edited)
    )

    def squared_change(text):
        pairs = zip(before[texts.index(text)], after[texts.index(text)], strict=True)
        return sum(float((b - a).norm() / a.norm()) ** 2 for a, b in pairs) / len(sigmas)

    def mean(texts):
        return sum(map(squared_change, texts)) / len(texts)

    most = mean(ERASED) / 20
    assert mean(unnamed) <= most
    assert squared_change(KEPT) <= most
    assert squared_change("") <= most


@long  # the soft form, which nothing has by default, trains for most of a minute
@pytest.mark.parametrize("architecture", ["sd3", "flux"])
def test_what_nobody_named_moves_a_twentieth_of_what_is_erased(architecture, clip, language):
    model, _ = built_model(architecture)
    erasure = train(model, clip, language, form="soft")
    check_a_twentieth(model, clip, erasure, (0.3, 0.6, 0.9))
