"""What the extension leaves as it was, whatever happens."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from concept_surgery.erase_core import Erasure, preset_settings

from .conftest import in_all_only
from .test_adapters import denoiser, queue_lock, trained


def saved(fake, tiny, name="no_cat"):
    from concept_surgery.webui import loras

    outcome = trained(fake, {**tiny, "steps": 0, "trajectories": 0})
    path, _ = loras.save(outcome.erasure, name)
    return path, outcome.erasure


def test_loras_of_the_last_prompt_are_out_while_it_trains_and_in_again_afterwards(fake, tiny):
    """Trap 7."""
    fake.load()
    clean = trained(fake, tiny, preset="instant", steps=0, trajectories=0).erasure
    untouched = weights_of(fake)
    _, erasure = saved(fake, tiny, "no_cat")
    fake.draw("a cat <lora:no_cat:1>")
    merged = weights_of(fake)
    assert any(not torch.equal(merged[key], untouched[key]) for key in merged)
    again = trained(fake, tiny, concepts="cat => dog", steps=0, trajectories=0, seed=0)
    assert again.erasure.record["base"]["fingerprint"] == clean.record["base"]["fingerprint"]
    assert again.erasure.identity == clean.identity
    after = weights_of(fake)
    assert all(torch.equal(after[key], merged[key]) for key in merged)
    p, _ = fake.draw("a cat")
    assert all(torch.equal(weights_of(fake)[key], untouched[key]) for key in untouched)


def weights_of(fake):
    return {key: value.detach().clone() for key, value in fake.network.state_dict().items()}


@in_all_only
def test_pictures_are_the_same_before_and_after(fake, tiny):
    fake.load()
    before, _ = fake.draw("a cat in a house")
    trained(fake, tiny)
    after, _ = fake.draw("a cat in a house")
    assert torch.equal(before.latents[0], after.latents[0])


@pytest.mark.parametrize("at", [1, *(pytest.param(n, marks=in_all_only) for n in range(2, 40, 2))])
def test_an_interrupt_at_any_stage_changes_nothing_and_loses_nothing(fake, tiny, at):
    """Trap 6 as well: in Forge the error has to come back from another thread."""
    from concept_surgery.webui import training
    from concept_surgery.webui.errors import InterruptedByUserError

    fake.load()
    before, seen = fake.hashes(), []

    def interrupt(progress):
        seen.append(progress.stage)
        if len(seen) == at:
            fake.shared.state.interrupt()

    with pytest.raises(InterruptedByUserError, match="as it was"):
        training.train(lambda f: preset_settings("balanced", family=f.defaults, **tiny), interrupt)
    assert fake.hashes() == before
    assert not queue_lock().locked() and not fake.shared.state.interrupted
    assert not any(m._forward_hooks for m in fake.network.modules())
    if at == 1:  # and it trains afterwards, in the same thread
        assert trained(fake, tiny).erasure.record["complete"]


@in_all_only
def test_skip_keeps_what_was_learned(fake, tiny):
    from concept_surgery.webui import training

    fake.load()

    def skip(progress):
        if progress.step == 2:
            fake.shared.state.skip()

    outcome = training.train(
        lambda f: preset_settings("balanced", family=f.defaults, **{**tiny, "steps": 30}), skip
    )
    assert outcome.erasure.record["steps_done"] < 30
    assert not outcome.erasure.record["complete"]


def test_a_model_that_is_switched_in_ends_the_run(fake, tiny):
    from concept_surgery.webui import training
    from concept_surgery.webui.errors import ModelChangedError

    fake.load()
    seen = []

    def switch(progress):
        seen.append(progress)
        if len(seen) == 5:  # other weights in the same object, as A1111 does
            fake.model.sd_checkpoint_info = type(fake.model.sd_checkpoint_info)(
                name="other.safetensors", filename="/m/other"
            )

    with pytest.raises(ModelChangedError, match="nothing was kept"):
        training.train(lambda f: preset_settings("balanced", family=f.defaults, **tiny), switch)
    assert not list((fake.folder / "data").rglob("results/*.safetensors"))


def test_the_queue_is_waited_for(a1111, tiny):
    a1111.load()
    done = []

    def run():
        done.append(trained(a1111, {**tiny, "steps": 0, "trajectories": 0}))

    with queue_lock():
        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.3)
        assert not done and not a1111.shared.state.jobs
    thread.join(60)
    assert done and a1111.shared.state.jobs == ["Concept Surgery"]


@in_all_only
def test_progress_is_the_hosts(fake, tiny):
    from concept_surgery.webui import training

    fake.load()
    seen = []

    def look(progress):
        state = fake.shared.state
        seen.append((state.job, state.sampling_step, state.sampling_steps, state.textinfo))

    training.train(lambda f: preset_settings("balanced", family=f.defaults, **tiny), look)
    assert {job for job, *_ in seen} == {"Concept Surgery"}
    done = [step for _, step, *_ in seen]
    assert done == sorted(done) and done[-1] > 0
    assert len({text for *_, text in seen}) > 3


@pytest.mark.parametrize(
    "medium", [True, pytest.param(False, marks=in_all_only)], ids=["medvram", "lowvram"]
)
def test_little_memory_is_honoured(a1111, tiny, medium):
    from modules import lowvram

    a1111.load()
    lowvram.setup_for_low_vram(a1111.model, medium)
    a1111.shared.cmd_opts.lowvram = not medium
    lowvram.moves.clear()
    before = a1111.hashes()
    assert trained(a1111, tiny).erasure.record["complete"]
    moved = [what for what, _ in lowvram.moves]
    assert moved.count("in") >= (2 if medium else 100)
    assert not medium or ("in", id(a1111.model.model)) in lowvram.moves
    assert lowvram.module_in_gpu is None  # nothing of ours stays there
    assert a1111.hashes() == before


def test_fp8_weights_are_run_in_autocast_and_stay_exact(a1111, tiny):
    """Autocast would round R and B, and the empty prompt would move."""
    from modules import devices

    a1111.load()
    for module in a1111.network.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
    devices.fp8 = True
    before = a1111.hashes_of_bytes()
    record = trained(a1111, {**tiny, "steps": 0}).erasure.record
    assert record["measures"]["drift_of"] == "prediction"
    assert record["measures"]["null_drift"] < 1e-5
    assert record["complete"] and a1111.hashes_of_bytes() == before


def test_hypernetworks_are_out_and_in_again_and_told(a1111, tiny):
    a1111.load()
    loaded = a1111.shared.loaded_hypernetworks = ["a hypernetwork"]
    a1111.shared.opts.sd_hypernetwork = "anime"
    a1111.model.applied_token_merged_ratio = 0.5
    outcome = trained(a1111, {**tiny, "steps": 0, "trajectories": 0})
    assert a1111.shared.loaded_hypernetworks is loaded
    assert a1111.model.applied_token_merged_ratio == 0
    assert any("'anime'" in note for note in outcome.notes)


def test_what_an_extension_put_around_the_model_is_told_or_refused(a1111, forge_too, tiny):
    from concept_surgery.webui.errors import UnsupportedModelError

    a1111.load()
    layer = next(iter(a1111.network.input_blocks))
    layer.forward = lambda *given, **named: None
    with pytest.raises(UnsupportedModelError, match="Another extension"):
        trained(a1111, tiny)
    assert not queue_lock().locked()


@pytest.fixture
def forge_too():
    return None


def test_patches_of_forges_extensions_are_told(forge, tiny):
    forge.load()
    options = forge.model.forge_objects_original.unet.model_options
    options["transformer_options"]["patches"] = {"attn1_patch": [len]}
    outcome = trained(forge, {**tiny, "steps": 0, "trajectories": 0})
    assert any("attn1" in note or "patches" in note for note in outcome.notes)


def test_packed_weights_and_other_architectures_are_refused_in_words(forge, tiny):
    from concept_surgery.webui.errors import UnsupportedModelError

    forge.load()
    weight = next(m.weight for m in forge.network.modules() if hasattr(m, "in_features"))
    weight.gguf_cls = "Q4_0"
    with pytest.raises(UnsupportedModelError, match="GGUF"):
        trained(forge, tiny)
    del weight.gguf_cls
    forge.model.is_sd1, forge.model.is_sd3 = False, True
    with pytest.raises(UnsupportedModelError, match="SD3"):
        trained(forge, tiny)


def test_without_a_model_it_says_so(a1111, tiny):
    from concept_surgery.webui.errors import UnsupportedModelError

    with pytest.raises(UnsupportedModelError, match="Choose a checkpoint"):
        trained(a1111, tiny)
    assert not queue_lock().locked()


def test_tiling_of_the_last_picture_is_not_trained_on(a1111):
    a1111.load()
    convolutions = [m for m in a1111.network.modules() if isinstance(m, torch.nn.Conv2d)]
    with denoiser(a1111) as adapter:
        identity = adapter.identity
        (prompt,) = adapter.encode(["a cat"])
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            plain = adapter.predict_x0(x, torch.ones(1), [prompt])
    for one in convolutions:
        one.padding_mode = "circular"
    with denoiser(a1111) as adapter:
        with torch.no_grad():
            assert torch.equal(adapter.predict_x0(x, torch.ones(1), [prompt]), plain)
        assert adapter.identity == identity
    assert all(one.padding_mode == "circular" for one in convolutions)


def test_one_copy_of_the_weights(fake):
    fake.load()
    with denoiser(fake) as adapter:
        own = {weight.untyped_storage().data_ptr() for weight in adapter.weights()}
    theirs = {w.untyped_storage().data_ptr() for w in fake.network.parameters()}
    assert own & theirs == theirs and len(own - theirs) <= len(list(fake.network.buffers()))


def test_what_it_trains_the_host_applies(fake, tiny):
    """By a tag: the weights of the picture are those of the erasure."""
    fake.load()
    path, erasure = saved(fake, tiny, "no_cat")
    assert Erasure.load(path).identity == erasure.identity
    before = weights_of(fake)
    fake.draw("a cat <lora:no_cat:0.5>")
    after = weights_of(fake)
    with denoiser(fake) as adapter:
        paths = dict(adapter._paths)
    for name, path in paths.items():
        change = after[f"{path}.weight"] - before[f"{path}.weight"]
        torch.testing.assert_close(change, 0.5 * erasure.delta(name), rtol=1e-4, atol=1e-6)
