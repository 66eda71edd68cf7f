"""Peak memory of each method over plain inference: ``python -m benchmarks.erasure.memory``.

Each in a process of its own: the most resident memory during a guided forward on one picture, then
during a short training. How many steps it trains doesn't matter. Linux only, where a process can
forget its peak: that of loading the model is higher than either. Methods that aren't asked for keep
what was measured before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.erasure.results import RESULTS

RESULT = RESULTS / "erasure_memory.json"
PROCESS = Path("/proc/self")
SHORT, SHORT_OURS = {"steps": 2}, {"steps": 2, "trajectories": 2, "captions": 16}


def forget_peak() -> None:
    """Begin a new peak at what is resident now (proc(5), clear_refs)."""
    (PROCESS / "clear_refs").write_text("5")


def peak() -> float:
    """Since then, in MB."""
    lines = (PROCESS / "status").read_text().splitlines()
    (most,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(most) / 1024


def measure(checkpoint: Path, name: str) -> dict[str, float]:
    """Peaks of one method in this process, MB."""
    import torch

    from benchmarks.erasure.cases import REPORTED
    from benchmarks.erasure.methods import METHODS
    from benchmarks.erasure.painter import Painter

    method, case = METHODS[name], REPORTED[0]
    short = {key: value for key, value in SHORT.items() if key in method.settings}
    if method.settings.get("preset", "instant") != "instant":
        short = SHORT_OURS
    painter = Painter(checkpoint)
    painter.encode(["", case.erased[0]])
    with painter.denoiser(method.layers) as denoiser:
        prompts = denoiser.encode(["", case.erased[0]])
        forget_peak()
        with torch.no_grad():
            denoiser.predict_x0(torch.randn(2, 4, 8, 8), torch.tensor([2.0, 2.0]), prompts)
        before = peak()
        forget_peak()
        method.train(denoiser, case, 0, {**method.settings, **short})
    return {"inference": round(before), "training": round(peak())}


def main() -> None:
    """The command line."""
    from benchmarks.erasure.methods import METHODS
    from benchmarks.erasure.run import checkpoint

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    path = asked.checkpoint or checkpoint()
    if asked.one:
        print(json.dumps(measure(path, asked.one)))
        return
    known = asked.result.read_text(encoding="utf-8") if asked.result.exists() else "{}"
    found = json.loads(known)
    for name in asked.methods:
        call = [sys.executable, "-m", "benchmarks.erasure.memory", "--one", name]
        lines = subprocess.check_output([*call, "--checkpoint", str(path)], text=True)
        found[name] = json.loads(lines.splitlines()[-1])
        found[name]["ratio"] = round(found[name]["training"] / found[name]["inference"], 3)
        print(name, found[name], flush=True)
    asked.result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
