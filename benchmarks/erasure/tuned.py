"""Settings chosen on the ``TUNED`` erasures, for ours and for the peers alike.

``python -m benchmarks.erasure.tuned`` measures every setting of each grid on all of them with one
seed and keeps the one with the highest mean H, the harmonic mean of UA_intact, IRA and CRA. What
is reported elsewhere is measured on other erasures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.erasure.cases import TUNED
from benchmarks.erasure.methods import METHODS, cure, esd, ileco, leco, oce, ours, rece, speed, uce
from benchmarks.erasure.methods.base import Method
from benchmarks.erasure.results import RESULTS

CHOSEN = RESULTS / "erasure_tuned.json"
TUNING_LINES = RESULTS / "erasure_tuning.jsonl"
SEED = 100  # of no reported run
GRIDS: dict[str, Sequence[Mapping[str, Any]]] = {
    "esd-x": esd.GRID,
    "esd-x-strict": esd.GRID,
    # Wider than their own grids, whose best lay at the edge; iLECO's lowest rate took next to
    # nothing of three concepts.
    "ileco": (*ileco.GRID[1:], {"rate": 5e-3}, {"rate": 1e-2}),
    "uce": uce.GRID,
    "speed": speed.GRID,
    "uce-phrased": ({"ridge": 0.5}, {"ridge": 5.0}, {"ridge": 50.0}),
    "speed-phrased": ({"threshold": 0.1}, {"threshold": 0.01}),
    "leco": (*leco.GRID, {**leco.SHORT, "rate": 1e-2}),
    "oce": oce.GRID,
    "oce-phrased": oce.PHRASED_GRID,
    "cure": cure.GRID,
    "cure-phrased": cure.PHRASED_GRID,
    "rece": rece.GRID,
    "rece-phrased": rece.PHRASED_GRID,
    "ours/instant": ours.CLOSED_GRID,
    "ours/balanced": ours.TRAINED_GRID,
    "ours/balanced-soft": ours.TRAINED_GRID,
}


def variants(name: str) -> list[Method]:
    """The methods of a grid, named by what they change."""
    return [
        METHODS[name].with_settings(
            f"{name} ({', '.join(f'{k} {v}' for k, v in values.items()) or 'as it is'})", **values
        )
        for values in GRIDS[name]
    ]


def choose(scores: Mapping[str, Sequence[float]]) -> str:
    """The name with the highest mean; of equal ones the first."""
    return max(scores, key=lambda name: float(np.mean(scores[name])))


def tuned_methods(path: Path = CHOSEN) -> dict[str, Method]:
    """The chosen ones under ``<name>-tuned``; empty before anything was chosen."""
    if not path.exists():
        return {}
    chosen = json.loads(path.read_text(encoding="utf-8"))["chosen"]
    return {
        f"{name}-tuned": METHODS[name].with_settings(f"{name}-tuned", **settings)
        for name, settings in chosen.items()
        if settings  # else the published ones are the best
    }


def main() -> None:
    """The command line."""
    from benchmarks.erasure.painter import STEPS
    from benchmarks.erasure.run import open_bench

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(GRIDS), help="methods to tune")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=TUNING_LINES)
    parser.add_argument("--chosen", type=Path, default=CHOSEN)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the sampler")
    asked = parser.parse_args()
    bench = open_bench(asked.checkpoint, asked.results, asked.steps)
    kept: dict[str, Any] = {"model": bench.painter.identity, "chosen": {}, "H": {}}
    if asked.chosen.exists():
        before = json.loads(asked.chosen.read_text(encoding="utf-8"))
        kept = before if before["model"] == kept["model"] else kept
    for name in asked.names:
        methods = {method.name: method for method in variants(name)}
        scores: dict[str, list[float]] = {label: [] for label in methods}
        for case in TUNED:
            with esd.states_kept():
                for label, method in methods.items():
                    scores[label].append(bench.run(case, method, SEED)["measures"]["H"] or 0.0)
        best = choose(scores)
        kept["H"][name] = {label: round(float(np.mean(s)), 4) for label, s in scores.items()}
        base = METHODS[name].settings
        new = {k: v for k, v in methods[best].settings.items() if base.get(k) != v}
        kept["chosen"][name] = new
        print(f"{name}: {best}, H {kept['H'][name]}", flush=True)
        asked.chosen.parent.mkdir(parents=True, exist_ok=True)
        asked.chosen.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
