"""The same erasure through ComfyUI and through a pipeline: what differs, and what it costs.

``python -m benchmarks.faces`` trains on the emoji model by both ways in turn, prints a table and
writes ``results/faces.json``. Seconds are the processor's, of whole runs from settings to erasure;
the ratio is of each pair, so that what else the machine does counts little.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.emoji.pipeline import emoji_pipeline  # first: the host brings stand-ins
from tools.pack import load_pack, use_host

use_host()
load_pack()

import torch  # noqa: E402
from concept_surgery.erase_core import Erasure, Meter  # noqa: E402
from concept_surgery.erase_core import erase as erase_with  # noqa: E402
from concept_surgery.nodes.host import ComfyDenoiser  # noqa: E402

from benchmarks.emoji.build import CHECKPOINT, build_emoji_checkpoint  # noqa: E402

RESULT = Path(__file__).parent / "results" / "faces.json"
PAIRS = 2
CASES: Mapping[str, Mapping[str, Any]] = {
    "cat => dog": {"replace_with": "dog"},
    "pizza removed": {"concepts": "pizza"},
    "cat => dog, instant": {"replace_with": "dog", "preset": "instant"},
}
COMMON: Mapping[str, Any] = {"concepts": "cat", "resolution": 64, "captions": 200}


def through_comfyui(checkpoint: Path, settings: Any) -> tuple[Erasure, float, float]:
    """The erasure, the forward-equivalents and the seconds it took."""
    import comfy.sd

    with torch.inference_mode():
        model, clip = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:2]
    meter, began = Meter(), time.process_time()
    with ComfyDenoiser(model, clip, "", settings.sampling_steps, settings.resolution) as denoiser:
        erasure = erase_with(settings, denoiser, None, meter)
    return erasure, meter.spent, time.process_time() - began


def through_diffusers(pipe: Any, chosen: Mapping[str, Any]) -> tuple[Erasure, float, float]:
    """The same, of a pipeline."""
    from concept_surgery.pipelines import erase

    meter, began = Meter(), time.process_time()
    erasure = erase(pipe, meter=meter, progress=False, **chosen)
    return erasure, meter.spent, time.process_time() - began


def apart(one: Erasure, other: Erasure) -> float:
    """The largest relative difference of a matrix's change."""
    return max(
        float((other.delta(name) - one.delta(name)).norm() / one.delta(name).norm())
        for name in one.factors
    )


def compare(checkpoint: Path, pipe: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """One erasure by both ways, :data:`PAIRS` times in turn."""
    from concept_surgery.pipelines.erasing import settings_for

    settings, ratios = settings_for({}, **chosen), []
    for _ in range(PAIRS):
        theirs, spent, seconds = through_comfyui(checkpoint, settings)
        ours, also_spent, more = through_diffusers(pipe, chosen)
        ratios.append(more / seconds)
    return {
        "apart": apart(theirs, ours),
        "spent": {"comfyui": spent, "diffusers": also_spent},
        "seconds": {"comfyui": seconds, "diffusers": more},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def main() -> None:
    """Compare, print and write."""
    checkpoint, found = build_emoji_checkpoint(CHECKPOINT), {}
    with tempfile.TemporaryDirectory() as folder:
        pipe = emoji_pipeline(checkpoint, Path(folder))
        for name, case in CASES.items():
            one = found[name] = compare(checkpoint, pipe, {**COMMON, **case})
            print(
                f"{name}: weights {one['apart']:.3%} apart, {one['spent']['comfyui']:.0f} and "
                f"{one['spent']['diffusers']:.0f} forward-equivalents, time {one['ratio']:.2f} of "
                "ComfyUI's",
                flush=True,
            )
    RESULT.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
