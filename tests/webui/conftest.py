"""The extension in a fake host of each kind, see ``fake_modules``."""

from __future__ import annotations

import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools.environment import HOST

HERE = Path(__file__).parent / "fake_modules"
KINDS = ("a1111", "forge", "classic")
IN_EACH = (
    "test_it_trains_and_the_model_is_as_it_was",
    "test_predictions_are_the_hosts_own",
)
_NAMES = ("modules", "networks", "k_diffusion", "backend", "modules_forge", "ldm_patched")
collect_ignore = ["fake_modules"]


def _forget() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in _NAMES]:
        del sys.modules[name]
    for name in [n for n in sys.modules if n.startswith("concept_surgery.webui")]:
        del sys.modules[name]


class FakeHost:
    """A fake host of a kind with a model in it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        import modules.paths
        import modules.shared

        self.shared = modules.shared
        modules.paths.data_path = str(folder / "data")
        modules.paths.models_path = str(folder / "models")
        (folder / "models" / "Lora").mkdir(parents=True)
        self.shared.cmd_opts.lora_dir = str(folder / "models" / "Lora")

    def load(self, family: str = "sd1", **named):
        """Put a model into the host, as a click on a checkpoint does."""
        from modules import sd_models

        from .small_models import build

        model = build(self.kind, family, **named)
        if self.kind == "forge":  # trap 2
            sd_models.model_data.sd_model = sd_models.FakeInitialModel()

            def forge_model_reload():
                sd_models.model_data.sd_model = model
                return model, True

            sd_models.forge_model_reload = forge_model_reload
        else:
            sd_models.model_data.sd_model = model
        self.model = model
        self._name_layers()
        return model

    def _name_layers(self) -> None:
        """What each host's LoRA code calls the layers."""
        from concept_surgery.erase_core.settings.families import SD1, SDXL
        from concept_surgery.webui.names import trained_paths

        family = SDXL if getattr(self.model, "is_sdxl", False) else SD1
        paths = trained_paths(self.network, family)
        if self.kind == "a1111":
            for name, path in paths.items():
                self.network.get_submodule(path).network_layer_name = name
        else:
            inner = self.model.forge_objects_original.unet.model
            inner.layers_by_name = {n: f"diffusion_model.{path}" for n, path in paths.items()}

    def draw(self, prompt: str, **named):
        """A picture, drawn as the host draws: the latents, and what is written about it."""
        from modules import processing

        p = processing.StableDiffusionProcessingTxt2Img(self.model, prompt, **named)
        done = processing.process_images(p)
        return p, done

    @property
    def network(self):
        model = self.model
        if self.kind == "a1111":
            return model.model.diffusion_model
        return model.forge_objects_original.unet.model.diffusion_model

    def hashes_of_bytes(self) -> list[int]:
        """The same for weights of types that numpy doesn't know."""
        return [
            hash(bytes(w.detach().flatten().view(torch.uint8).numpy()))
            for w in self.network.parameters()
        ]

    def hashes(self) -> dict[str, int]:
        """What the network holds, and how."""
        import hashlib

        return {
            key: (hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest(), id(weight))
            for key, weight in self.network.named_parameters()
        }


in_all_only = pytest.mark.skipif(
    not os.environ.get("WEBUI_ALL"), reason="WEBUI_ALL=1 runs every test in every fake host"
)


def pytest_generate_tests(metafunc) -> None:
    """A few tests in each kind of host, the others in one of them; with WEBUI_ALL=1 all in each."""
    if "fake" in metafunc.fixturenames:
        name = metafunc.function.__name__
        every = os.environ.get("WEBUI_ALL") or name in IN_EACH
        chosen = KINDS if every else (KINDS[zlib.crc32(name.encode()) % len(KINDS)],)
        metafunc.parametrize("fake", chosen, indirect=True)


@pytest.fixture
def fake(request, tmp_path) -> Iterator[FakeHost]:
    """A fake host of a kind."""
    yield from fake_of(request.param, tmp_path)


@pytest.fixture
def a1111(tmp_path) -> Iterator[FakeHost]:
    """A fake Automatic1111."""
    yield from fake_of("a1111", tmp_path)


@pytest.fixture
def forge(tmp_path) -> Iterator[FakeHost]:
    """A fake Forge."""
    yield from fake_of("forge", tmp_path)


def fake_of(kind: str, folder: Path) -> Iterator[FakeHost]:
    if not HOST.is_dir():
        pytest.skip("the U-Net of the fake hosts is ComfyUI's")
    before = list(sys.path)
    _forget()
    sys.path[:0] = [str(HERE / kind), str(HERE / "common")]
    if find_spec("gradio") is None:
        sys.path.append(str(HERE / "gradio_fake"))
    import networks  # noqa: F401  # the host's Lora extension has imported it

    try:
        yield FakeHost(kind, folder)
    finally:
        sys.path[:] = before
        _forget()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def tiny():
    """Settings that train in a second."""
    return dict(
        concepts="cat => dog",
        keep=("a tree",),
        resolution=64,
        captions=8,
        steps=3,
        trajectories=2,
        sampling_steps=2,
        rank=6,
    )


__all__ = ["SimpleNamespace", "a1111", "fake", "forge", "tiny"]
