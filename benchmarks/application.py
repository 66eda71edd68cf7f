"""What an erasure moves that it should not, merged into the weights and beside them.

``python -m benchmarks.application`` prints a table and writes ``results/application.json``.

The shrunken checkpoint, loaded by the host with its U-Net stored in each number format. Figures are
relative changes against the same host without the erasure: of the keys and values of a prompt (the
largest of all cross-attentions) and of the predicted noise (the largest of three noise levels). The
CPU host computes in float32 whatever it stores; "computed in it too" is what GPUs do (one level).

The floor of a format is what rounding to it does anyway: the change of the same quantities when
float32 matrices are rounded to it once, on the float32 host.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.pack import load_pack, use_host

use_host()
load_pack()

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sampler_helpers  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from concept_surgery.erase_core import Erasure, erase, preset_settings  # noqa: E402
from concept_surgery.erase_core.artefact.language_store import LanguageStore  # noqa: E402
from concept_surgery.nodes.apply import apply_erasure  # noqa: E402
from concept_surgery.nodes.encoding import encode_prompts  # noqa: E402
from concept_surgery.nodes.host import ComfyDenoiser  # noqa: E402
from concept_surgery.nodes.matrices import original_weights, trained_keys  # noqa: E402
from torch import Tensor  # noqa: E402

from tools.checkpoint import build_checkpoint  # noqa: E402
from tools.environment import BUILD  # noqa: E402

RESULT = Path(__file__).parent / "results" / "application.json"
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
MODES = ("merge", "exact")
PROMPTS = {
    "null": "",
    "negative": "blurry, watermark",
    "kept exact": "a photo of a tiger",
    "erased": "a photo of a cat",
}
SIGMAS = (0.5, 2.0, 8.0)
COST_LATENT, COST_PAIRS = 16, 25

# By kind of prompt and noise level: the predicted noise, and the keys and values of each layer.
Predictions = dict[str, list[tuple[Tensor, list[Tensor]]]]
Change = dict[str, float]  # of "keys and values" and of "prediction"


def checkpoint() -> Path:
    """The shrunken SD1.5."""
    return build_checkpoint(BUILD / "checkpoints" / "one-level.safetensors")


def model_in(dtype: torch.dtype):
    """The host's MODEL with its U-Net stored in a number format."""
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(
            str(checkpoint()), output_clip=False, output_vae=False, model_options={"dtype": dtype}
        )[0]


def trained(model, clip, language: LanguageStore | None = None) -> Erasure:
    """A short training: a cat becomes a dog, a tiger and a negative prompt stay exact.

    Args:
        language: what was read of ordinary language before, and where it is kept.
    """
    settings = preset_settings(
        "balanced",
        concepts="cat => dog",
        keep=(PROMPTS["kept exact"],),
        negative_prompts=(PROMPTS["negative"],),
        **{"steps": 4, "trajectories": 4, "sampling_steps": 4, "captions": 24, "resolution": 64},
    )
    with torch.inference_mode(False), torch.enable_grad():
        with ComfyDenoiser(model, clip, "tiny", 6, 64) as denoiser:
            last = erase(settings, denoiser, language)
    (kept,) = last.record["measures"]["kept"]
    if not kept["exact"]:
        raise RuntimeError("The kept prompt did not become exact; the figures would mean nothing.")
    return last


def predict(model, tokens: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
    """Noise (1, 4, 8, 8) that the host's own code predicts, and the keys and values it used."""
    read = []

    def listen(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *args, **more):
        if k.shape[1] == tokens.shape[0]:  # 77 of the prompt; the picture has 64
            read.extend((k.float().clone(), v.float().clone()))
        return attention(q, k, v, *args, **more)

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
    options = comfy.model_patcher.create_model_options_clone(model.model_options)
    comfy.sampler_helpers.prepare_model_patcher(model, {}, options)
    around = {**options["transformer_options"], "optimized_attention_override": listen}
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * (1 + sigma**2) ** 0.5
    with torch.inference_mode():
        x0 = model.model.apply_model(
            x, torch.tensor([sigma]), c_crossattn=tokens[None], transformer_options=around
        )
    return (x - x0) / sigma, read


def predictions(
    model, tokens: Mapping[str, Tensor], sigmas: Sequence[float] = SIGMAS
) -> Predictions:
    """What a model predicts of each kind of prompt, at each noise level."""
    return {kind: [predict(model, rows, s) for s in sigmas] for kind, rows in tokens.items()}


def changes(before: Predictions, after: Predictions) -> dict[str, Change]:
    """Relative change of keys and values and of the prediction, by kind of prompt."""
    return {
        kind: {
            "keys and values": max(
                _share(a, b)
                for (_, old), (_, new) in zip(before[kind], after[kind], strict=True)
                for a, b in zip(old, new, strict=True)
            ),
            "prediction": max(
                _share(old, new)
                for (old, _), (new, _) in zip(before[kind], after[kind], strict=True)
            ),
        }
        for kind in before
    }


def floors(model, dtype: torch.dtype, tokens: Mapping[str, Tensor]) -> dict[str, Change]:
    """The changes when the float32 cross-attention matrices are rounded to ``dtype`` once.

    The checkpoint's numbers are fp16; the digits below are filled in at random, or rounding to
    fp16 would change nothing.
    """
    keys = trained_keys(model).values()
    generator = torch.Generator().manual_seed(0)
    full, rounded = model.clone(), model.clone()
    for key, weight in original_weights(model, {key: key for key in keys}).items():
        weight = weight.float()
        digits = weight * (torch.rand(weight.shape, generator=generator) - 0.5) * 2**-10
        steps = (weight + digits).to(dtype).float() - weight
        full.add_patches({key: ("diff", (digits,))})
        rounded.add_patches({key: ("diff", (steps,))})
    return changes(predictions(full, tokens), predictions(rounded, tokens))


def moved(
    model,
    erasure: Erasure,
    tokens: Mapping[str, Tensor],
    sigmas: Sequence[float] = SIGMAS,
    modes: Sequence[str] = MODES,
) -> dict[str, dict[str, Change]]:
    """The changes by mode, against the model without the erasure."""
    plain = predictions(model, tokens, sigmas)
    return {
        mode: changes(plain, predictions(apply_erasure(model, erasure, 1.0, mode), tokens, sigmas))
        for mode in modes
    }


def computing_in(model, dtype: torch.dtype):
    """The model, computing in a number format as well, as a GPU that is good at it would."""
    half = model.clone()
    half.set_model_compute_dtype(dtype)
    return half


def erased_alike(model, erasure: Erasure, tokens: Tensor) -> float:
    """Difference of the two modes over what the erasure changes, for a prompt."""
    plain = predictions(model, {"": tokens})[""]
    merged, exact = (
        predictions(apply_erasure(model, erasure, 1.0, mode), {"": tokens})[""] for mode in MODES
    )
    return max(
        float((two - one).norm() / (one - before).norm())
        for (before, _), (one, _), (two, _) in zip(plain, merged, exact, strict=True)
    )


def cost(model, erasure: Erasure, tokens: Tensor) -> dict[str, Any]:
    """Time of a forward with an exact erasure over one without, in neighbouring pairs."""
    exact = apply_erasure(model, erasure, 1.0, "exact")
    x = torch.randn(2, 4, COST_LATENT, COST_LATENT, generator=torch.Generator().manual_seed(0))
    comfy.model_management.load_models_gpu([model])

    def seconds(wrappers: Mapping[str, Any]) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model.model.apply_model(
                x,
                torch.tensor([2.0, 2.0]),
                c_crossattn=tokens.expand(2, -1, -1),
                transformer_options={"wrappers": wrappers},
            )
        return time.perf_counter() - began

    seconds({}), seconds(exact.wrappers)
    plain, beside = [], []
    for pair in range(COST_PAIRS):
        order = [(plain, {}), (beside, exact.wrappers)]
        for times, wrappers in order if pair % 2 else reversed(order):
            times.append(seconds(wrappers))
    ratios = sorted(b / p for b, p in zip(beside, plain, strict=True))
    return {
        "forward_ratio": round(statistics.median(ratios), 4),
        "forward_ratio_quartiles": [round(ratios[i * len(ratios) // 4], 4) for i in (1, 3)],
        "plain_seconds": round(statistics.median(plain), 4),
        "latent": COST_LATENT,
        "batch": 2,
        "rank": erasure.rank,
    }


def main() -> None:
    began = time.monotonic()
    with torch.inference_mode():
        model, clip = comfy.sd.load_checkpoint_guess_config(str(checkpoint()), output_vae=False)[:2]
    erasure = trained(model, clip)
    encoded = encode_prompts(clip, list(PROMPTS.values()))
    tokens = {name: prompt.tokens for name, prompt in zip(PROMPTS, encoded, strict=True)}
    by_dtype = {}
    for name, dtype in DTYPES.items():
        stored = model_in(dtype)
        by_dtype[name] = {
            "floor": floors(model, dtype, tokens),
            **moved(stored, erasure, tokens),
        }
        if dtype in (torch.float16, torch.bfloat16):
            by_dtype[name]["computed in it too"] = moved(
                computing_in(stored, dtype), erasure, tokens, SIGMAS[1:2]
            )
    result = {
        "model": "shrunken SD1.5, random weights, CPU",
        "stored_in": by_dtype,
        "erased_exact_against_merge_float32": erased_alike(model, erasure, tokens["erased"]),
        "cost": cost(model, erasure, tokens["null"]),
        "seconds": round(time.monotonic() - began, 1),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(_rounded(result), indent=2) + "\n")
    _show(result)


def _share(before: Tensor, after: Tensor) -> float:
    return float((after - before).norm() / before.norm())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _show(result: Mapping[str, Any]) -> None:
    for dtype, rows in result["stored_in"].items():
        computed = rows.get("computed in it too", {})
        rows = {mode: rows[mode] for mode in ("floor", *MODES)}
        rows |= {f"{mode}, computed": kinds for mode, kinds in computed.items()}
        for mode, kinds in rows.items():
            values = "  ".join(f"{kind} {c['prediction']:.1e}" for kind, c in kinds.items())
            print(f"{dtype:14} {mode:16} {values}")
    for name in ("erased_exact_against_merge_float32", "cost", "seconds"):
        print(f"{name:36} {result[name]}")


if __name__ == "__main__":
    main()
