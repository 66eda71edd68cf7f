"""The parts of ``benchmarks/emoji`` are those of the host, given the same weights."""

import json

import comfy.clip_model
import comfy.latent_formats
import comfy.model_sampling
import comfy.ops
import comfy.taesd.taesd
import torch

from benchmarks.emoji.autoencoder import LATENT_SCALE, Autoencoder
from benchmarks.emoji.build import autoencoder_tensors, text_tensors
from benchmarks.emoji.text import TextEncoder, tokenize, word_token
from benchmarks.emoji.unet import alphas
from tools.environment import HOST


def test_text_encoder_is_the_hosts() -> None:
    """The narrow encoder and the host's CLIP-L, filled from it, give the same states."""
    torch.manual_seed(0)
    words = ["cat", "flat", "style"]
    ours = TextEncoder([word_token(word) for word in words])
    torch.nn.init.normal_(ours.meaning, std=0.2)
    config = json.loads((HOST / "comfy" / "sd1_clip_config.json").read_text(encoding="utf-8"))
    theirs = comfy.clip_model.CLIPTextModel(
        config, torch.float32, "cpu", comfy.ops.disable_weight_init
    )
    theirs.text_model.load_state_dict(text_tensors(ours))
    tokens = tokenize(["a cat in flat style", ""])
    with torch.no_grad():
        states = theirs.text_model(tokens)[0]
        assert torch.allclose(states, ours(tokens), atol=1e-4)
        assert not torch.allclose(states[0], states[1], atol=0.1)


def test_autoencoder_is_the_hosts() -> None:
    """The host's TAESD with the tensors of ours; the sampler's latents are our encoder's."""
    torch.manual_seed(0)
    ours, theirs = Autoencoder(), comfy.taesd.taesd.TAESD()
    theirs.load_state_dict(autoencoder_tensors(ours))
    pictures = torch.rand(2, 3, 64, 64)
    scaling = comfy.latent_formats.SD15()
    with torch.no_grad():
        latents = scaling.process_in(theirs.encode(pictures * 2 - 1))
        assert latents.shape == (2, 4, 8, 8)
        assert torch.allclose(latents, ours.encode(pictures), atol=1e-4)
        drawn = theirs.decode(scaling.process_out(latents)) / 2 + 0.5
        assert torch.allclose(drawn, ours.decode(latents), atol=1e-4)
    assert scaling.scale_factor == LATENT_SCALE


def test_schedule_is_the_hosts() -> None:
    sigmas = comfy.model_sampling.ModelSamplingDiscrete().sigmas
    kept = alphas(torch.device("cpu"))
    assert torch.allclose(((1 - kept) / kept).sqrt(), sigmas, rtol=1e-4)
