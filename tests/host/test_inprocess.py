"""The pack against the host's own code, in this process: exactness, untouchedness, bad input."""

from __future__ import annotations

import functools

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import pytest
import torch
from concept_surgery.erase_core import Meter, PredictionError, erase, preset_settings
from concept_surgery.erase_core.artefact.language_store import KEPT_FILES, LanguageStore
from concept_surgery.erase_core.artefact.report import report_text
from concept_surgery.erase_core.model.prompt import Encoded
from concept_surgery.erase_core.settings.layers import LayerRuleError
from concept_surgery.nodes.apply import ApplyError, apply_erasure
from concept_surgery.nodes.families import UnsupportedModelError
from concept_surgery.nodes.host import ComfyDenoiser, left_out_of_training, twin_of
from concept_surgery.nodes.matrices import trained_keys
from concept_surgery.nodes.train import TrainErasure

from tools.checkpoint import build_checkpoint
from tools.environment import BUILD

from ..long import long
from .tiny import (
    QUICK,
    interrupting,
    noise_prediction,
    relative_change,
    tokens_of,
    train,
    weights_hash,
)

KEEP = ("tiger", "a red car", "a house", "a boat", "an old man", "a tree", "pizza", "a castle")
# As many steps and states as the preset says, which are what its budget and its bounds are about;
# of small pictures, which cost less than half.
PRESET = {"steps": None, "trajectories": None, "sampling_steps": None}
PRESET |= {"captions": 64, "resolution": 32}


@pytest.mark.parametrize("count", [0, pytest.param(1, marks=long), pytest.param(4, marks=long), 8])
def test_exact_prompts_do_not_move_and_the_rest_is_reported(loaded, store, count):
    model, clip = loaded
    negative = "blurry, watermark"
    result = train(
        loaded,
        store,
        concepts="cat => dog",
        keep=KEEP[:count],
        negative_prompts=(negative,),
        steps=2,
    )
    patched = apply_erasure(model, result, 1.0)
    kept = result.record["measures"]["kept"]
    assert [entry["text"] for entry in kept] == list(KEEP[:count])
    exact = ["", negative, *(entry["text"] for entry in kept if entry["exact"])]
    for tokens in tokens_of(clip, exact):
        for sigma in (0.1, 1.0, 5.0, 14.0):
            assert relative_change(model, patched, tokens, sigma) <= 1e-5
    for entry in kept:
        if not entry["exact"]:
            assert entry["share_left"] < 0.25 and entry["drift"] > 1e-5
    erased = tokens_of(clip, ["a photo of a cat"])[0]
    assert relative_change(model, patched, erased) > 0.02


@pytest.mark.parametrize(
    "values",
    [
        {"concepts": "cat => dog"},
        {"concepts": "pizza"},
        {"concepts": "Van Gogh", "kind": "style"},
    ],
    ids=["alternative", "removed", "style"],
)
def test_balanced_moves_the_guidance_within_its_budget(loaded, store, values):
    record = train(loaded, store, **PRESET, **values).record
    measures = record["measures"]
    assert measures["moved_held_out"]["overall"] >= 0.90
    assert measures["moved_sampled"]["overall"] >= 0.80
    assert measures["null_drift"] <= 1e-5
    assert record["forward_equivalents"] <= 900


def test_instant_moves_the_guidance_without_sampling(loaded, store):
    """At least 70 % on held-out states, which are sampled here only to measure."""
    alone = train(loaded, store, captions=64, steps=0, trajectories=0, concepts="cat => dog")
    record = alone.record
    assert record["forward_equivalents"] == 0 and record["measures"]["moved_held_out"] is None
    measured = train(loaded, store, captions=64, steps=0, trajectories=8, concepts="cat => dog")
    assert measured.record["measures"]["moved_held_out"]["overall"] >= 0.70
    model, clip = loaded
    patched = apply_erasure(model, alone, 1.0)
    tokens, erased = tokens_of(clip, ["", "a photo of a cat"])
    assert relative_change(model, patched, tokens) <= 1e-5
    assert relative_change(model, patched, erased) > 0.02
    assert "Nothing was sampled" in report_text(record)


@pytest.mark.parametrize(
    "layers",
    [
        "key-value",
        pytest.param("cross-attention", marks=long),
        pytest.param("transformer", marks=long),
    ],
)
def test_soft_form_holds_by_penalty_within_its_budget(loaded, store, layers):
    """Squared drifts of the null prompt and of four keep prompts at most 5 % of the change."""
    settings = {"form": "soft", "layers": layers, "keep": KEEP[:4], "concepts": "cat => dog"}
    result = train(loaded, store, **PRESET, **settings)
    record = result.record
    measures = record["measures"]
    assert measures["moved_held_out"]["overall"] >= 0.90
    erased = measures["moved_held_out"]["erased_change"] ** 2
    assert measures["null_drift"] ** 2 <= 0.05 * erased
    assert len(measures["kept"]) == 4
    assert all(not k["exact"] and k["drift"] ** 2 <= 0.05 * erased for k in measures["kept"])
    assert record["forward_equivalents"] <= 2700
    patched = apply_erasure(loaded[0], result, 1.0)
    assert len(patched.patches) == record["matrices"]


def test_layers_that_match_nothing_are_refused(loaded):
    with pytest.raises(LayerRuleError, match="key-value .* transformer"):
        ComfyDenoiser(*loaded, "tiny", 6, 64, "*_attn3_*")


def test_an_emphasised_word_of_a_kept_prompt_stays_exact(loaded, finished):
    """The host moves an emphasised token away from the null prompt's, which is exact too."""
    model, clip = loaded
    patched = apply_erasure(model, finished, 1.0)
    plain, *emphasised = tokens_of(
        clip, ["a photo of a tiger", "a photo of a (tiger:1.4)", "a (photo of a tiger:0.6)"]
    )
    for tokens in emphasised:
        assert not torch.equal(tokens, plain)
        assert relative_change(model, patched, tokens) <= 1e-5


def test_several_concepts_share_a_run_and_one_is_taken_out_again(loaded, store):
    model, clip = loaded
    settings = {"captions": 64, "steps": 12, "trajectories": 12, "sampling_steps": 6}
    result = train(loaded, store, concepts="cat => dog\npizza\ncastle => tent", **settings)
    both = result
    moved = {c["text"]: c["moved"] for c in both.record["concepts"]}
    assert min(moved.values()) >= 0.7
    less = both.without(["pizza"])
    assert less.concept == "cat, castle" and less.record["taken_out"] == ["pizza"]
    whole, without = apply_erasure(model, both, 1.0), apply_erasure(model, less, 1.0)
    # a removed concept is asked to become a neutral word of the same length
    texts = ["a photo of a pizza", "a photo of a thing", "a photo of a cat", "a photo of a dog"]
    texts += ["a castle in a garden", "a tent in a garden", ""]
    pizza, thing, cat, dog, castle, tent, null = tokens_of(clip, texts)
    prompts = [(pizza, thing), (cat, dog), (castle, tent)]
    before = [moved_at(model, whole, *pair) for pair in prompts]
    after = [moved_at(model, without, *pair) for pair in prompts]
    assert min(before) >= 0.7 and min(after[1:]) >= 0.6  # the others are still erased
    assert after[0] <= 0.4 * before[0]  # pizza is drawn again
    assert relative_change(model, without, null) <= 1e-5
    for first, second in ((whole, less), (without, both)):
        with pytest.raises(ApplyError, match="'cat', 'castle' in common .* of one training"):
            apply_erasure(first, second, 1.0)
    parts = apply_erasure(without, both.without(["cat", "castle"]), 1.0)
    one, two = noise_prediction(parts, pizza, 2.0), noise_prediction(whole, pizza, 2.0)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def moved_at(model, patched, erased, alternative, sigma=5.0) -> float:
    """How far the prediction of a prompt went to that of its alternative."""
    target = noise_prediction(model, alternative, sigma)
    left = noise_prediction(patched, erased, sigma) - target
    return float(
        1 - left.square().sum() / (noise_prediction(model, erased, sigma) - target).square().sum()
    )


def test_early_stop_ends_the_run_when_little_is_left(loaded, store):
    settings = {"captions": 64, "steps": 80, "trajectories": 8, "sampling_steps": 6}
    record = train(loaded, store, concepts="cat => dog", stop_below=0.2, **settings).record
    assert record["converged"] and record["complete"] and record["steps_done"] < 80
    assert "stayed below 20%" in report_text(record)


def test_a_distilled_model_is_trained_at_guidance_one(loaded, store):
    settings = preset_settings("balanced", concepts="cat => dog", distilled=True)
    values = {"guidance_scale": settings.guidance_scale, "sampling_steps": 4, "captions": 64}
    record = train(loaded, store, concepts="cat => dog", **values).record
    assert record["settings"]["guidance_scale"] == 1
    assert record["measures"]["moved_held_out"]["overall"] >= 0.7
    assert "negative prompts aren't used there" in report_text(record)


def test_same_seed_same_result_and_another_seed_another(loaded, store, finished):
    values = {"concepts": "cat => dog", "keep": ("a photo of a tiger",)}
    assert train(loaded, store, **values).identity == finished.identity
    assert train(loaded, store, seed=1, **values).identity != finished.identity


def test_training_and_applying_leave_the_model_as_it_was(loaded, store):
    model, clip = loaded
    before = weights_hash(model)
    patched = apply_erasure(model, train(loaded, store, concepts="cat"), 1.0)
    noise_prediction(patched, tokens_of(clip, ["a cat"])[0], 2.0)
    assert weights_hash(model) == before
    assert not model.patches


def test_an_error_and_an_interrupt_leave_the_model_as_it_was(loaded, store, monkeypatch):
    model, _ = loaded
    before = weights_hash(model)
    settings = preset_settings("balanced", concepts="cat", **QUICK)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        pytest.raises(comfy.model_management.InterruptProcessingException),
    ):
        with ComfyDenoiser(*loaded, "tiny", 6, 64) as denoiser:
            erase(settings, denoiser, store, Meter(interrupting("Training")))
    assert weights_hash(model) == before
    with pytest.raises(RuntimeError, match="broken"):
        with ComfyDenoiser(*loaded, "tiny", 6, 64):
            raise RuntimeError("broken")
    assert weights_hash(model) == before


def test_one_copy_of_the_weights(loaded):
    model, _ = loaded
    comfy.model_management.load_models_gpu([model])
    with torch.inference_mode(False):
        twin = twin_of(model)
    host = {w.untyped_storage().data_ptr() for w in model.model.diffusion_model.parameters()}
    total = extra = 0
    for weight in twin.diffusion_model.parameters():
        size = weight.numel() * weight.element_size()
        total += size
        extra += 0 if weight.untyped_storage().data_ptr() in host else size
        assert not weight.is_inference()
    assert total > 0 and extra == 0


def test_strength_zero_is_the_input_model(loaded, finished):
    model, clip = loaded
    patched = apply_erasure(model, finished, 0.0)
    assert not patched.patches and patched is not model
    tokens = tokens_of(clip, ["a cat"])[0]
    assert torch.equal(noise_prediction(model, tokens, 2.0), noise_prediction(patched, tokens, 2.0))


def test_twice_is_refused_and_two_erasures_commute(loaded, store, finished):
    model, clip = loaded
    once = apply_erasure(model, finished, 1.0)
    with pytest.raises(ApplyError, match="already on this model"):
        apply_erasure(once, finished, 0.5)
    other = train(loaded, store, concepts="pizza")
    both = apply_erasure(once, other, 1.0)
    swapped = apply_erasure(apply_erasure(model, other, 1.0), finished, 1.0)
    tokens = tokens_of(clip, ["a cat eating pizza"])[0]
    one, two = noise_prediction(both, tokens, 2.0), noise_prediction(swapped, tokens, 2.0)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_inpainting_model_is_refused_for_training_and_its_matrices_are_known(loaded):
    path = build_checkpoint(
        BUILD / "checkpoints" / "inpaint.safetensors", layout="nano", in_channels=9
    )
    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(path), output_clip=False)[0]
    with pytest.raises(UnsupportedModelError, match="takes 9 channels"):
        ComfyDenoiser(model, loaded[1], "inpaint", 6, 64)
    assert len(trained_keys(model)) == 2


def test_no_clip_is_refused(loaded):
    with pytest.raises(ValueError, match="No CLIP is connected"):
        TrainErasure.execute(loaded[0], None, erase="cat")


def test_nan_in_the_model_ends_the_run_with_advice(checkpoint, loaded, store):
    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_clip=False)[0]
        model.model.diffusion_model.out[2].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(PredictionError, match="contains NaN"):
        train((model, loaded[1]), store, concepts="cat")


def test_a_variant_with_other_inputs_is_refused_by_name(loaded):
    unet = {**loaded[0].model.model_config.unet_config, "in_channels": 8}
    config = comfy.supported_models.SD15_instructpix2pix(unet)
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(config.get_model({}, "", device=cpu), cpu, cpu)
    with pytest.raises(UnsupportedModelError, match="SD15_instructpix2pix.* variant of SD1.x"):
        ComfyDenoiser(model, loaded[1], "pix2pix", 6, 64)


def test_prompts_beyond_the_window_are_encoded_whole_and_kept_exact(loaded, store):
    model, clip = loaded
    long = ", ".join(f"a {thing} by the sea" for thing in ("boat", "tree", "house", "dog") * 5)
    one, other = tokens_of(clip, [long, "a cat"])
    assert one.shape == (154, 768) and other.shape == (77, 768)
    for alone, batched in zip((one, other), tokens_of(clip, [long, "a cat"], True), strict=True):
        torch.testing.assert_close(alone, batched, rtol=1e-4, atol=1e-4)
    result = train(loaded, store, concepts="cat => dog", keep=(long,), steps=2)
    (kept,) = result.record["measures"]["kept"]
    patched = apply_erasure(model, result, 1.0)
    assert kept["exact"] and relative_change(model, patched, one) <= 1e-5


def test_training_sees_the_patches_upstream(loaded, finished):
    model, clip = loaded
    patched = apply_erasure(model, finished, 1.0)
    tokens = tokens_of(clip, ["a cat"])[0]
    expected = noise_prediction(patched, tokens, 2.0)
    with torch.inference_mode(False), ComfyDenoiser(patched, clip, "", 6, 64) as denoiser:
        assert denoiser.base["fingerprint"] == finished.record["base"]["fingerprint"]
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(1, 4, 8, 8, generator=generator) * 5**0.5
        x0 = denoiser.predict_x0(x, torch.tensor([2.0]), [Encoded(tokens)])
    torch.testing.assert_close((x - x0) / 2.0, expected, rtol=1e-4, atol=1e-4)


def test_the_host_samples_with_what_training_had_it_load(checkpoint, loaded, store, monkeypatch):
    """On a GPU the first to need a model moves it there; what samples next is the host's own."""
    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_clip=False)[0]
    tokens = tokens_of(loaded[1], ["a cat"])[0]
    management = comfy.model_management
    loads, frees, moved = management.load_models_gpu, management.free_memory, []

    def move(way, *args, **more):
        moved.append(way)
        model.model.to(torch.float64).to(torch.float32)  # as from one device to another
        return way(*args, **more)

    monkeypatch.setattr(management, "load_models_gpu", functools.partial(move, loads))
    monkeypatch.setattr(management, "free_memory", functools.partial(move, frees))
    train((model, loaded[1]), store, concepts="cat => dog", steps=2)
    monkeypatch.undo()
    assert {loads, frees} <= set(moved)
    expected = noise_prediction(loaded[0], tokens, 2.0)
    torch.testing.assert_close(noise_prediction(model, tokens, 2.0), expected)


def test_language_store_survives_damage_and_stays_small(tmp_path):
    folder = tmp_path / "language"
    store = LanguageStore(folder)
    for number in range(KEPT_FILES + 3):
        store[f"key{number}"] = torch.full((2, 2), float(number))
    assert len(store) == KEPT_FILES and len(list(folder.iterdir())) == KEPT_FILES
    newest = f"key{KEPT_FILES + 2}"
    assert torch.equal(LanguageStore(folder)[newest], store[newest])
    (folder / f"{newest}.safetensors").write_bytes(b"damaged")
    assert newest not in LanguageStore(folder)
    (tmp_path / "file").write_text("")
    unwritable = LanguageStore(tmp_path / "file" / "folder")
    unwritable["key"] = torch.ones(1)
    assert torch.equal(unwritable["key"], torch.ones(1))


def test_what_training_leaves_out_is_said(loaded):
    model = loaded[0].clone()
    assert left_out_of_training(model) == []
    model.set_model_unet_function_wrapper(lambda apply, arguments: None)
    model.set_model_attn2_patch(lambda *arguments: arguments)
    (note,) = left_out_of_training(model)
    assert "patches, model_function_wrapper" in note


class ForgetfulPatcher(comfy.model_patcher.ModelPatcher):
    """A third-party patcher that drops what it doesn't like without a word."""

    def add_patches(self, patches, *arguments, **keywords):
        fewer = dict(list(patches.items())[1:])
        return super().add_patches(fewer, *arguments, **keywords)


def test_keys_that_the_host_drops_are_named(loaded, finished):
    cpu = torch.device("cpu")
    model = ForgetfulPatcher(loaded[0].model, cpu, cpu)
    with pytest.raises(ApplyError, match="took 7 of the 8 .* not taken: diffusion_model.* taken:"):
        apply_erasure(model, finished, 1.0)
    assert not model.patches
