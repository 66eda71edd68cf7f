"""What a training step costs beside a bare forward and backward.

``python -m benchmarks.step_cost`` prints a table and writes ``results/step_cost.json``.

The SD1.5 U-Net with all four levels at its real width, random weights, float32, on the CPU. Times
are ratios of neighbouring runs; memory is the peak of a process of its own, weights included.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tools.pack import load_pack, use_host

use_host()
load_pack()

import comfy.model_patcher  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from concept_surgery.erase_core import erase, preset_settings  # noqa: E402
from concept_surgery.erase_core.method.encoded import EncodedPair  # noqa: E402
from concept_surgery.erase_core.model.low_rank import LowRankEdit  # noqa: E402
from concept_surgery.erase_core.model.prompt import Encoded  # noqa: E402
from concept_surgery.erase_core.run.ridge import Ridge  # noqa: E402
from concept_surgery.erase_core.run.states import States  # noqa: E402
from concept_surgery.erase_core.run.trainer import Pool, SurgeryTrainer  # noqa: E402
from concept_surgery.nodes.host import ComfyDenoiser  # noqa: E402

from benchmarks.random_weights import fill_network  # noqa: E402
from tools.checkpoint import build_checkpoint  # noqa: E402
from tools.environment import BUILD  # noqa: E402

RESULT = Path(__file__).parent / "results" / "step_cost.json"
RESOLUTION, MEMORY_RESOLUTION, PAIRS = 128, 256, 9
RANK, TOKENS, WIDTH = 16, 77, 768
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": WIDTH,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "adm_in_channels": None,
    "legacy": False,
    "dtype": torch.float32,
}


def real_width_model() -> comfy.model_patcher.ModelPatcher:
    """The SD1.5 U-Net with random weights, made inside inference mode as the host would."""
    config = comfy.supported_models.SD15(dict(UNET))
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode():
        model = config.get_model({}, "", device="cpu")
        fill_network(model.diffusion_model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def loaded(resolution: int) -> ComfyDenoiser:
    return ComfyDenoiser(real_width_model(), None, "", 2, resolution)


def trainer_on(denoiser: ComfyDenoiser, resolution: int) -> SurgeryTrainer:
    """A trainer on random states and prompts: the values don't matter for the time."""
    settings = preset_settings("balanced", concepts="cat", resolution=resolution, rank=RANK)
    generator = torch.Generator().manual_seed(1)
    shape = (settings.batch, *denoiser.latent_shape(resolution))
    latents = [torch.randn(shape, generator=generator) for _ in range(4)]
    index = torch.zeros(settings.batch, dtype=torch.long)
    guidance = torch.stack(latents[2:], dim=1)
    sigma = torch.full((settings.batch,), 2.0)
    states = States(latents[0], sigma, latents[1], guidance, index)
    erased, alternative, null = map(Encoded, torch.randn(3, TOKENS, WIDTH, generator=generator))
    pool = Pool([EncodedPair(erased, alternative)], states, null)
    basis = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator)).Q
    zeros = {n: torch.zeros(w.shape[0], RANK) for n, w in denoiser.matrices().items()}
    ridge = Ridge(1.0, denoiser.matrices(), torch.eye(WIDTH))
    start = LowRankEdit.shared(basis, zeros)
    return SurgeryTrainer(denoiser, pool, start, [(0, RANK)], [ridge], settings)


def bare_step(denoiser: ComfyDenoiser, trainer: SurgeryTrainer) -> None:
    """Forward and backward of the same batch with the same trained values, nothing else."""
    states = trainer._pool.states
    prompts = [trainer._pool.pairs[0].erased] * len(states)
    for factor in trainer.edit.factors.values():
        factor.grad = None
    denoiser.predict_x0(states.x, states.sigma, prompts, trainer.edit).square().mean().backward()


def timed(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def step_ratio() -> dict[str, float]:
    """Median over neighbouring pairs of step time over bare time, and the bare time."""
    with torch.inference_mode(False), loaded(RESOLUTION) as d:
        trainer = trainer_on(d, RESOLUTION)
        index = torch.arange(2)
        trainer.step(index)
        bare, full = [], []
        for pair in range(PAIRS):
            order = [(bare, lambda: bare_step(d, trainer)), (full, lambda: trainer.step(index))]
            for times, action in order if pair % 2 else reversed(order):
                times.append(timed(action))
        ratios = [f / b for f, b in zip(full, bare, strict=True)]
        print("ratios of the pairs:", [round(r, 3) for r in ratios])
        return {
            "step_ratio": round(statistics.median(ratios), 4),
            "step_ratio_spread": [round(min(ratios), 4), round(max(ratios), 4)],
            "bare_seconds": round(statistics.median(bare), 3),
            "extra_weight_memory": round(extra_weight_memory(d, trainer), 5),
        }


def extra_weight_memory(denoiser: ComfyDenoiser, trainer: SurgeryTrainer) -> float:
    """Bytes of weights, factors and optimiser beside the host's own, over the host's."""
    own = denoiser._model.model.diffusion_model.parameters()
    shared = {w.untyped_storage().data_ptr() for w in own}
    twin = list(denoiser._twin.diffusion_model.parameters())
    total = sum(w.nbytes for w in twin)
    copied = sum(w.nbytes for w in twin if w.untyped_storage().data_ptr() not in shared)
    factors = sum(3 * b.nbytes for b in trainer.edit.factors.values())  # B and Adam's two moments
    return (copied + factors) / total


def peak_bytes(what: str) -> int:
    """Peak resident memory of a fresh process that does ``what``."""
    command = [sys.executable, "-m", "benchmarks.step_cost", what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def child(what: str) -> None:
    with torch.inference_mode(False), loaded(MEMORY_RESOLUTION) as d:
        trainer = trainer_on(d, MEMORY_RESOLUTION)
        if what == "train":
            trainer.step(torch.arange(2))
        else:
            states = trainer._pool.states
            prompts = [trainer._pool.pairs[0].erased] * 2
            with torch.no_grad():
                d.predict_x0(states.x, states.sigma, prompts)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def balanced_cost() -> int:
    """Forward-equivalents that the engine counts for a balanced run on the shrunken checkpoint."""
    import comfy.sd

    path = build_checkpoint(BUILD / "checkpoints" / "one-level.safetensors")
    with torch.inference_mode():
        model, clip = comfy.sd.load_checkpoint_guess_config(str(path))[:2]
    settings = preset_settings(
        "balanced", concepts="cat => dog", keep=("tiger",), resolution=64, captions=24
    )
    with torch.inference_mode(False), ComfyDenoiser(model, clip, "", 6, 64) as denoiser:
        last = erase(settings, denoiser)
    return last.record["forward_equivalents"]


def main() -> None:
    # First, while this process is small: a child starts with its parent's peak on Linux.
    inference, training = peak_bytes("infer"), peak_bytes("train")
    result = {"model": "SD1.5 U-Net, 4 levels, real width, random weights, float32, CPU"}
    result |= {"resolution": RESOLUTION, "batch": 2, "rank": RANK} | step_ratio()
    result["memory_resolution"] = MEMORY_RESOLUTION
    result["peak_memory_ratio"] = round(training / inference, 3)
    result["peak_memory_gib"] = {
        "inference": round(inference / 2**30, 2),
        "training": round(training / 2**30, 2),
    }
    result["fwd_eq_balanced"] = balanced_cost()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result.items():
        print(f"{name:22} {value}")


if __name__ == "__main__":
    child(sys.argv[1]) if len(sys.argv) > 1 else main()
