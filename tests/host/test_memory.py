"""Gradient checkpointing through the host's own blocks, of every family, on shrunken models."""

from __future__ import annotations

import hashlib

import comfy.sd
import pytest
import torch
from concept_surgery.erase_core.artefact.erasure import Erasure
from concept_surgery.erase_core.model.activations import Recompute, SavedBytes
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.model.memory import Need
from concept_surgery.nodes.encoding import encode_prompts
from concept_surgery.nodes.exact import add_side_path
from concept_surgery.nodes.families import model_family
from concept_surgery.nodes.host import ComfyDenoiser
from concept_surgery.nodes.matrices import trained_keys

from ..core.small_device import SmallDevice
from .small import built_model, load_family, random_text_encoder

PROMPTS = ["a photo of a cat", "a dog"]
FAMILIES = ["sd1", "sdxl", "sd3", "flux"]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, checkpoint):
    """Name, MODEL and CLIP."""
    if request.param == "sd1":
        with torch.inference_mode():
            model = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_clip=False)[0]
            return "sd1", model, random_text_encoder(model.model.model_config)
    if request.param == "sdxl":
        return "sdxl", *load_family("sdxl")
    return request.param, *built_model(request.param)


def learning(model, clip, layers=None, seed=0):
    """A denoiser and a loss of random edits of all its matrices, R with a gradient too."""
    denoiser = ComfyDenoiser(model, clip, "", 2, 128, layers)
    prompts = encode_prompts(clip, PROMPTS, pooled=model_family(model).pooled)
    channels = model.model.latent_format.latent_channels
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, 16, 16, generator=generator)

    def edit(matrices):
        bases, factors = {}, {}
        for name, weight in matrices.items():
            out, width = weight.shape
            bases[name] = torch.randn(width, 4, generator=generator) / width**0.5
            factors[name] = 0.3 * torch.randn(out, 4, generator=generator) / out**0.5
        leaves = [tensor.requires_grad_() for tensor in (*bases.values(), *factors.values())]
        return LowRankEdit(bases, factors), leaves

    def loss(edit):
        sigma = torch.full((2,), 0.7)
        return denoiser.predict_x0(x, sigma, prompts, edit).square().mean()

    return denoiser, edit, loss


def gradients(loss, edit, leaves):
    return torch.autograd.grad(loss(edit), leaves)


def assert_same(found, expected):
    assert all(gradient.any() for gradient in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def state_of(model):
    """A hash of the weights, and what is set on the host's modules themselves."""
    digest, network = hashlib.sha256(), model.model.diffusion_model
    for key, weight in model.model.state_dict().items():
        digest.update(key.encode() + weight.detach().float().cpu().numpy().tobytes())
    own = [("forward" in vars(m), len(m._forward_hooks)) for m in network.modules()]
    return digest.hexdigest(), own


def test_gradients_are_the_same_and_the_hosts_model_is_untouched(loaded):
    _, model, clip = loaded
    before = state_of(model)
    with torch.inference_mode(False), torch.enable_grad():
        denoiser, edit, loss = learning(model, clip)
        with denoiser:
            edit, leaves = edit(denoiser.matrices())
            plain = gradients(loss, edit, leaves)
            with denoiser.around_blocks(Recompute()):
                assert state_of(model) == before
                value = loss(edit)
                with torch.no_grad():
                    assert torch.equal(loss(edit), value)
            assert_same(torch.autograd.grad(value, leaves), plain)  # after the context has ended
            twin = denoiser._twin.diffusion_model
            assert not any("forward" in vars(module) for module in twin.modules())
            with pytest.raises(ZeroDivisionError), denoiser.around_blocks(Recompute()):
                assert any("forward" in vars(module) for module in twin.modules())
                raise ZeroDivisionError
            assert not any("forward" in vars(module) for module in twin.modules())
    assert state_of(model) == before


def test_what_is_counted_is_what_is_alive_and_checkpointing_is_less(loaded):
    _, model, clip = loaded
    with torch.inference_mode(False), torch.enable_grad():
        denoiser, edit, loss = learning(model, clip)
        with denoiser:
            edit, leaves = edit(denoiser.matrices())
            saved = SavedBytes([*denoiser.weights(), *leaves])
            with denoiser.around_blocks(saved), saved.counting():
                loss(edit)
            plain, plain_peak = alive(loss, edit, leaves)
            with denoiser.around_blocks(Recompute()):
                checkpointed, checkpointed_peak = alive(loss, edit, leaves)
    assert saved.kept == pytest.approx(plain, rel=0.15)
    assert saved.kept_checkpointed == pytest.approx(checkpointed, rel=0.15)
    assert plain > 3 * checkpointed
    need = Need.counted(saved)
    assert need.plain == pytest.approx(plain_peak, rel=0.25)
    assert need.checkpointed == pytest.approx(checkpointed_peak, rel=0.25)


def alive(loss, edit, leaves):
    """Bytes alive after the forward, and at the most in forward and backward."""
    with SmallDevice() as device:
        value = loss(edit)
        kept = device.alive
        torch.autograd.grad(value, leaves)
    return kept, device.peak


def test_erasures_beside_the_weights_are_there_when_a_block_runs_again(loaded):
    """Their hooks are on the layers only while the model is called."""
    _, model, clip = loaded
    with torch.inference_mode(False), torch.enable_grad():
        denoiser, edit, _ = learning(model, clip, seed=1)
        with denoiser:
            beside = edit(denoiser.matrices())[0].to("cpu")
        beside = Erasure(beside.bases, beside.factors, {})
        keys = trained_keys(model)
        upstream = model.clone()
        add_side_path(upstream, beside, keys, 3.0)
        denoiser, edit, loss = learning(upstream, clip)
        with denoiser:
            edit, leaves = edit(denoiser.matrices())
            plain = gradients(loss, edit, leaves)
            with denoiser.around_blocks(Recompute()):
                assert_same(gradients(loss, edit, leaves), plain)


@pytest.mark.parametrize("layers", ["text-stream", "*_double_blocks_1_img_mlp_0"])
def test_fluxs_blocks_leave_what_they_are_given_alone(layers):
    """Also where a block adds in place before anything in it has a gradient."""
    model, clip = built_model("flux")
    with torch.inference_mode(False), torch.enable_grad():
        denoiser, edit, loss = learning(model, clip, layers)
        with denoiser:
            edit, leaves = edit(denoiser.matrices())
            plain = gradients(loss, edit, leaves)
            with denoiser.around_blocks(Recompute()):
                assert_same(gradients(loss, edit, leaves), plain)
