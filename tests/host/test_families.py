"""Other families than SD1.x through the host's own code, on shrunken models."""

from __future__ import annotations

import contextlib

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from concept_surgery.erase_core import GradientError, erase, preset_settings
from concept_surgery.erase_core.artefact.report import report_text
from concept_surgery.erase_core.artefact.saving import save_erasure
from concept_surgery.erase_core.model.prompt import Encoded
from concept_surgery.nodes import host
from concept_surgery.nodes.apply import apply_erasure
from concept_surgery.nodes.encoding import encode_prompts
from concept_surgery.nodes.families import model_family
from concept_surgery.nodes.host import ComfyDenoiser

from .small import built_model, load_family

KEPT, NEGATIVE = "a photo of a tiger", "blurry"
QUICK = {
    "concepts": "cat => dog",
    "templates": "a photo of {}\n{} in a garden",
    "keep": (KEPT,),
    "negative_prompts": (NEGATIVE,),
    "captions": 12,
    "resolution": 64,
    "trajectories": 4,
    "sampling_steps": 4,
    "protection": 1.0,
    "steps": 8,
}


def train(model, clip, **values):
    family = model_family(model).defaults
    settings = preset_settings("balanced", family=family, **{**QUICK, **values})
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        with ComfyDenoiser(model, clip, "small", 6, settings.resolution, settings.layers) as d:
            last = erase(settings, d)
    return last


def noisy(model, sigma: float, seed: int = 3, shape=None) -> torch.Tensor:
    """A latent of pure noise at a level."""
    shape = shape or (1, model.model.latent_format.latent_channels, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise * (sigma if shape[1] == 16 else (1 + sigma**2) ** 0.5)


def sampled_x0(model, prompt: Encoded, sigma: float, seed: int = 3, shape=None) -> torch.Tensor:
    """x0 as the host's samplers get it for a CONDITIONING."""
    comfy.model_management.load_models_gpu([model])
    x = noisy(model, sigma, seed, shape)
    extra = {} if prompt.pooled is None else {"pooled_output": prompt.pooled[None]}
    conds = {"positive": comfy.sampler_helpers.convert_cond([[prompt.tokens[None], extra]])}
    with torch.inference_mode():
        conds = comfy.samplers.process_conds(model.model, x, conds, x.device, torch.zeros_like(x))
        model.pre_run()
        options = comfy.model_patcher.create_model_options_clone(model.model_options)
        comfy.sampler_helpers.prepare_model_patcher(model, {}, options)
        found = comfy.samplers.calc_cond_batch(
            model.model, [conds["positive"]], x, torch.tensor([sigma]), options
        )
        model.cleanup()
    return found[0]


def relative_change(model, patched, prompt: Encoded, sigma: float = 2.0) -> float:
    before, after = (sampled_x0(m, prompt, sigma) for m in (model, patched))
    return float((after - before).norm() / (noisy(model, sigma) - before).norm())


@pytest.fixture(scope="module")
def sdxl():
    return load_family("sdxl")


@pytest.fixture(scope="module")
def sdxl_erasure(sdxl):
    return train(*sdxl)


def test_sdxl_is_asked_as_the_hosts_samplers_ask_it(sdxl):
    model, clip = sdxl
    cat, long = encode_prompts(clip, ["a cat", "a cat " * 60], pooled=True)
    assert cat.tokens.shape == (77, 2048) and cat.pooled.shape == (1280,)
    expected = [sampled_x0(model, prompt, 2.0) for prompt in (cat, long)]
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 5**0.5
    with torch.inference_mode(False), ComfyDenoiser(model, clip, "", 6, 64) as denoiser:
        assert denoiser.family == "SDXL"
        assert torch.equal(denoiser.encode(["a cat"])[0].pooled, cat.pooled)
        with torch.no_grad():
            both = denoiser.predict_x0(x.repeat(2, 1, 1, 1), torch.tensor([2.0, 2.0]), [cat, long])
    torch.testing.assert_close(both, torch.cat(expected), rtol=1e-4, atol=1e-4)
    swapped = sampled_x0(model, Encoded(cat.tokens, long.pooled), 2.0)
    assert (swapped - expected[0]).norm() > 1e-3 * expected[0].norm()


def test_sdxl_moves_and_holds_every_null_and_the_kept_prompt_with_its_pooled_vector(
    sdxl, sdxl_erasure
):
    model, clip = sdxl
    measures = sdxl_erasure.record["measures"]
    assert measures["moved_held_out"]["overall"] >= 0.8
    assert measures["kept"][0]["exact"]
    patched = apply_erasure(model, sdxl_erasure, 1.0)
    null, kept, negative, erased = encode_prompts(
        clip, ["", KEPT, NEGATIVE, "a photo of a cat"], pooled=True
    )
    for prompt in (null, null.zeroed(), kept, negative):
        for sigma in (0.5, 5.0):
            assert relative_change(model, patched, prompt, sigma) <= 1e-5
    assert relative_change(model, patched, erased) > 0.02


def test_sdxl_says_what_the_pooled_vector_lets_through(sdxl_erasure):
    pooled = sdxl_erasure.record["measures"]["pooled"]
    assert 1e-4 < pooled["leak"] < 0.5
    assert pooled["left"] < 0.1 * pooled["leak"]
    assert "pooled vector alone brings" in report_text(sdxl_erasure.record)
    assert sdxl_erasure.record["gradient_apart"] <= 0.01


def test_sdxl_file_has_the_names_that_other_tools_know(sdxl, sdxl_erasure, tmp_path):
    model, clip = sdxl
    assert len(sdxl_erasure.factors) == 15
    assert "lora_unet_label_emb_0_0" in sdxl_erasure.factors
    known = ("lora_unet_input_blocks_", "lora_unet_label_emb_0_0")
    assert all(name.startswith(known) for name in sdxl_erasure.factors)
    path = save_erasure(sdxl_erasure, tmp_path, "cat")
    file, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    with torch.inference_mode():
        stock, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
    erased = encode_prompts(clip, ["a cat"], pooled=True)[0]
    ours = sampled_x0(apply_erasure(model, sdxl_erasure, 1.0), erased, 2.0)
    assert torch.equal(sampled_x0(stock, erased, 2.0), ours)


@pytest.fixture(scope="module")
def sd2():
    return load_family("sd2")


def sampled_as(model, prediction: str, zero_snr: bool):
    """The model behind the host's own node that changes what the network is taken to predict."""
    return ModelSamplingDiscrete().patch(model, prediction, zero_snr)[0]


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("eps", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_what_the_network_predicts_is_taken_from_the_patched_model(sd2, prediction, zero_snr):
    model, clip = sampled_as(sd2[0], prediction, zero_snr), sd2[1]
    cat = encode_prompts(clip, ["a cat"])[0]
    assert cat.tokens.shape == (77, 1024)
    with torch.inference_mode(False), ComfyDenoiser(model, clip, "", 6, 64) as denoiser:
        assert denoiser.family == "SD2"
        sigma = denoiser.sigmas(4)[:-1]
        assert bool(sigma[0] > 1000) == zero_snr
        expected = 1 + sigma**2 if prediction == "v_prediction" else torch.ones(4)
        torch.testing.assert_close(denoiser.loss_weight(sigma), expected, rtol=1e-4, atol=1e-4)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            x0 = [denoiser.predict_x0(noise * (1 + s**2) ** 0.5, s[None], [cat]) for s in sigma[:2]]
    for own, s in zip(x0, sigma[:2].tolist(), strict=True):
        torch.testing.assert_close(own, sampled_x0(model, cat, s), rtol=1e-4, atol=1e-4)


def test_sd2_with_v_prediction_and_zero_terminal_snr_is_erased(sd2):
    model, clip = sampled_as(sd2[0], "v_prediction", True), sd2[1]
    erasure = train(model, clip, steps=16)
    measures = erasure.record["measures"]
    assert measures["moved_held_out"]["overall"] >= 0.9
    assert measures["moved_held_out"]["high"] >= 0.9
    assert erasure.record["gradient_apart"] <= 0.01
    patched = apply_erasure(model, erasure, 1.0)
    null, kept, erased = encode_prompts(clip, ["", KEPT, "a photo of a cat"])
    for sigma in (0.5, 5.0, 500.0):
        assert relative_change(model, patched, null, sigma) <= 1e-5
        assert relative_change(model, patched, kept, sigma) <= 1e-5
    assert relative_change(model, patched, erased) > 0.02


# Where the prompt's tokens enter, and its pooled vector.
ENTRANCES = {
    "SD3": {"lora_unet_context_embedder", "lora_unet_y_embedder_mlp_0"},
    "Flux": {"lora_unet_txt_in", "lora_unet_vector_in_in_layer"},
}


@pytest.fixture(scope="module", params=["sd3", "flux"])
def joint(request):
    return built_model(request.param)


def test_joint_attention_is_asked_as_the_hosts_samplers_ask_it(joint):
    """Prompts of different length too, which can't be repeated there."""
    model, clip = joint
    prompts = encode_prompts(clip, ["a cat", "a cat " * 60, "a dog"], pooled=True)
    assert {len(prompt.tokens) for prompt in prompts} == {77, 154}
    expected = [sampled_x0(model, prompt, 0.7) for prompt in prompts]
    with torch.inference_mode(False), ComfyDenoiser(model, clip, "", 6, 64) as denoiser:
        assert denoiser.loss_weight(torch.tensor([0.1, 0.9])).tolist() == pytest.approx([1, 1])
        x = noisy(model, 0.7).repeat(3, 1, 1, 1)
        with torch.no_grad():
            together = denoiser.predict_x0(x, torch.full((3,), 0.7), prompts)
    torch.testing.assert_close(together, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_joint_attention_is_erased_where_the_prompt_enters(joint, tmp_path):
    model, clip = joint
    erasure = train(model, clip)
    record, measures = erasure.record, erasure.record["measures"]
    assert set(erasure.factors) == ENTRANCES[record["family"]] and record["form"] == "hard"
    assert measures["moved_held_out"]["overall"] >= 0.9
    assert record["gradient_apart"] <= 0.01
    assert "Experimental on this family" in report_text(record)
    patched = apply_erasure(model, erasure, 1.0)
    null, kept, erased = encode_prompts(clip, ["", KEPT, "a photo of a cat"], pooled=True)
    for prompt in (null, null.zeroed(), kept):
        for sigma in (0.2, 0.9):
            assert relative_change(model, patched, prompt, sigma) <= 1e-5
    changed = relative_change(model, patched, erased, 0.7)
    assert changed > 0.01
    path = save_erasure(erasure, tmp_path, "cat")
    with torch.inference_mode():
        file = comfy.utils.load_torch_file(str(path))
        stock, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
    assert relative_change(model, stock, erased, 0.7) == changed


def test_fluxs_blocks_are_not_trained_through_without_the_remedy(monkeypatch):
    model, clip = built_model("flux")
    monkeypatch.setattr(host, "OutOfPlace", contextlib.nullcontext)
    with pytest.raises(GradientError, match="can't be trained through: .*inplace"):
        train(model, clip, steps=1)
