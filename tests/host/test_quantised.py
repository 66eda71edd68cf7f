"""Hosts whose weights aren't the numbers they stand for."""

from __future__ import annotations

import json

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import pytest
import torch
from concept_surgery.erase_core.artefact.language_store import LanguageStore
from concept_surgery.erase_core.artefact.stack import rounding_warnings
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.nodes.apply import MODES, apply_erasure, coarse_formats, mismatches
from concept_surgery.nodes.encoding import encode_prompts
from concept_surgery.nodes.families import UnsupportedModelError
from concept_surgery.nodes.host import ComfyDenoiser
from concept_surgery.nodes.matrices import known_matrices, trained_keys
from concept_surgery.nodes.packed import is_packed, is_plain, unpacked

from . import architectures, fake_gguf
from .packed_formats import FORMATS, known_formats, packed_in
from .small import random_text_encoder
from .test_families import KEPT, sampled_x0, train
from .test_identity import identity
from .test_identity import train as train_instant

PREFIX, SCALE = "model.diffusion_model.", 0.01
NUDGE = 0.1  # of a change, on both sides of none
FP8, FLOAT = torch.float8_e4m3fn, torch.float32


def unet_tensors(checkpoint):
    tensors = comfy.utils.load_torch_file(str(checkpoint))
    return {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}


def scaled_fp8(tensors):
    """As in scaled checkpoints: the matrices that read the prompt, in fp8 and over a scale."""
    found = {"scaled_fp8": torch.tensor([], dtype=FP8)}
    for key, value in tensors.items():
        found[key] = value
        if "attn2.to_k" in key or "attn2.to_v" in key:
            found[key] = (value.float() / SCALE).to(FP8)
            found[key.replace(".weight", ".scale_weight")] = torch.tensor(SCALE)
    return found


def mixed_fp8(tensors):
    """As newer checkpoints keep it: some layers in fp8, each with its scale, the others not."""
    found, layers = dict(tensors), {}
    for key, value in tensors.items():
        if key.endswith(PACKED):
            scale = value.float().abs().max() / torch.finfo(FP8).max
            found[key] = (value.float() / scale).to(FP8)
            found[key.replace(".weight", ".weight_scale")] = scale
            layers[key.removesuffix(".weight")] = {"format": "float8_e4m3fn"}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    return comfy.sd.load_diffusion_model_state_dict(found, metadata=metadata)


def in_format(name):
    """A loader of files whose layers say their format, as the newest hosts write them."""

    def load(tensors):
        found = dict(tensors)
        for key in filter(lambda key: key.endswith(PACKED), tensors):
            layer = key.removesuffix("weight")
            parts = packed_in(name)(found.pop(key))
            found |= {f"{layer}{part}": value for part, value in parts.items()}
        return comfy.sd.load_diffusion_model_state_dict(found)

    return load


# What is trained, and a matrix that isn't.
PACKED = ("attn2.to_k.weight", "attn2.to_v.weight", "attn1.to_q.weight")
QUANTISED = {
    "gguf": lambda tensors: fake_gguf.load(tensors, PACKED),
    "scaled fp8": lambda tensors: comfy.sd.load_diffusion_model_state_dict(scaled_fp8(tensors)),
    "mixed fp8": mixed_fp8,
    # Those in which a matrix keeps its shape, by which the host tells what it loads.
    **{
        name: in_format(name)
        for name in ("int8", "int8 rotated", "mxfp8")
        if FORMATS.get(name) in known_formats()
    },
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_model_is_recognised_again_by_its_numbers(checkpoint, kind, caplog):
    def load(*changed):
        tensors = unet_tensors(checkpoint)
        for key in changed:
            tensors[key] = tensors[key].clone()
            tensors[key].view(-1)[tensors[key].numel() // 2] *= -1
        with torch.inference_mode():
            return QUANTISED[kind](tensors)

    model = load()
    plain = identity(model)
    assert identity(load()) == identity(model) == plain
    block = "input_blocks.1.1.transformer_blocks.0"
    others = [load(f"{block}.{name}") for name in PACKED]
    lora = patched(model, 1)
    found = [plain, identity(lora), *map(identity, others)]
    assert len(set(found)) == len(found)
    with torch.inference_mode():  # its patches are in the weights, or on them
        comfy.model_management.load_models_gpu([lora])
    assert [identity(model), identity(lora)] == found[:2]
    assert "recognised again" not in caplog.text


@pytest.fixture
def streaming(monkeypatch):
    """A host without memory for any weight: every layer gets its own when it runs."""
    load = comfy.model_patcher.ModelPatcher.load

    def load_nothing(self, device_to=None, lowvram_model_memory=0, full_load=False, **more):
        return load(self, device_to, lowvram_model_memory=1, full_load=False, **more)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", load_nothing)


def patched(model, seed: int):
    """The model with another matrix of random numbers on each that is trained."""
    generator = torch.Generator().manual_seed(seed)
    keys, matrices = trained_keys(model), known_matrices(model)
    noise = {
        keys[name]: ("diff", (torch.randn(matrix.shape, generator=generator) / 30,))
        for name, matrix in matrices.items()
    }
    clone = model.clone()
    assert len(clone.add_patches(noise, 0.7)) == len(keys)
    return clone


CASES = ["plain", *QUANTISED, "plain, streamed", "scaled fp8, streamed", "mixed fp8, streamed"]


@pytest.mark.parametrize("case", CASES)
def test_the_matrices_are_those_that_the_layers_compute_with(checkpoint, case, request):
    """With LoRAs and wrapped weights upstream, wherever the host keeps the weights."""
    kind, *streamed = case.split(", ")
    load = {"plain": comfy.sd.load_diffusion_model_state_dict, **QUANTISED}[kind]
    with torch.inference_mode():
        model = load(unet_tensors(checkpoint))
        clip = random_text_encoder(model.model.model_config)
    upstream = patched(patched(model, 1), 2)
    upstream.add_weight_wrapper(next(iter(trained_keys(model).values())), lambda weight: 2 * weight)
    if streamed:
        request.getfixturevalue("streaming")
    key = identity(upstream)
    with torch.inference_mode(False), ComfyDenoiser(upstream, clip, "", 2, 64) as denoiser:
        found, layers = denoiser.matrices(), denoiser._modules
        functions = [set(layer.weight_function) - {unpacked} for layer in layers.values()]
        with_functions = sum(map(bool, functions))
        assert with_functions == (len(layers) if streamed else 1)
        own = known_matrices(upstream)
        x = torch.randn(5, 768, generator=torch.Generator().manual_seed(0)).to(denoiser.dtype)
        for name, layer in layers.items():
            expected, matrix = layer(x).float(), found[name].float()
            assert (x.float() @ matrix.T - expected).norm() <= 1e-2 * expected.norm(), name
            assert (matrix - own[name].float()).norm() > 0.1 * own[name].float().norm(), name
    assert identity(upstream) == key != identity(model)


def test_a_placeholder_for_a_weight_is_refused_in_words(checkpoint):
    model, clip = loaded(unet_tensors(checkpoint))
    with torch.inference_mode(False), ComfyDenoiser(model, clip, "", 2, 64) as denoiser:
        module = next(iter(denoiser._modules.values()))
        module.weight = torch.nn.Parameter(module.weight.to("meta"), requires_grad=False)
        with pytest.raises(UnsupportedModelError, match="placeholder .* core loader"):
            denoiser.matrices()


def test_a_result_of_a_packed_model_is_found_again(checkpoint, tmp_path):
    with torch.inference_mode():
        model, again = (QUANTISED["gguf"](unet_tensors(checkpoint)) for _ in range(2))
        clip = random_text_encoder(model.model.model_config)
    results = {}
    assert not train_instant((model, clip), results, LanguageStore(tmp_path)).stored
    assert train_instant((again, clip), results, LanguageStore(tmp_path)).stored
    assert len(results) == 1


def loaded(tensors):
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(tensors)
        return model, random_text_encoder(model.model.model_config)


def test_scaled_fp8_is_read_with_its_scale_and_trained_on(checkpoint):
    tensors = unet_tensors(checkpoint)
    plain, _ = loaded(dict(tensors))
    model, clip = loaded(scaled_fp8(tensors))
    stored = [
        w.dtype for k, w in model.model.state_dict().items() if k.endswith("attn2.to_k.weight")
    ]
    assert set(stored) == {FP8}
    expected = known_matrices(plain)
    with torch.inference_mode(False), ComfyDenoiser(model, clip, "", 2, 64) as denoiser:
        found = denoiser.matrices()
        assert found.keys() == expected.keys()
        for name, matrix in found.items():
            apart = (matrix.float() - expected[name].float()).norm() / expected[name].float().norm()
            assert apart <= 0.04, name  # fp8 has three bits of fraction
    measures = train(model, clip).record["measures"]
    assert measures["moved_held_out"]["overall"] >= 0.8


@pytest.mark.parametrize("kind", ["plain", *QUANTISED])
def test_that_merging_rounds_weights_of_few_bits_is_said_where_it_does(checkpoint, finished, kind):
    load = {"plain": comfy.sd.load_diffusion_model_state_dict, **QUANTISED}[kind]
    with torch.inference_mode():
        model = load(unet_tensors(checkpoint))
    formats = coarse_formats(model, finished)
    expected = {"plain": [], "gguf": [], "int8": ["int8"], "int8 rotated": ["int8"]}
    assert formats == expected.get(kind, ["float8_e4m3fn"])
    said = rounding_warnings(formats)
    assert bool(said) == bool(formats) and all(f"({formats[0]})" in text for text in said)


class Packed:
    """A packed model, an ordinary one of the numbers that it stands for, and their text encoder."""

    def __init__(self, checkpoint, load):
        tensors = unet_tensors(checkpoint)
        with torch.inference_mode():
            self.model = load(tensors)
            layers = self.model.model.diffusion_model.named_modules()
            packed = {n: m for n, m in layers if is_packed(getattr(m, "weight", None))}
            unpacked = {f"{n}.weight": m.get_weight(m.weight, FLOAT) for n, m in packed.items()}
        assert len(unpacked) >= 8
        self.plain, self.clip = loaded({**tensors, **unpacked})


@pytest.fixture(params=["fake", "Q8_0", "Q4_0"])
def packed(request, checkpoint, tmp_path):
    if request.param == "fake":
        names = "attn2.to_k.weight", "attn2.to_v.weight"
        return Packed(checkpoint, lambda tensors: fake_gguf.load(tensors, names))
    real = pytest.importorskip(f"{__package__}.real_gguf", exc_type=ImportError)
    return Packed(checkpoint, lambda tensors: real.load(tensors, request.param, tmp_path))


def test_an_erasure_is_applied_to_a_packed_model(packed):
    erasure = train(packed.plain, packed.clip)
    assert mismatches(packed.model, erasure, packed.clip, "packed") == []
    prompts = encode_prompts(packed.clip, ["a photo of a cat", KEPT, ""])
    before = [sampled_x0(packed.model, prompt, 3.0) for prompt in prompts]
    expected = change(packed.plain, erasure, prompts[0])
    for mode in MODES:
        edited = apply_erasure(packed.model, erasure, 1.0, mode)
        after = [sampled_x0(edited, prompt, 3.0) for prompt in prompts]
        moved = after[0] - before[0]
        assert (moved - expected).norm() <= 1e-3 * expected.norm(), mode
        for was, now in zip(before[1:], after[1:], strict=True):
            assert (now - was).norm() <= 1e-5 * was.norm(), mode
    untouched = [sampled_x0(packed.model, prompt, 3.0) for prompt in prompts]
    assert all(torch.equal(a, b) for a, b in zip(before, untouched, strict=True))


def test_a_packed_model_is_trained_on_as_it_is(packed):
    weights = packed.model.model.diffusion_model.parameters
    stored = [w.as_subclass(torch.Tensor).clone() for w in weights()]
    erasure = train(packed.model, packed.clip)
    measures = erasure.record["measures"]
    assert measures["moved_held_out"]["overall"] >= 0.8
    assert measures["kept"][0]["drift"] <= 1e-5
    now = [w.as_subclass(torch.Tensor) for w in weights()]
    assert all(torch.equal(a, b) for a, b in zip(stored, now, strict=True))
    # Over another erasure, whose change is part of the weights that are read.
    first = apply_erasure(packed.model, erasure, 1.0)
    with torch.inference_mode(False), ComfyDenoiser(first, packed.clip, "", 2, 64) as denoiser:
        carried = denoiser.matrices()
    own = known_matrices(first)
    for name, factor in erasure.factors.items():
        delta = factor @ erasure.bases[name].T
        error = (carried[name] - own[name] - delta).abs().max()
        assert error <= 1e-5 * own[name].abs().max(), name


def change(model, erasure, prompt):
    """What an erasure does to a prediction."""
    edited = apply_erasure(model, erasure, 1.0)
    return sampled_x0(edited, prompt, 3.0) - sampled_x0(model, prompt, 3.0)


def test_weights_packed_in_an_unknown_way_are_refused_in_words(checkpoint):
    model, clip = loaded(unet_tensors(checkpoint))
    with torch.inference_mode(False), ComfyDenoiser(model, clip, "", 2, 64) as denoiser:
        module = next(iter(denoiser._modules.values()))
        module.weight = torch.nn.Parameter(module.weight.to(torch.uint8), requires_grad=False)
        with pytest.raises(UnsupportedModelError, match="packed.*uint8.*Train on the same model"):
            denoiser.matrices()


@pytest.fixture(params=FORMATS)
def packed_transformer(request):
    """A transformer with its matrices in a format of the newest hosts, and the CLIP."""
    if FORMATS[request.param] not in known_formats():
        pytest.skip(f"this host doesn't know the format {request.param}")
    widths = 256 if request.param.startswith("int4") else 16
    return architectures.build_packed("Z-Image", packed_in(request.param), widths)


def test_the_gradient_goes_through_layers_of_every_format(packed_transformer):
    """The host's kernels for them round what they read, in steps; some have no backward at all."""
    model, clip = packed_transformer
    name = "lora_unet_context_refiner_0_attention_qkv"
    with torch.inference_mode(False), ComfyDenoiser(model, clip, "", 1, 64, name) as denoiser:
        layer = model.model.get_submodule(trained_keys(model, name)[name].removesuffix(".weight"))
        assert not is_plain(layer.weight)
        expected = layer.weight.dequantize().float()
        assert torch.equal(denoiser.matrices()[name].float(), expected)
        prompt = denoiser.encode(["a photo of a cat"])
        x = noisy_latent(denoiser)
        factor, basis = direction(expected.shape)

        def x0(step):
            edit = LowRankEdit({name: basis}, {name: step * factor})
            return denoiser.predict_x0(x, torch.tensor([0.7]), prompt, edit).double()

        with torch.no_grad():
            there, back = (x0(torch.tensor(step)) for step in (NUDGE, -NUDGE))
        towards = (there - back) / (there - back).norm()
        slope = (towards * (there - back)).sum() / (2 * NUDGE)
        step = torch.zeros(1, requires_grad=True)
        (towards * x0(step)).sum().backward()
    assert float(slope) > 1e-3
    assert abs(float(step.grad) - float(slope)) <= 0.02 * float(slope)


def noisy_latent(denoiser):
    shape = denoiser.latent_shape(64)
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def direction(shape):
    """Factor (out, 1) and basis (width, 1) of a change that is felt."""
    generator = torch.Generator().manual_seed(1)
    factor, basis = (torch.randn(n, 1, generator=generator) for n in shape)
    return factor / shape[1] ** 0.5, basis / basis.norm()


def test_an_erasure_of_rotated_int8_is_exact_beside_the_weights(checkpoint):
    load = QUANTISED.get("int8 rotated")
    if load is None:
        pytest.skip("this host doesn't know the format")
    with torch.inference_mode():
        model = load(unet_tensors(checkpoint))
        clip = random_text_encoder(model.model.model_config)
    erasure = train(model, clip)
    assert erasure.record["measures"]["moved_held_out"]["overall"] >= 0.8
    assert erasure.record["measures"]["kept"][0]["drift"] <= 1e-5
    prompts = encode_prompts(clip, ["a photo of a cat", "", KEPT])
    before = [sampled_x0(model, prompt, 3.0) for prompt in prompts]
    edited = apply_erasure(model, erasure, 1.0, "exact")
    moved, *still = (
        float((sampled_x0(edited, prompt, 3.0) - was).norm() / was.norm())
        for prompt, was in zip(prompts, before, strict=True)
    )
    # The host rounds what its int8 layers read, and a nudge of 1e-7 may tip a number over.
    assert max(still) <= 1e-4 < 0.05 < moved
