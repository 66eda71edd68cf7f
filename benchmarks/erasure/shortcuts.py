"""May it be drawn cheaper, and what counts as a picture? ``python -m benchmarks.erasure.shortcuts``

Draws the untouched model's pictures of a few cases in float32 with 20 steps, and again with
bfloat16 products and with fewer steps: the judge's accuracy on each, and how often its verdict is
the same. Then the share of unseen real pictures, of the model's own, and of several kinds of
rubbish that lie within the manifold of real pictures, for one common radius (a quantile) and for
radii of their own (k neighbours). Writes ``results/erasure_shortcuts.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.emoji.data import SIZE, training_pictures
from benchmarks.erasure.cases import REPORTED, Case
from benchmarks.erasure.judge import Verdicts
from benchmarks.erasure.metrics import inside_manifold, neighbourhood_radii, rounded
from benchmarks.erasure.protocol import Bench
from benchmarks.erasure.results import RESULTS, Cache

RESULT = RESULTS / "erasure_shortcuts.json"
WAYS = ((20, False), (20, True), (10, True), (6, True))
NEIGHBOURS, QUANTILES = (1, 3, 5), (0.9, 0.95, 0.99, 1.0)
UNSEEN, RUBBISH = 80, 40


def compare_ways(path: Path, cases: list[Case]) -> dict[str, Any]:
    """Accuracy and agreement with the first way, by way of drawing."""
    found, first = {}, None
    for steps, fast in WAYS:
        bench = Bench(path, Cache(Path("unused")), steps, fast)
        verdicts = [bench.untouched(case, 0)[1] for case in cases]
        names = [name for verdict in verdicts for name in verdict.names]
        asked = [question.name for case in cases for question in case.questions]
        first = first or names
        found[f"{steps} steps, {'bfloat16' if fast else 'float32'}"] = {
            "accuracy": float(np.mean(np.equal(names, asked))),
            "same verdict": float(np.mean(np.equal(names, first))),
            "pictures": len(names),
        }
        print(list(found.items())[-1], flush=True)
    return found


def inside(bench: Bench, drawn: Verdicts) -> dict[str, dict[str, float]]:
    """Shares within the manifold, by radius and kind of picture."""
    pages = training_pictures(1, seed=31).reshape(-1, SIZE, SIZE, 3)
    real = bench.painter.drawn_again(pages[:: len(pages) // UNSEEN])
    shape = (RUBBISH, SIZE, SIZE, 3)
    rubbish = {
        "unseen real": real,
        "noise": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
        "decoded noise": bench.painter.pages(
            torch.randn(RUBBISH, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        ),
        "two at once": (real[:RUBBISH] // 2 + real[-RUBBISH:] // 2).astype(np.uint8),
        "two halves": np.concatenate([real[:RUBBISH, :, :32], real[-RUBBISH:, :, 32:]], 2),
        "blank": np.full((1, *shape[1:]), 255, dtype=np.uint8),
    }
    features = {kind: bench.judge.judge(pages).features for kind, pages in rubbish.items()}
    features["drawn"] = drawn.features
    reals, found = bench.judge.real, {}
    nearest = neighbourhood_radii(reals, 1)
    radii = {f"quantile {q}": np.quantile(nearest, q) for q in QUANTILES}
    radii |= {f"k {k}": neighbourhood_radii(reals, k) for k in NEIGHBOURS}
    for label, radius in radii.items():
        found[label] = {
            kind: float(inside_manifold(rows, reals, radius).mean())
            for kind, rows in features.items()
        }
        print(label, rounded(found[label]), flush=True)
    return found


def main() -> None:
    """The command line."""
    from benchmarks.erasure.run import checkpoint, find_cases

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--cases", nargs="*", default=[case.name for case in REPORTED[:3]])
    parser.add_argument("--result", type=Path, default=RESULT)
    asked = parser.parse_args()
    path, cases = asked.checkpoint or checkpoint(), find_cases(asked.cases)
    bench = Bench(path, Cache(Path("unused")))
    found = {
        "model": bench.painter.identity,
        "drawn": compare_ways(path, cases),
        "inside": inside(bench, bench.untouched(cases[0], 0)[1]),
    }
    asked.result.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
