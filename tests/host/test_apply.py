"""Applying an erasure beside the weights: exact in every number format, and gone after the call."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper
from comfy_extras.nodes_model_merging import NODE_CLASS_MAPPINGS as MERGING
from concept_surgery.erase_core.artefact.erasure import Erasure
from concept_surgery.erase_core.artefact.stack import (
    AppliedErasure,
    applied_twice_problem,
    stack_text,
)
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.model.prompt import Encoded
from concept_surgery.nodes.apply import (
    ApplyErasure,
    ApplyError,
    applied_to,
    apply_erasure,
    stack_report,
)
from concept_surgery.nodes.encoding import encode_prompts
from concept_surgery.nodes.exact import ExactModeError, SidePath, side_paths
from concept_surgery.nodes.host import ComfyDenoiser, left_out_of_training

from benchmarks import application
from benchmarks.application import DTYPES, PROMPTS, SIGMAS, predict
from nodes import NODE_CLASS_MAPPINGS
from tools import graphs

from ..long import long
from .encoder import RememberingClip

UNMOVED = ("null", "negative", "kept exact")


@pytest.fixture(scope="module")
def loaded(shared_folder):
    with torch.inference_mode():  # as the host loads, inside its executor
        path = str(application.checkpoint())
        model, clip = comfy.sd.load_checkpoint_guess_config(path, output_vae=False)[:2]
        return model, RememberingClip(clip, shared_folder / "encoded")


@pytest.fixture(scope="module")
def erasure(loaded, store) -> Erasure:
    return application.trained(*loaded, store)


@pytest.fixture(scope="module")
def other(erasure) -> Erasure:
    """A second one that shares what it keeps, but for the negative prompt."""
    factors = {name: factor.flip(1) / 2 for name, factor in erasure.factors.items()}
    record = copy.deepcopy(dict(erasure.record))
    record["concepts"][0]["text"] = "pizza"
    record["settings"]["negative_prompts"] = []
    return Erasure(erasure.bases, factors, record)


@pytest.fixture(scope="module")
def tokens(loaded):
    encoded = encode_prompts(loaded[1], list(PROMPTS.values()))
    return {name: prompt.tokens for name, prompt in zip(PROMPTS, encoded, strict=True)}


def noise(model, rows, sigma=2.0):
    return predict(model, rows, sigma)[0]


def hooks_on(model) -> int:
    modules = model.model.modules()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {key: weight.clone() for key, weight in model.model.state_dict().items()}


@pytest.mark.parametrize("name", DTYPES)
def test_merging_costs_the_formats_rounding_and_exact_costs_nothing(loaded, erasure, tokens, name):
    """Floor: float32 matrices rounded to the format once, see ``benchmarks/application.py``."""
    moved = application.moved(application.model_in(DTYPES[name]), erasure, tokens)
    for kind in UNMOVED:
        assert max(moved["exact"][kind].values()) <= 1e-4
    assert moved["exact"]["erased"]["prediction"] > 0.02
    if name in ("float16", "bfloat16"):  # fp8, rounded at random by the host, is only reported
        floors = application.floors(loaded[0], DTYPES[name], tokens)
        for kind, what in itertools.product(UNMOVED, ("keys and values", "prediction")):
            assert moved["merge"][kind][what] <= 2 * floors[kind][what]


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_exact_stays_exact_where_the_prompt_is_rounded_as_well(erasure, tokens, name):
    """On GPUs the token embeddings are rounded too, and are then no longer orthogonal to R."""
    model = application.computing_in(application.model_in(DTYPES[name]), DTYPES[name])
    moved = application.moved(model, erasure, tokens, SIGMAS[1:2], ["exact"])["exact"]
    for kind in UNMOVED:
        assert max(moved[kind].values()) <= 1e-4
    assert moved["erased"]["prediction"] > 0.02


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_training_runs_on_the_prompt_as_it_was_before_rounding(loaded, erasure, tokens, name):
    """Or a report made on a GPU would blame the erasure for the rounding of the prompt."""
    model = application.computing_in(application.model_in(DTYPES[name]), DTYPES[name])
    x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.ones(1)
    change = {}
    with torch.inference_mode(False), ComfyDenoiser(model, loaded[1], "", 6, 64) as denoiser:
        for kind, rows in tokens.items():
            plain = denoiser.predict_x0(x, sigma, [Encoded(rows)])
            edited = denoiser.predict_x0(x, sigma, [Encoded(rows)], erasure.edit())
            change[kind] = float((edited - plain).norm() / (x - plain).norm())
    assert all(change[kind] <= 1e-4 for kind in UNMOVED)
    assert change["erased"] > 0.02


def test_the_erased_prompt_changes_as_it_does_merged(loaded, erasure, tokens):
    assert application.erased_alike(loaded[0], erasure, tokens["erased"]) <= 1e-4
    for strength in (-0.5, 2.0):
        one, two = (
            noise(apply_erasure(loaded[0], erasure, strength, mode), tokens["erased"])
            for mode in ("merge", "exact")
        )
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_the_hosts_model_is_as_it_was_after_each_call(loaded, erasure, tokens):
    model = loaded[0]
    plain, hooks, weights = noise(model, tokens["erased"]), hooks_on(model), weights_of(model)
    exact = apply_erasure(model, erasure, 1.0, "exact")
    assert not exact.patches and not model.wrappers.get("apply_model")
    noise(exact, tokens["erased"])
    failures = (RuntimeError, comfy.model_management.InterruptProcessingException)
    (path,) = itertools.chain(*side_paths(exact).values())
    for failure in failures:

        def fail(*_arguments, failure=failure):
            assert hooks_on(model) == hooks + len(erasure.factors)
            raise failure

        fail.class_obj = model.model
        with pytest.raises(failure):
            path(fail, torch.zeros(1), torch.zeros(1), None, tokens["null"][None])
        assert hooks_on(model) == hooks
    after = weights_of(model)
    assert all(torch.equal(after[key], weight) for key, weight in weights.items())
    assert torch.equal(noise(model, tokens["erased"]), plain)


def test_merged_exact_and_loras_stack_in_any_order(loaded, erasure, other, tokens):
    model = loaded[0]
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    lora = {key: ("diff", (torch.full((320, 768), 0.01),))}

    def stacked(*steps):
        result = model
        for step in steps:
            if step == "lora":
                result = result.clone()
                result.add_patches(lora)
            else:
                result = apply_erasure(result, step[0], 1.0, step[1])
        return noise(result, tokens["erased"])

    expected = stacked((erasure, "merge"), "lora", (other, "merge"))
    steps = [(erasure, "exact"), "lora", (other, "exact")]
    for order in (*itertools.permutations(steps), ((erasure, "exact"), (other, "merge"), "lora")):
        torch.testing.assert_close(stacked(*order), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stacked((erasure, "exact"), "lora"), expected, atol=1e-2)


@pytest.mark.parametrize("first, second", [*itertools.product(("merge", "exact"), repeat=2)])
def test_twice_is_refused_in_every_mode(loaded, erasure, first, second):
    once = apply_erasure(loaded[0], erasure, 1.0, first)
    with pytest.raises(ApplyError, match="already on this model"):
        apply_erasure(once, erasure, 0.5, second)


@pytest.mark.parametrize("mode", ["merge", "exact"])
def test_the_file_in_a_lora_loader_counts_as_applied(loaded, erasure, other, mode, tmp_path):
    model = loaded[0]

    def with_loras(*erasures, strength=1.0):
        patched = model
        for number, one in enumerate(erasures):
            one.save(tmp_path / f"{number}.safetensors")
            file = comfy.utils.load_torch_file(str(tmp_path / f"{number}.safetensors"))
            with torch.inference_mode():
                patched = comfy.sd.load_lora_for_models(patched, None, file, strength, 0)[0]
        return patched

    words = f"{erasure.concept!r} is already on this model: a LoRA loader .* take the LoRA loader"
    half = Erasure(erasure.bases, {n: b.half() for n, b in erasure.factors.items()}, erasure.record)
    for upstream in (
        with_loras(erasure),
        with_loras(half),
        with_loras(other, erasure, strength=-0.3),
        apply_erasure(with_loras(erasure), other, 1.0, mode),
    ):
        with pytest.raises(ApplyError, match=words):
            apply_erasure(upstream, erasure, 1.0, mode)
    apply_erasure(with_loras(other), erasure, 1.0, mode)
    apply_erasure(apply_erasure(model, other, 1.0), erasure, 1.0, mode)
    apply_erasure(with_loras(erasure, strength=0.0), erasure, 1.0, mode)


def test_the_same_erasure_with_fewer_matrices_is_the_same(erasure, other):
    """As a file is that was saved without the pooled vector."""
    left_out = next(iter(erasure.factors))
    factors = {name: b for name, b in erasure.factors.items() if name != left_out}
    fewer = Erasure(erasure.bases, factors, erasure.record)
    assert fewer.identity != erasure.identity
    for one, two in ((erasure, fewer), (fewer, erasure)):
        text = applied_twice_problem([AppliedErasure.of(one, "merge", 1.0)], two)
        assert f"has {erasure.concept!r} in common" in text
    assert applied_twice_problem([AppliedErasure.of(other, "merge", 1.0)], fewer) == ""


@pytest.mark.parametrize("mode", ["merge", "exact"])
def test_strength_zero_adds_nothing(loaded, erasure, mode):
    off = apply_erasure(loaded[0], erasure, 0.0, mode)
    assert not off.patches and not side_paths(off) and not applied_to(off)
    apply_erasure(off, erasure, 1.0, mode)  # so it is not there twice


def test_an_unknown_mode_and_hosts_that_cannot_are_said(loaded, erasure, monkeypatch):
    with pytest.raises(ApplyError, match="mode must be 'merge' or 'exact', not 'both'"):
        apply_erasure(loaded[0], erasure, 1.0, "both")
    with pytest.raises(ExactModeError, match="no layer 'x' .* Choose mode 'merge'"):
        path = SidePath(erasure, dict.fromkeys(erasure.factors, "x.weight"), 1.0)
        call = dataclasses.make_dataclass("Executor", ["class_obj"])(torch.nn.Module())
        path(call, torch.zeros(1), torch.zeros(1))
    monkeypatch.delattr(comfy.model_patcher.ModelPatcher, "add_wrapper_with_key")
    with pytest.raises(ExactModeError, match="Choose mode 'merge'"):
        apply_erasure(loaded[0], erasure, 1.0, "exact")


@long
def test_compiled_models_see_the_erasure_and_models_without_it_do_not(
    loaded, erasure, tokens, monkeypatch
):
    model, rows = loaded[0], tokens["erased"]
    plain = noise(model, rows)
    expected = noise(apply_erasure(model, erasure, 1.0, "exact"), rows)
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    before = noise(compiled, rows)  # compiled without hooks
    above = apply_erasure(compiled, erasure, 1.0, "exact")
    below = apply_erasure(model, erasure, 1.0, "exact")
    set_torch_compile_wrapper(below, backend="eager")
    torch.testing.assert_close(before, plain, rtol=1e-4, atol=1e-4)
    for patched in (above, below):
        torch.testing.assert_close(noise(patched, rows), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(noise(compiled, rows), before)
    monkeypatch.delattr(torch.compiler, "set_stance")
    with pytest.raises(ExactModeError, match="Choose mode 'merge' .* PyTorch 2.6"):
        noise(above, rows)


def test_copies_of_the_models_options_share_the_tensors(loaded, erasure):
    exact = apply_erasure(loaded[0], erasure, 1.0, "exact")
    ((path,),) = side_paths(exact).values()
    cpu = torch.device("cpu")
    assert copy.deepcopy(exact.wrappers)["apply_model"] == exact.wrappers["apply_model"]
    assert path.on(cpu) is path.on(cpu)


def test_training_runs_with_the_erasures_beside_the_weights(loaded, erasure, other, tokens):
    """And they can be trained on after the host has sampled with them in inference mode."""
    model, clip = loaded
    upstream = apply_erasure(model, erasure, 1.0, "exact")
    upstream = apply_erasure(upstream, other, 0.5, "exact")
    merged = apply_erasure(apply_erasure(model, erasure, 1.0), other, 0.5)
    rows, sigma = tokens["erased"], 2.0
    expected = noise(upstream, rows, sigma)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 5**0.5
    with torch.inference_mode(False), ComfyDenoiser(upstream, clip, "", 6, 64) as denoiser:
        x0 = denoiser.predict_x0(x, torch.tensor([sigma]), [Encoded(rows)])
        torch.testing.assert_close((x - x0) / sigma, expected, rtol=1e-4, atol=1e-4)
        matrices = denoiser.matrices()
        zeros = {name: torch.zeros_like(b).requires_grad_() for name, b in erasure.factors.items()}
        edit = LowRankEdit(erasure.bases, zeros)
        denoiser.predict_x0(x, torch.tensor([sigma]), [Encoded(rows)], edit).sum().backward()
    assert all(float(factor.grad.norm()) > 0 for factor in zeros.values())
    with torch.inference_mode(False), ComfyDenoiser(merged, clip, "", 6, 64) as denoiser:
        for name, weight in denoiser.matrices().items():
            torch.testing.assert_close(matrices[name], weight, rtol=1e-4, atol=1e-5)
    assert left_out_of_training(upstream) == []
    upstream.add_wrapper_with_key("apply_model", "someone", lambda run, *rest, **more: run(*rest))
    assert "(wrappers)" in left_out_of_training(upstream)[0]


def applied(concept, *exact, form="hard", mode="merge") -> AppliedErasure:
    return AppliedErasure(concept, concept, form, exact, mode)


def test_a_stack_says_what_stays_exact():
    cat = applied("cat", "a tiger", "blurry")
    dog = applied("dog", "a house", "a tiger", mode="exact")
    assert stack_text([cat]) == stack_text([]) == ""
    assert stack_text([cat, dog]) == (
        "Erased on this model: 'cat', 'dog'. Exact beside all of them: the null prompt, 'a tiger'. "
        "'blurry' is not exact beside 'dog'. 'a house' is not exact beside 'cat'."
    )
    assert "Merging adds the rounding of float16 weights" in stack_text([cat, dog], "float16")
    assert "Merging" not in stack_text([dog, applied("x", mode="exact")], "float16")
    assert "not even the null prompt" in stack_text([cat, applied("x", form="soft")])


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """What the node shows, outside a graph."""
    texts = []
    monkeypatch.setattr(
        "concept_surgery.nodes.messages._send_text", lambda text, _: texts.append(text)
    )
    monkeypatch.setattr(
        ApplyErasure,
        "hidden",
        dataclasses.make_dataclass("Hidden", [("prompt", dict, None), ("unique_id", str, None)])(),
        raising=False,
    )
    return texts


def test_the_node_shows_what_the_stack_keeps(loaded, erasure, other, shown):
    once = ApplyErasure.execute(loaded[0], erasure, 1.0).args[0]
    assert not shown and applied_to(once)[0].mode == "merge"
    twice = ApplyErasure.execute(once, other, 1.0, mode="exact").args[0]
    (text,) = shown
    assert text == stack_report(twice)
    assert "Exact beside all of them: the null prompt, 'a photo of a tiger'." in text
    assert "'blurry, watermark' is not exact beside 'pizza'." in text


def test_what_is_saved_from_exact_mode_is_warned_about(loaded, erasure, shown, monkeypatch, caplog):
    monkeypatch.setattr("nodes.NODE_CLASS_MAPPINGS", {**NODE_CLASS_MAPPINGS, **MERGING})
    graph = graphs.loader("x.safetensors") | graphs.apply("3:5")
    ApplyErasure.hidden.unique_id, ApplyErasure.hidden.prompt = "3:5", graph
    ApplyErasure.execute(loaded[0], erasure, 1.0, mode="exact")
    graph |= graphs.node("7", "CheckpointSave", model=("3:5", 0), filename_prefix="a")
    ApplyErasure.execute(loaded[0], erasure, 1.0, mode="merge")
    ApplyErasure.execute(loaded[0], erasure, 0.0, mode="exact")
    assert "beside the weights" not in caplog.text
    ApplyErasure.execute(loaded[0], erasure, 1.0, mode="exact")
    assert "CheckpointSave (node 7) takes the weights alone" in caplog.text
    assert "Choose mode 'merge'." in caplog.text


def test_the_same_concept_from_two_trainings_is_warned_about(loaded, erasure, other, shown):
    record = copy.deepcopy(dict(other.record))
    record["concepts"][0]["text"] = "A " + erasure.concept.upper()
    unlike = Erasure(other.bases, other.factors, copy.deepcopy(record))
    record["concepts"][0]["text"] = erasure.concept.upper()
    alike = Erasure(other.bases, other.factors, record)
    once = ApplyErasure.execute(loaded[0], erasure, 1.0).args[0]
    for harmless, strength in ((alike, 0.0), (unlike, 1.0)):
        ApplyErasure.execute(once, harmless, strength)
        assert not any("already erased" in text for text in shown)
    ApplyErasure.execute(once, alike, 1.0)
    assert f"{alike.concept!r}: already erased on this model, by the erasure of" in shown[-1]
