"""The benchmark draws what the host draws."""

from __future__ import annotations

import comfy.sample
import comfy.sd
import pytest
import torch
from concept_surgery.erase_core import erase, preset_settings
from concept_surgery.nodes.apply import apply_erasure

from benchmarks.emoji.build import build_emoji_checkpoint
from benchmarks.erasure.painter import GUIDANCE, Painter
from benchmarks.erasure.run import leave_out_empty_layers
from tools.environment import BUILD

TEXTS, NEGATIVES = ("a cat in ink style", "look at the dog"), ("", "a cat")
STEPS = 3


@pytest.fixture(scope="module")
def painter(checkpoint, tmp_path_factory) -> Painter:
    return Painter(checkpoint, STEPS, fast=False, folder=tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def erasure(painter, store):
    settings = preset_settings("instant", concepts="cat => dog", captions=24, resolution=64)
    with painter.denoiser("key-value") as denoiser:
        last = erase(settings, denoiser, store)
    return last


def by_the_host(
    painter: Painter,
    model,
    noise: torch.Tensor,
    begin: torch.Tensor | None = None,
    share: float = 1.0,
) -> torch.Tensor:
    """Latents of the host's KSampler, one prompt after the other."""

    def condition(text: str):
        return painter.clip.encode_from_tokens_scheduled(painter.clip.tokenize(text))

    drawn, scale = [], model.model.latent_format
    begin = torch.zeros_like(noise) if begin is None else scale.process_out(begin)
    for n, (text, negative) in enumerate(zip(TEXTS, NEGATIVES, strict=True)):
        with torch.inference_mode():
            ends = comfy.sample.sample(
                *(model, noise[n : n + 1], STEPS, GUIDANCE, "euler", "normal"),
                *(condition(text), condition(negative), begin[n : n + 1].clone()),
                denoise=share,
                disable_pbar=True,
            )
        drawn.append(scale.process_in(ends))
    return torch.cat(drawn)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_it_draws_what_ksampler_draws_behind_the_apply_node(painter, erasure) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = painter.latents(TEXTS, NEGATIVES, noise)
    edited = painter.latents(TEXTS, NEGATIVES, noise, erasure.edit())
    assert difference(plain, by_the_host(painter, painter.model, noise)) < 1e-4
    patched = apply_erasure(painter.model, erasure, 1.0)
    assert difference(edited, by_the_host(painter, patched, noise)) < 1e-4
    assert difference(edited, plain) > 1e-2


def test_from_a_picture_it_draws_what_ksampler_draws(painter) -> None:
    noise, begin = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    drawn = painter.latents(TEXTS, NEGATIVES, noise, start=begin, denoise=0.6)
    assert difference(drawn, by_the_host(painter, painter.model, noise, begin, 0.6)) < 1e-4
    assert difference(drawn, painter.latents(TEXTS, NEGATIVES, noise)) > 1e-2


def test_after_an_edit_the_weights_are_what_they_were(painter, erasure) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    before = painter.latents(TEXTS, NEGATIVES, noise)
    painter.latents(TEXTS, NEGATIVES, noise, erasure.edit())
    assert torch.equal(painter.latents(TEXTS, NEGATIVES, noise), before)


def test_the_hard_form_holds_the_null_prompt_and_a_whole_change_does_not(painter, erasure) -> None:
    from benchmarks.erasure.methods.base import whole_matrices

    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    assert max(painter.null_drift(erasure.edit(), clean, (100, 800))) < 1e-4
    with painter.denoiser("key-value") as denoiser:
        whole = whole_matrices(denoiser.matrices())
        for name, weight in denoiser.matrices().items():
            whole.factors[name].data = 0.1 * weight
    assert min(painter.null_drift(whole.to("cpu"), clean, (100, 800))) > 1e-3


def test_encoded_prompts_are_the_hosts_and_kept(painter) -> None:
    (rows,) = painter.encode(["a rose"])
    again = Painter(painter.path, STEPS, fast=False, folder=painter.folder)
    assert any(painter.folder.rglob("*.npy"))
    assert torch.equal(again.encode(["a rose"])[0], rows)


def test_the_emoji_models_empty_layers_add_nothing() -> None:
    path = build_emoji_checkpoint(BUILD / "checkpoints" / "emoji.safetensors")
    with torch.inference_mode():
        clip = comfy.sd.load_checkpoint_guess_config(
            str(path), output_model=False, output_vae=False
        )[1]
        tokens = clip.tokenize("a cat in clay style")
        whole = clip.encode_from_tokens(tokens, return_pooled=True)
        leave_out_empty_layers(clip)
        shorter = clip.encode_from_tokens(tokens, return_pooled=True)
        assert len(clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers) == 2
        for one, other in zip(shorter, whole, strict=True):
            assert torch.equal(one, other)
