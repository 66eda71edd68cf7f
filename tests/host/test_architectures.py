"""The kinds of networks that people use, each built small: what the host makes of them."""

from __future__ import annotations

import functools
import os

import comfy.lora
import comfy.sd
import comfy.utils
import pytest
import safetensors.torch
import torch
from torch import nn

from .architectures import (
    ARCHITECTURES,
    build,
    noisy,
    numberless,
    predicted,
    read_of,
    readers_of_the_prompt_alone,
)

ALL = os.environ.get("ARCHITECTURES", "") not in ("", "0")
# One of each way in: tokens alone, padding that is read, a refiner, several streams, pooled vector.
SAMPLE = ("Qwen-Image", "Flux.2", "Z-Image", "HiDream-I1", "SDXL", "Wan 2")
FLOAT32 = 1e-5


def chosen(name: str):
    """As a parameter, skipped where the host at hand can't build it."""
    lacking = ARCHITECTURES[name].lacking
    return pytest.param(name, marks=pytest.mark.skipif(bool(lacking), reason=lacking))


EVERY = [chosen(name) for name in ARCHITECTURES]
SOME = EVERY if ALL else [chosen(name) for name in SAMPLE]


@pytest.fixture(scope="module")
def small():
    """Models with their text encoders by architecture, each built once."""
    return functools.cache(build)


@pytest.mark.parametrize("name", EVERY)
def test_the_host_samples_from_it_and_every_prompt_gives_another_picture(small, name):
    model, clip = small(name)
    x = noisy(model, ARCHITECTURES[name], 0.7)
    texts = ("", "a photo of a cat", "a photo of a dog in a garden, " * 4)
    given = [predicted(model, clip.conditioning(text), x, 0.7) for text in texts]
    again = predicted(model, clip.conditioning(texts[1]), x, 0.7)
    assert torch.equal(again, given[1])
    for own in given:
        assert own.shape == x.shape and own.isfinite().all()
    for own in (given[0], given[2]):
        assert (own - given[1]).norm() > 1e-3 * (x - given[1]).norm()


@pytest.mark.parametrize("name", SOME)
def test_its_layers_that_read_the_prompt_alone_are_measured(small, name):
    found = readers_of_the_prompt_alone(*small(name), ARCHITECTURES[name])
    assert {numberless(reader) for reader in found} == set(ARCHITECTURES[name].readers)


def test_what_stands_in_quotes_is_read_by_layers_of_its_own(small):
    entry = ARCHITECTURES["Hunyuan Image 2.1"]
    quoted = readers_of_the_prompt_alone(
        *small("Hunyuan Image 2.1"), entry, ('a sign "open"', 'a sign "closed"')
    )
    letters = {"byt5_in.fc1", "byt5_in.fc2", "byt5_in.fc3"}
    assert {numberless(reader) for reader in quoted} == {*entry.readers, *letters}


@pytest.mark.parametrize("name", SOME)
def test_the_hosts_lora_loader_knows_every_linear_layer_and_loads_a_file_for_one(
    small, name, tmp_path
):
    model, clip = small(name)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    linears = {
        f"diffusion_model.{layer}.weight"
        for layer, module in model.model.diffusion_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert linears <= {key for key in keys.values() if isinstance(key, str)}
    entry = ARCHITECTURES[name]
    reader = next(iter(readers_of_the_prompt_alone(model, clip, entry)))
    key = f"diffusion_model.{reader}.weight"
    kohya = f"lora_unet_{reader.replace('.', '_')}"
    assert keys[kohya] == key
    out, width = model.model.state_dict()[key].shape
    path = tmp_path / "one.safetensors"
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=generator) for shape in ((out, 1), (1, width)))
    tensors = {f"{kohya}.lora_up.weight": up, f"{kohya}.lora_down.weight": down}
    safetensors.torch.save_file(tensors, path)
    with torch.inference_mode():
        file = comfy.utils.load_torch_file(str(path))
        changed, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
    x, prompt = noisy(model, entry, 0.7), clip.conditioning("a photo of a cat")
    before = predicted(model, prompt, x, 0.7)
    assert (predicted(changed, prompt, x, 0.7) - before).norm() > 1e-4 * before.norm()
    assert torch.equal(predicted(model, prompt, x, 0.7), before)


def beside(read: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """A random change (out, width) of a matrix that does nothing to what it reads."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    rows = torch.cat([part.reshape(-1, shape[1]) for part in read]).double()
    _, size, directions = torch.linalg.svd(rows, full_matrices=False)
    used = directions[size > 1e-6 * rows.norm()]
    return (noise - noise @ used.T @ used).float() / shape[1] ** 0.5


@pytest.mark.parametrize("name", SOME)
def test_a_change_in_what_a_prompt_does_not_use_leaves_its_picture(small, name):
    """Why an erasure can be exact: whatever reads the prompt alone is the same for it each time."""
    model, clip = small(name)
    entry = ARCHITECTURES[name]
    kept, other = map(clip.conditioning, ("", "a photo of a cat"))
    x, changed = noisy(model, entry, 0.7), model.clone()
    read = read_of(model, kept, x, 0.7)
    for reader in readers_of_the_prompt_alone(model, clip, entry):
        key = f"diffusion_model.{reader}.weight"
        change = beside(read.get(reader, []), model.model.state_dict()[key].shape)
        changed.add_patches({key: ("diff", (change,))})
    moved = [
        float((predicted(changed, c, x, 0.7) - before).norm() / (x - before).norm())
        for c, before in ((c, predicted(model, c, x, 0.7)) for c in (kept, other))
    ]
    assert moved[0] <= FLOAT32 < 1e-3 < moved[1]
