"""``benchmarks/flow`` in the host: its own loaders, its own classes, the same numbers.

The weights are random here, and none of them zero, so that each part of the network counts.
"""

import comfy.model_detection
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow
from concept_surgery.erase_core import erase, preset_settings
from safetensors.torch import save_file

from benchmarks.flow.build import host_weights, pack, packed_network
from benchmarks.flow.comfyui import known_width, load_clip, load_model
from benchmarks.flow.model import FlowModel
from benchmarks.flow.network import SHIFT, STEPS, Network, noise_levels
from benchmarks.flow.text import TEMPLATE, token_rows, tokenize
from benchmarks.icons.build import packed_network as packed_icons

from ..long import long

TEXTS = ["a camel in pixel style", "a hot dog", "", "my favourite (shark:1.3) and [that]"]


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    met = sorted({number for row in token_rows(TEXTS) for number in row})
    made = Network(met, packed_icons().patches).requires_grad_(False)
    torch.nn.init.normal_(made.transformer.final_layer.linear.weight, std=0.05)
    return made.eval()


@pytest.fixture(scope="module")
def in_the_host(network, tmp_path_factory):
    """MODEL and CLIP from files as ``build expand`` writes them."""
    folder = tmp_path_factory.mktemp("flow")
    paths = folder / "transformer.safetensors", folder / "text_encoder.safetensors"
    for path, weights in zip(paths, host_weights(network), strict=True):
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
    return load_model(paths[0]), load_clip(paths[1])


def test_the_prompt_reaches_the_picture_from_the_first_step(network) -> None:
    """Else a training would learn pictures without prompts, at a loss that falls all the same."""
    torch.manual_seed(1)
    fresh = Network(network.text.rows.tolist())
    torch.nn.init.normal_(fresh.transformer.final_layer.linear.weight, std=0.05)
    read = fresh.entering(*tokenize(["a camel in pixel style", "a hot dog"]))
    x = torch.randn(1, 16, 16, 16).expand(2, -1, -1, -1)
    one, other = fresh.velocity(x, torch.full((2,), 0.9), read)
    assert (one - other).norm() > 0.01 * one.norm()
    one.square().sum().backward()
    unmoved = {n for n, p in fresh.named_parameters() if p.grad is None or not p.grad.any()}
    # The text encoder's last layer guesses tokens only; a norm and a token are never used.
    assert all(
        name.startswith(("text.model.layers.3.", "text.model.norm"))
        for name in unmoved - {"transformer.norm_final.weight", "transformer.x_pad_token"}
    ), unmoved


def test_the_hosts_loader_detects_it_and_reads_all(network, in_the_host) -> None:
    """Every weight is the file's, and detection is the host's own again afterwards."""
    model, _ = in_the_host
    assert type(model.model).__name__ == "Lumina2"
    ours, theirs = network.transformer.state_dict(), model.model.diffusion_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].float()) for name in ours)
    assert comfy.model_detection.detect_unet_config.__module__ == "comfy.model_detection"
    with known_width():
        assert comfy.model_detection.detect_unet_config.__module__ != "comfy.model_detection"


def test_its_text_encoder_is_the_hosts(network, in_the_host) -> None:
    """Tokens, chat template and states."""
    _, clip = in_the_host
    for text in TEXTS:
        tokens = clip.tokenize(text)
        ids, lengths = tokenize([text])
        (length,) = lengths.tolist()
        assert [number for number, *_ in tokens["qwen3_4b"][0]] == ids[0, :length].tolist()
        with torch.inference_mode():
            theirs = clip.encode_from_tokens_scheduled(tokens)[0][0]
        ours = network.text(ids)[:, :length]
        assert torch.allclose(theirs, ours, atol=2e-4 * float(ours.abs().max())), text
    assert TEMPLATE.format("a hot dog").count("<|im_start|>") == 2


def test_it_draws_in_the_host_what_it_draws_here(network, in_the_host) -> None:
    """The stock sampler, at Z-Image's shift, against this folder's own, to a step of brightness."""
    model, clip = in_the_host
    ours = FlowModel(network=network)
    text, noise = "a camel in pixel style", ours.draw_noise(1, 4)
    with torch.inference_mode():
        both = [clip.encode_from_tokens_scheduled(clip.tokenize(asked)) for asked in (text, "")]
        (shifted,) = ModelSamplingAuraFlow().patch_aura(model, SHIFT)
        latents = comfy.samplers.sample(
            *(shifted, noise, *both, 4.0, shifted.load_device),
            *(comfy.samplers.sampler_object("euler"), noise_levels(STEPS)),
            latent_image=torch.zeros_like(noise),
            seed=0,
        )
        latents = model.model.process_latent_in(latents)
    pages = network.patches.pages(latents).astype(int)
    drawn = ours.pictures([text], [""], noise).astype(int)
    other = ours.pictures(["a hot dog"], [""], noise).astype(int)
    assert abs(pages - drawn).max() <= 2 < abs(pages - other).max()


@long  # the engine's own tests say the same of a matrix that reads the prompt
def test_it_is_erased_from_at_its_entry_layer(network) -> None:
    """The empty prompt stays, to rounding, and the concept's prompt moves."""
    model = FlowModel(network=network)
    # A protection of 0: the words of a network that is not trained lie anywhere.
    settings = preset_settings("instant", concepts="camel => hot dog", protection=0.0)
    with model.denoiser() as denoiser:
        edit = erase(settings, denoiser).edit()
        assert list(edit.factors) == ["lora_unet_cap_embedder_1"]
        x, sigma = model.draw_noise(2, 3), torch.full((2,), 0.9)
        prompts = denoiser.encode(["", "a picture of a camel"])
        plain, edited = (denoiser.predict_x0(x, sigma, prompts, e) for e in (None, edit))
    moved = (edited - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    assert moved[0] < 1e-5 and moved[1] > 1e-3


def test_packed_weights_are_the_trained_ones_to_eight_bits(network, tmp_path, monkeypatch) -> None:
    from benchmarks.emoji.loop import save
    from benchmarks.flow import build

    monkeypatch.setattr(build, "AVERAGE", tmp_path / "average.pt")
    save({"step": 1, "network": network.state_dict()}, build.AVERAGE)
    again = packed_network(pack(tmp_path / "flow.safetensors")).state_dict()
    assert (tmp_path / "flow.safetensors").stat().st_size < 12 * 2**20
    for name, value in network.state_dict().items():
        wrong = (again[name].float() - value.float()).abs().max()
        assert wrong <= 0.01 * value.float().abs().max(), name
