"""What an erasure is on each architecture that is no family of its own, built small.

``python -m benchmarks.architectures`` trains one erasure on each that the host at hand knows
(another by ``COMFYUI_FOLDER``), prints the table of ``docs/architectures.md`` and writes
``results/architectures.json``; what another host measured stays in there. Random weights, with a
stand-in of each text encoder: minutes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tests  # noqa: F401  # isort: skip - before the host's folder, which has another, is in front
from tools.pack import load_pack, use_host

use_host()
load_pack()

import comfyui_version  # noqa: E402
from concept_surgery.nodes.apply import MODES, apply_erasure  # noqa: E402

from tests.host.architectures import ARCHITECTURES, build, noisy, predicted  # noqa: E402
from tests.host.test_exact_architectures import train  # noqa: E402

RESULT = Path(__file__).parent / "results" / "architectures.json"
SIGMA = 0.7
HERE = {"host": comfyui_version.__version__}


def measured(name: str) -> dict[str, Any]:
    """Which layers are edited, how far the null prompt moves in the worse mode, what moves."""
    model, clip = build(name)
    record = (erasure := train(model, clip, name)).record
    x, null = noisy(model, ARCHITECTURES[name], SIGMA), clip.conditioning("")
    clean = predicted(model, null, x, SIGMA)
    found = [predicted(apply_erasure(model, erasure, 1.0, mode), null, x, SIGMA) for mode in MODES]
    scale = (x - clean).norm()
    return {
        **HERE,
        "layers": [row["name"] for row in record["readers"] if row["edited"]],
        "null": max(float((one - clean).norm() / scale) for one in found),
        "moved": record["measures"]["moved_held_out"]["overall"],
        "exact": all(one["exact"] for one in record["measures"]["kept"]),
        "steps": record["steps_done"],
        "cost": record["forward_equivalents"],
    }


def main() -> None:
    """Measure, print and write."""
    found = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    for name, entry in ARCHITECTURES.items():
        if entry.lacking or found.get(name, HERE)["host"] != HERE["host"]:
            continue
        one = found[name] = measured(name)
        kept = "exact" if one["exact"] else "approximate"
        print(
            f"| {name} | {', '.join(one['layers'])} | {one['null']:.1e} | {one['moved']:.2f} | "
            f"{kept} | {one['cost']} |",
            flush=True,
        )
        RESULT.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
