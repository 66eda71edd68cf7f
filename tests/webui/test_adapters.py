"""The engine on a model as each kind of host holds it."""

from __future__ import annotations

import pytest
import torch
from concept_surgery.erase_core import GradientError, SettingsError, preset_settings

from .small_models import CHUNK


def trained(fake, tiny, preset="balanced", **named):
    from concept_surgery.webui import training

    def choose(family):
        return preset_settings(preset, family=family.defaults, **{**tiny, **named})

    return training.train(choose)


def denoiser(fake, layers=None, resolution=64):
    from concept_surgery.webui import host

    return host.denoiser_of(host.loaded_model(), 2, resolution, layers)


def test_it_trains_and_the_model_is_as_it_was(fake, tiny):
    fake.load()
    before = fake.hashes()
    training_mode = [module.training for module in fake.network.modules()]
    outcome = trained(fake, tiny)
    record = outcome.erasure.record
    assert record["family"] == "SD1.x" and record["form"] == "hard"
    assert record["steps_done"] == tiny["steps"]
    assert record["measures"]["null_drift"] < 1e-5
    assert record["base"]["name"] == "tiny.safetensors"
    assert fake.hashes() == before
    assert [module.training for module in fake.network.modules()] == training_mode
    assert not any(module._forward_hooks for module in fake.network.modules())
    assert not fake.shared.state.job and not queue_lock().locked()
    again = trained(fake, tiny)
    assert again.stored and again.erasure.identity == outcome.erasure.identity


def queue_lock():
    from modules import call_queue

    return call_queue.queue_lock


def test_every_kind_of_host_gives_the_same_erasure(tmp_path, tiny):
    from .conftest import KINDS, fake_of

    found = {}
    for kind in KINDS:
        for fake in fake_of(kind, tmp_path / kind):
            fake.load()
            with torch.inference_mode(kind == "forge"):
                found[kind] = trained(fake, {**tiny, "steps": 0, "trajectories": 0}).erasure
    first = found.pop("a1111")
    for other in found.values():
        assert other.factors.keys() == first.factors.keys()
        assert other.record["base"]["fingerprint"] == first.record["base"]["fingerprint"]
        for name in first.factors:
            apart = (other.delta(name) - first.delta(name)).norm() / first.delta(name).norm()
            assert apart < 1e-4


def test_predictions_are_the_hosts_own(fake):
    """What the host's sampler would be given for one step, to the bit."""
    from modules import processing

    fake.load()
    with denoiser(fake) as adapter:
        (prompt,) = adapter.encode(["a cat"])
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 5
        with torch.no_grad():
            own = adapter.predict_x0(x, torch.tensor([5.0]), [prompt])
    predict, inference = processing._predictor(fake.model)
    with torch.inference_mode() if inference else torch.no_grad():
        learned = fake.model.get_learned_conditioning(conditioning(["a cat"]))
        theirs = predict(x, torch.tensor([5.0]), learned)
    assert torch.equal(own, theirs)


def conditioning(prompts):
    from modules import prompt_parser

    return prompt_parser.SdConditioning(prompts, width=64, height=64)


def test_prompts_of_a_batch_keep_their_own_length(fake):
    fake.load()
    long = " ".join(["tree"] * (CHUNK + 3))
    prompts = ["a cat", long, "", "a dog, a house"]
    with denoiser(fake) as adapter:
        together = adapter.encode(prompts, together=True)
        alone = adapter.encode(prompts)
        ids = adapter.token_ids(prompts)
    assert max(fake.model.encoder_of_tests.batches) == len(prompts)  # and not one by one
    for one, other, numbers in zip(together, alone, ids, strict=True):
        assert one.tokens.shape == other.tokens.shape and len(numbers) == len(one.tokens)
        torch.testing.assert_close(one.tokens, other.tokens)
    assert len(alone[1].tokens) == 2 * len(alone[0].tokens)
    assert not any(one.tokens.is_inference() for one in together)


def test_emphasis_is_encoded_alone(fake):
    """The host rescales it over the batch, so company would change the embedding."""
    fake.load()
    prompts = ["a cat", "a (dog:1.3)", "a tree"]
    with denoiser(fake) as adapter:
        together, alone = adapter.encode(prompts, together=True), adapter.encode(prompts)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.tokens, other.tokens)


def test_vectors_of_a_textual_inversion_are_tokens_of_their_own(a1111):
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(5))
    a1111.load(inversions={"mystyle": vectors})
    with denoiser(a1111) as adapter:
        plain, other = adapter.token_ids(["a cat", "a mystyle cat"])
    assert len(set(other[2:4])) == 2 and min(other[2:4]) > 1 << 39
    assert plain[2] == other[4]


def test_words_of_the_text_encoder_are_known(fake):
    fake.load()
    with denoiser(fake) as adapter:
        assert {"cat", "dog", "tree"} <= set(adapter.vocabulary())


def test_blocks_that_add_in_place_lose_the_gradient_and_are_cured(forge, tiny):
    """Trap 4, and that it is one: without the cure nothing trains."""
    from concept_surgery.webui.forge import ForgeDenoiser

    forge.load()
    ForgeDenoiser.adds_in_place = False
    with pytest.raises((GradientError, RuntimeError)):
        trained(forge, tiny, seed=1)
    assert not queue_lock().locked()


def test_checkpointing_gives_the_same_gradient(fake):
    from concept_surgery.erase_core.model.activations import Recompute
    from concept_surgery.erase_core.model.low_rank import LowRankEdit

    fake.load()
    with denoiser(fake) as adapter:
        (prompt,) = adapter.encode(["a cat"])
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 5
        gradients = []
        for run in (None, Recompute()):
            generator = torch.Generator().manual_seed(1)
            basis = torch.linalg.qr(torch.randn(64, 3, generator=generator)).Q
            factors = {
                name: torch.full((len(weight), 3), 0.01, requires_grad=True)
                for name, weight in adapter.matrices().items()
            }
            edit = LowRankEdit.shared(basis, factors)
            if run is None:
                x0 = adapter.predict_x0(x, torch.tensor([5.0]), [prompt], edit)
                x0.square().mean().backward()
            else:
                with adapter.around_blocks(run):
                    x0 = adapter.predict_x0(x, torch.tensor([5.0]), [prompt], edit)
                x0.square().mean().backward()
            gradients.append({name: factor.grad for name, factor in factors.items()})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, gradients[1][name])


@pytest.mark.parametrize("predicts_v", [False, True])
def test_what_the_network_predicts_is_known(fake, predicts_v):
    fake.load("sd2", predicts_v=predicts_v)
    with denoiser(fake) as adapter:
        sigma = torch.tensor([0.5, 4.0])
        wanted = 1 + sigma**2 if predicts_v else torch.ones(2)
        torch.testing.assert_close(adapter.loss_weight(sigma), wanted)
        assert adapter.family == ("SD2 (v)" if predicts_v else "SD2")
        levels = adapter.sigmas(5)
        assert len(levels) == 6 and levels[-1] == 0
        assert torch.all(levels[:-1] > levels[1:]) and 14 < levels[0] < 15


def test_sdxl_takes_the_concept_out_of_the_pooled_vector_too(fake, tiny):
    fake.load("sdxl")
    record_of = trained(fake, tiny, resolution=64).erasure
    assert record_of.record["family"] == "SDXL"
    assert "lora_unet_label_emb_0_0" in record_of.factors
    assert all(name.startswith("lora_unet_") for name in record_of.factors)
    assert any(name.startswith("lora_unet_input_blocks_") for name in record_of.factors)
    assert record_of.record["measures"]["null_drift"] < 1e-5


def test_inpainting_models_are_given_an_empty_picture(tmp_path):
    from .conftest import fake_of

    for kind in ("a1111", "forge"):
        for fake in fake_of(kind, tmp_path / kind):
            fake.load(in_channels=9)
            with denoiser(fake) as adapter:
                (prompt,) = adapter.encode(["a cat"])
                with torch.no_grad():
                    x = torch.zeros(2, 4, 8, 8)
                    x0 = adapter.predict_x0(x, torch.tensor([5.0, 1.0]), [prompt, prompt])
            assert x0.shape == x.shape


def test_names_are_those_that_every_program_knows(fake):
    fake.load()
    with denoiser(fake) as adapter:
        names = set(adapter.names)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k" in names
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v" in names
    assert "lora_unet_up_blocks_1_attentions_1_transformer_blocks_0_attn2_to_k" in names
    assert len(names) == 14  # keys and values of seven blocks


def test_predictions_find_the_layers_that_are_known_by_name(fake):
    """The rule for networks that are no family, on one whose keys and values have names."""
    fake.load()
    with denoiser(fake) as by_name, denoiser(fake, "readers") as found:
        assert set(found.names) == set(by_name.names)
        assert found.ways.keys() == by_name.ways.keys()
        assert all(set(found.ways[way]) == set(names) for way, names in by_name.ways.items())
        assert 0 < found.own_cost < 20 and by_name.own_cost == 0


def test_names_agree_with_comfyuis(fake):
    """The host whose files the others read: by its own table, from the same network."""
    import comfy.utils

    fake.load()
    unet = {
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 1],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
    }
    table = comfy.utils.unet_to_diffusers(unet)
    with denoiser(fake) as adapter:
        for name, path in adapter._paths.items():
            theirs = {
                f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
                for key, value in table.items()
                if value == f"{path}.weight"
            }
            assert theirs == {name}


def test_a_setting_that_cant_work_is_told(fake, tiny):
    fake.load()
    with pytest.raises(SettingsError, match="empty"):
        trained(fake, {**tiny, "concepts": ""})
    assert not queue_lock().locked()
