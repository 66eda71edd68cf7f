"""Files from ComfyUI in the web host: the same pictures, and none where they must not act."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from .comfy_side import PROMPTS
from .webui_host import rms

SAME = 0.002  # RMS of values in 0..1: rounding of another decoder's order of sums


@pytest.fixture(scope="module")
def lora(host, comfy):
    """That file where tags find it."""
    shutil.copy2(comfy.file, host.loras / "from_comfy.safetensors")
    host.post("/sdapi/v1/refresh-loras")
    yield "from_comfy"
    (host.loras / "from_comfy.safetensors").unlink()


def test_pictures_are_those_of_comfyui(host, comfy):
    for text in PROMPTS:
        assert rms(host.draw(text), comfy.pictures[0, text]) < SAME, text


def test_a_tag_draws_what_comfyui_draws_with_the_same_file(host, comfy, lora):
    for text in PROMPTS:
        ours = host.draw(f"{text} <lora:{lora}:1>")
        assert rms(ours, comfy.pictures[1, text]) < SAME, text
    moved = rms(comfy.pictures[0, PROMPTS[0]], comfy.pictures[1, PROMPTS[0]])
    assert moved > 20 * SAME  # so that the comparison says something


def test_strength_0_and_the_prompt_after_it_are_the_untouched_picture(host, lora):
    text = PROMPTS[0]
    before, weights = host.draw(text), host.weights()
    assert not np.array_equal(host.draw(f"{text} <lora:{lora}:1>"), before)
    assert np.array_equal(host.draw(f"{text} <lora:{lora}:0>"), before)
    assert np.array_equal(host.draw(text), before)
    assert host.weights() == weights
