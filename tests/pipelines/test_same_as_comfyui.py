"""The same erasure through ComfyUI and through a pipeline of the same checkpoint."""

from __future__ import annotations

import time

import pytest
import torch
from concept_surgery.erase_core import Meter
from concept_surgery.erase_core import erase as erase_with
from concept_surgery.pipelines import erase
from concept_surgery.pipelines.erasing import settings_for

from benchmarks.emoji.build import CHECKPOINT, build_emoji_checkpoint
from benchmarks.emoji.pipeline import emoji_pipeline

from .conftest import at_length

pytestmark = at_length
# Ten steps fall on whole times, which ComfyUI rounds to and diffusers doesn't.
STEPS, SCALE, SIZE = 10, 5.0, 64
CHOSEN = {"captions": 16, "resolution": SIZE, "templates": ("a photo of {}",), "steps": 4}
PROMPTS = ("a cat", "a dog in flat style", "a cat in outline style")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Of each side what it learned, what it spent, its seconds on the processor, its pictures."""
    checkpoint = build_emoji_checkpoint(CHECKPOINT)
    pipe = emoji_pipeline(checkpoint, tmp_path_factory.mktemp("emoji"))
    pipe.set_progress_bar_config(disable=True)
    return {"comfyui": _through_comfyui(checkpoint), "diffusers": _through_diffusers(pipe)}


def _through_comfyui(checkpoint):
    import comfy.sd
    from concept_surgery.nodes.apply import apply_erasure
    from concept_surgery.nodes.host import ComfyDenoiser

    with torch.inference_mode():
        model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
    meter, began = Meter(), time.process_time()
    settings = settings_for({}, "cat", "dog", **CHOSEN)
    with ComfyDenoiser(model, clip, "", 6, SIZE) as denoiser:
        erasure = erase_with(settings, denoiser, None, meter)
    seconds = time.process_time() - began
    patched = apply_erasure(model, erasure, 1.0)
    with torch.inference_mode():
        pictures = [_drawn_by_comfyui(patched, clip, vae, prompt) for prompt in PROMPTS]
    return erasure, meter.spent, seconds, pictures


def _drawn_by_comfyui(model, clip, vae, prompt):
    import comfy.sample

    asked = [[rows, {}] for rows in (clip.encode_from_tokens(clip.tokenize(prompt)),)]
    empty = [[rows, {}] for rows in (clip.encode_from_tokens(clip.tokenize("")),)]
    given = STEPS, SCALE, "euler", "normal", asked, empty, torch.zeros(1, 4, 8, 8)
    latent = comfy.sample.sample(model, _noise(), *given, disable_pbar=True)
    return vae.decode(latent)[0].clone()


def _through_diffusers(pipe):
    from concept_surgery.pipelines.adapter import PipelineDenoiser

    meter, began = Meter(), time.process_time()
    erasure = erase(pipe, "cat", "dog", meter=meter, **CHOSEN)
    seconds = time.process_time() - began
    # With the 0 at the end: the scheduler leaves out the step of the last one that it is given.
    sigmas = PipelineDenoiser(pipe, SIZE).sigmas(STEPS).tolist()
    # ComfyUI begins with noise of size sqrt(sigma^2 + 1), the pipeline's scheduler of size sigma.
    latents = _noise() * (1 + sigmas[0] ** -2) ** 0.5
    with erasure.applied(pipe):
        pictures = [
            pipe(
                prompt,
                sigmas=sigmas,
                num_inference_steps=STEPS,
                guidance_scale=SCALE,
                height=SIZE,
                width=SIZE,
                latents=latents,
                output_type="pt",
            )
            .images[0]
            .permute(1, 2, 0)
            for prompt in PROMPTS
        ]
    return erasure, meter.spent, seconds, pictures


def _noise() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_weight_changes_are_the_same(both, record_property):
    one, other = both["comfyui"][0], both["diffusers"][0]
    assert one.factors.keys() == other.factors.keys()
    for name in one.factors:
        expected, found = one.delta(name), other.delta(name)
        apart = float((found - expected).norm() / expected.norm())
        record_property(name, apart)
        assert apart < 0.01, name
    first, second = one.record["base"]["fingerprint"], other.record["base"]["fingerprint"]
    assert first == pytest.approx(second, abs=0.01)
    assert one.record["text_encoder"] == pytest.approx(other.record["text_encoder"], abs=0.01)


def test_it_costs_the_same(both, record_property):
    """In predictions to one, and in time to a fifth."""
    assert both["comfyui"][1] == both["diffusers"][1] > 100
    record_property("seconds", {name: side[2] for name, side in both.items()})
    assert both["diffusers"][2] < 1.2 * both["comfyui"][2]


def test_the_pictures_are_the_same(both, record_property):
    for one, other in zip(both["comfyui"][3], both["diffusers"][3], strict=True):
        assert one.std() > 0.05
        apart = float((one - other).square().mean().sqrt())
        record_property("apart", apart)
        assert apart < 0.003
