"""What a training costs on a GPU at real size: ``python -m benchmarks.gpu``

The architectures of ``benchmarks.families`` with random weights, and text encoders of real size, in
half precision, each in a process of its own with one processor thread. Beside it what one picture
costs, 20 steps with guidance at the resolution the family trains at, so that the ratio holds for
other cards. ``--free 8`` leaves that many GiB of the card free, as a smaller one would have. Writes
``benchmarks/results/gpu.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HOST_ON_GPU", "1")

from benchmarks.families import ARCHITECTURES, in_half_precision  # first: it loads the host

import comfy.model_management  # isort: skip
import comfy.model_patcher
import comfy.sample
import comfy.sd
import torch
from concept_surgery.erase_core import Erasure, Meter, Progress, erase, preset_settings
from concept_surgery.nodes.apply import MODES, apply_erasure
from concept_surgery.nodes.families import model_family
from concept_surgery.nodes.host import ComfyDenoiser

from benchmarks.emoji.build import CHECKPOINT, build_emoji_checkpoint
from benchmarks.emoji.sdxl_text import trained_sdxl_encoder
from benchmarks.random_weights import fill_network
from tools.environment import ROOT

RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
MODELS = ("SD1.5", "SDXL")
CONCEPT = {"concepts": "cat => dog", "keep": ("a photo of a tiger", "a wolf", "a cow", "a horse")}
STEPS, GUIDANCE = 20, 7.0
GIB = 2**30


def loaded(name: str):
    """MODEL and CLIP as the host's loaders leave them."""
    management = comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    config = in_half_precision(*ARCHITECTURES[name])
    with torch.inference_mode():
        model = config.get_model({}, "", device=device)
        fill_network(model.diffusion_model.to(device))
        model.to(offload)
        clip = text_encoder(name, config)
    torch.cuda.empty_cache()
    return comfy.model_patcher.ModelPatcher(model, device, offload), clip


def text_encoder(name: str, config):
    """Of real size, with meaning in it: the emoji model's, whose further layers add nothing."""
    if name == "SDXL":
        return trained_sdxl_encoder(config, whole=True)
    path = str(build_emoji_checkpoint(CHECKPOINT))
    return comfy.sd.load_checkpoint_guess_config(path, output_vae=False)[1]


@contextmanager
def used() -> Iterator[dict[str, float]]:
    """Seconds, and the most GiB that PyTorch had allocated."""
    found: dict[str, float] = {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    yield found
    torch.cuda.synchronize()
    found["seconds"] = round(time.perf_counter() - began, 2)
    found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)


def conditioning(clip, text: str) -> list:
    """As the host's text encoding node gives it."""
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def picture(model, positive: list, negative: list, side: int) -> torch.Tensor:
    """A latent (1, 4, side / 8, side / 8) as the host's KSampler makes it."""
    shape = (1, model.model.latent_format.latent_channels, side // 8, side // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    how = (STEPS, GUIDANCE, "euler", "normal", positive, negative, torch.zeros(shape))
    with torch.inference_mode():
        return comfy.sample.sample(model, noise, *how, disable_pbar=True, seed=0)


def train(model, clip, settings) -> tuple[Erasure, dict[str, float]]:
    """As the node does, with the seconds of its stages; nothing is known from before."""
    stages: dict[str, float] = {}
    with torch.inference_mode(False), torch.enable_grad():
        images = 3 * settings.batch
        with ComfyDenoiser(
            model, clip, "", images, settings.resolution, settings.layers
        ) as denoiser:
            began, current = time.perf_counter(), "Starting"

            def switch(progress: Progress) -> None:
                nonlocal began, current
                now = time.perf_counter()
                stages[current] = stages.get(current, 0.0) + now - began
                began, current = now, progress.stage.split(",")[0]

            erasure = erase(settings, denoiser, meter=Meter(switch))
            stages[current] = stages.get(current, 0.0) + time.perf_counter() - began
    return erasure, {stage: round(seconds, 2) for stage, seconds in stages.items()}


def measure(name: str, preset: str) -> dict[str, Any]:
    """One model on this process's GPU."""
    model, clip = loaded(name)
    family = model_family(model)
    settings = preset_settings(preset, family=family.defaults, **CONCEPT)
    side = settings.resolution
    positive, negative = conditioning(clip, "a photo of a cat"), conditioning(clip, "")
    picture(model, positive, negative, side)  # loads the model and chooses kernels
    with used() as plain:
        before = picture(model, negative, negative, side)
    with used() as training:
        finished, stages = train(model, clip, settings)
    record = finished.record
    merged, exact = (apply_erasure(model, finished, 1.0, mode) for mode in MODES)
    return {
        "model": name,
        "preset": preset,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "processor_threads": torch.get_num_threads(),
        "dtype": str(model.model.get_dtype()).removeprefix("torch."),
        "resolution": side,
        "picture": plain,
        "training": training | {"stages": stages},
        "pictures_worth": round(training["seconds"] / plain["seconds"], 1),
        "forward_equivalents": record["forward_equivalents"],
        "gradient_apart": record["gradient_apart"],
        "memory": record.get("memory"),
        "moved_held_out": record["measures"]["moved_held_out"],
        "empty_prompt": {
            mode: relative(before, picture(patched, negative, negative, side))
            for mode, patched in zip(MODES, (merged, exact), strict=True)
        },
        "erased": relative(
            picture(model, positive, negative, side), picture(merged, positive, negative, side)
        ),
    }


def relative(before: torch.Tensor, after: torch.Tensor) -> float:
    """``|after - before| / |before|``."""
    return float(f"{float((after - before).norm() / before.norm()):.2g}")


@contextmanager
def ballast(free: float | None) -> Iterator[None]:
    """Another process that leaves so many GiB of the card."""
    if free is None:
        yield
        return
    code = (
        "import sys, torch; free, total = torch.cuda.mem_get_info(); "
        f"x = torch.empty(int(free - {free} * 2**30), dtype=torch.uint8, device='cuda'); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        try:
            if process.stdout.readline().strip() != b"ready":
                raise RuntimeError("The card's memory could not be taken.")
            yield
        finally:
            process.stdin.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--presets", nargs="*", default=["instant", "balanced"])
    parser.add_argument("--free", nargs="*", type=float, default=[], help="GiB, beside all of it")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(*asked.one)))
        return
    rows: list[dict[str, Any]] = []
    failed = []
    for free in (None, *asked.free):
        for name in asked.models:
            for preset in asked.presets:
                with ballast(free):
                    call = [sys.executable, "-m", "benchmarks.gpu", "--one", name, preset]
                    done = subprocess.run(call, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    failed.append(f"{name} {preset}, {free or 'all'} GiB free")
                    continue
                rows.append({"free_gib": free} | json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps(rows[-1]), flush=True)
    if failed:  # what is known already stays as it is
        raise SystemExit(f"Not written, since these failed: {'; '.join(failed)}.")
    RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
