"""Erasing from a pipeline: what it gives, how it is put on, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from concept_surgery.erase_core import Erasure as CoreErasure
from concept_surgery.erase_core import Meter, SettingsError
from concept_surgery.erase_core.artefact.stack import STRONGEST
from concept_surgery.pipelines import Erasure, ErasureFileError, PipelineError, erase
from concept_surgery.pipelines.adapter import PipelineDenoiser

from .conftest import QUICK, at_length
from .small import PIPELINES, latents, state_of

# Families that the closed form works on, and those that are trained in the soft form.
NAMED = ("SDXL", "SD3", "Flux")
OTHERS = ("PixArt", "Sana", "Lumina2", "AuraFlow", "QwenImage")


def test_an_erasure_is_applied_beside_the_weights_and_taken_off_again(sd1, finished):
    before = latents(sd1)
    with finished.applied(sd1):
        inside = latents(sd1)
    assert latents(sd1).equal(before)
    assert (inside - before).norm() > 0.01 * before.norm()
    kept = finished.applied(sd1, 0.5)  # for good, until it is removed
    half = latents(sd1)
    kept.remove()
    kept.remove()
    assert latents(sd1).equal(before) and not half.equal(before) and not half.equal(inside)
    with finished.applied(sd1, 0):
        assert latents(sd1).equal(before)


def test_it_goes_when_what_it_was_put_on_for_fails(sd1, finished):
    with pytest.raises(ZeroDivisionError), finished.applied(sd1):
        raise ZeroDivisionError
    with finished.applied(sd1):  # twice would be refused
        pass


def test_twice_or_too_strong_is_refused(sd1, finished):
    with finished.applied(sd1), pytest.raises(PipelineError, match="already on this model"):
        finished.applied(sd1)
    for strength in (STRONGEST + 1, -STRONGEST - 1, float("nan")):
        with pytest.raises(PipelineError, match="between -5 and 5"):
            finished.applied(sd1, strength)


def test_merged_shares_all_but_what_it_changes(sd1, finished):
    before, other = latents(sd1), finished.merged(sd1)
    with finished.applied(sd1):
        expected = latents(sd1)
    assert (latents(other) - expected).norm() < 1e-4 * (expected - before).norm()
    assert latents(sd1).equal(before)
    same = sum(
        p.data_ptr() == q.data_ptr()
        for p, q in zip(other.unet.parameters(), sd1.unet.parameters(), strict=True)
    )
    assert len(list(sd1.unet.parameters())) - same == len(finished.factors)


def test_the_file_is_what_the_pipelines_own_loader_takes(sd1, finished, tmp_path):
    path, pipe = tmp_path / "no_cat.safetensors", finished.merged(sd1, 0)
    finished.save(str(path))
    assert Erasure.load(path).identity == finished.identity
    before = latents(pipe)
    with finished.applied(pipe):
        ours = latents(pipe)
    pipe.load_lora_weights(str(path))
    with pytest.raises(PipelineError, match="LoRA loader"):
        finished.applied(pipe)
    theirs = latents(pipe)
    assert (theirs - ours).norm() < 1e-4 * (ours - before).norm()
    with pytest.raises(PipelineError, match="LoRAs are loaded into it"):
        erase(pipe, "dog", preset="instant", **QUICK)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert erase(pipe, "tree", preset="instant", **QUICK).factors  # on what is in the weights now


def test_nothing_is_written_over_unless_told(finished, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("mine")
    with pytest.raises(ErasureFileError, match="overwrite=True"):
        finished.save(path)
    assert path.read_text() == "mine"
    finished.save(path, overwrite=True)
    assert CoreErasure.load(path).identity == finished.identity


def test_an_erasure_of_another_architecture_is_refused(sd1, finished):
    other = Erasure(
        {"lora_unet_x": torch.ones(4, 1)}, {"lora_unet_x": torch.ones(4, 1)}, finished.record
    )
    with pytest.raises(PipelineError, match="lacks 1 of its 1 matrices"):
        other.applied(sd1)
    name = next(iter(finished.factors))
    other = Erasure({name: torch.ones(4, 1)}, {name: torch.ones(4, 1)}, finished.record)
    with pytest.raises(PipelineError, match=r"has the shape \(4, 4\)"):
        other.merged(sd1)


def test_another_model_is_warned_of(sd1, finished):
    record = {**finished.record, "base": {"name": "other.safetensors", "fingerprint": [9.0] * 8}}
    other = Erasure(finished.bases, finished.factors, record)
    with pytest.warns(UserWarning, match="made on other.safetensors"):
        other.applied(sd1).remove()


def test_training_leaves_the_pipeline_as_it_was(sd1):
    """Which the fixture compares; also what takes a gradient, and the random numbers."""
    sd1.unet.requires_grad_(True).train()
    before, state = state_of(sd1), torch.random.get_rng_state()
    erasure = erase(sd1, "cat => dog", steps=2, **QUICK)
    assert state_of(sd1) == before and torch.random.get_rng_state().equal(state)
    assert erasure.record["gradient_apart"] < 0.01 and erasure.record["steps_done"] == 2
    assert erasure.record["measures"]["null_drift"] < 1e-5
    with pytest.raises(KeyboardInterrupt):
        erase(sd1, "cat", steps=2, meter=Meter(_interrupt_at("Training")), **QUICK)
    with torch.inference_mode():  # as notebooks have it
        assert erase(sd1, "cat", preset="instant", **QUICK).factors
    assert state_of(sd1) == before
    sd1.unet.eval()


def _interrupt_at(stage: str):
    def report(progress) -> None:
        if progress.stage.startswith(stage):
            raise KeyboardInterrupt

    return report


def test_the_same_call_trains_once(sd1, finished, tmp_path):
    told: list[str] = []
    for _ in range(2):
        meter = Meter(lambda progress: told.append(progress.stage))
        found = erase(sd1, "cat", "dog", preset="instant", cache=tmp_path, meter=meter, **QUICK)
    assert meter.reused and meter.spent == 0 and found.identity == finished.identity


def test_prompts_that_the_pipeline_would_cut_are_refused(sd1):
    long = "a photo of " + "very " * 80 + "old shoes"
    for where in ({"concepts": "cat", "keep": [long]}, {"concepts": f"cat => {long}"}):
        with pytest.raises(SettingsError, match="tokenizer of this pipeline reads 77"):
            erase(sd1, preset="instant", **where, **QUICK)


def test_captions_are_encoded_together_and_come_out_alike(sd1):
    denoiser, prompts = PipelineDenoiser(sd1, 64), ["", "a cat", "a photo of two dogs"]
    alone = denoiser.encode(prompts)
    for one, other in zip(alone, denoiser.encode(prompts, together=True), strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, rtol=1e-4, atol=1e-5)
    own = sd1.encode_prompt("a cat", sd1.device, 1, False)[0][0]
    assert alone[1].tokens.equal(own.detach())
    assert list(map(len, denoiser.token_ids(prompts))) == [77] * 3


def test_escaped_brackets_are_read_as_brackets(sd1):
    """As the other faces read them: pipelines know no emphasis, and no backslash before it."""
    denoiser = PipelineDenoiser(sd1, 64)
    escaped, plain = r"1girl, asuka \(evangelion\)", "1girl, asuka (evangelion)"
    (one, same, other) = denoiser.encode([escaped, plain, "1girl, asuka evangelion"])
    assert one.tokens.equal(same.tokens) and not one.tokens.equal(other.tokens)
    assert denoiser.token_ids([escaped]) == denoiser.token_ids([plain])


def test_blocks_are_checkpointed(sd1):
    denoiser, ran = PipelineDenoiser(sd1, 64), []
    shape = denoiser.latent_shape(64)
    x, prompt = torch.randn(1, *shape), denoiser.encode(["a cat"])

    class Run:
        forward_equivalents = 4

        def __call__(self, block, *given, **named):
            ran.append(block)
            return torch.utils.checkpoint.checkpoint(block, *given, use_reentrant=False, **named)

    plain = denoiser.predict_x0(x, torch.tensor([2.0]), prompt)
    with denoiser.around_blocks(Run()):
        checked = denoiser.predict_x0(x, torch.tensor([2.0]), prompt)
    assert len(ran) > 3 and checked.equal(plain)


def test_sdxl_is_exact_and_loads_in_its_own_pipeline(tokenizers, tmp_path):
    _check_family("SDXL", tokenizers, tmp_path, steps=1)


@at_length
@pytest.mark.parametrize("name", NAMED + OTHERS)
def test_families_at_length(name, tokenizers, tmp_path):
    _check_family(name, tokenizers, tmp_path, steps=6, keep=["a tiger"], captions=24)


def _check_family(name, tokenizers, tmp_path, **settings):
    pipe, path = PIPELINES[name](tokenizers), tmp_path / "a.safetensors"
    latents(pipe)  # transformers puts marks on an encoder when it is first used
    before = state_of(pipe)
    erasure = erase(pipe, "cat", "dog", **{**QUICK, **settings})
    assert state_of(pipe) == before
    record = erasure.record
    assert record["gradient_apart"] < 0.01 and record["steps_done"] == settings["steps"]
    assert record["form"] == "hard"
    assert record["measures"]["null_drift"] < 1e-5 and record["measures"]["null_leakage"] < 1e-5
    if name in NAMED:
        assert record["family"] == name and "readers" not in record
    else:  # what reads the prompt was found by predictions
        assert any(row["edited"] for row in record["readers"])
        assert {one["exact"] for one in record["measures"]["kept"]} == {True}
    erasure.save(path)
    assert Erasure.load(path).identity == erasure.identity
    plain = latents(pipe)
    with erasure.applied(pipe):
        ours = latents(pipe)
    assert latents(pipe).equal(plain) and not ours.equal(plain)
    if hasattr(pipe, "load_lora_weights"):  # PixArt's has none
        pipe.load_lora_weights(str(path))
        assert (latents(pipe) - ours).norm() < 1e-4 * (ours - plain).norm()
