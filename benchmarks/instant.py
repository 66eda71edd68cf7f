"""What the closed form costs at the shapes of real models, and how it bears many concepts.

``python -m benchmarks.instant`` prints a table and writes ``results/instant.json``.

Random matrices and random token embeddings with the spread of a text encoder's; ordinary language
counts as encoded. Seconds are of this machine; everything runs on the CPU. Wall seconds count what
else the machine does meanwhile, CPU seconds only this process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.pack import load_pack, use_host

use_host()
load_pack()

import torch  # noqa: E402
from concept_surgery.erase_core.method.closed_form import EditRegression, TokenTargets  # noqa: E402
from concept_surgery.erase_core.method.language import shrunk  # noqa: E402
from concept_surgery.erase_core.method.protection import (  # noqa: E402
    RIDGES,
    strongest_that_moves,
)
from concept_surgery.erase_core.method.subspace import exact_set, leakage  # noqa: E402
from concept_surgery.erase_core.method.ways import WayIn  # noqa: E402
from concept_surgery.erase_core.model.prompt import POOLED as POOLED_WAY  # noqa: E402
from concept_surgery.erase_core.run.heard import OTHER_SHRINKAGE  # noqa: E402

RESULT = Path(__file__).parent / "results" / "instant.json"
THREADS, TOKENS, TEMPLATES, RANK = 1, 77, 12, 16
# Two matrices a cross-attention, with the width of its level.
SD15 = [320] * 10 + [640] * 10 + [1280] * 12
SDXL = [640] * 20 + [1280] * 120
MANY = (1, 10, 100)
# SDXL's matrix that reads the pooled vector beside other numbers, and how much of it that is.
POOLED_MATRIX, POOLED = (1280, 2816), 1280


def matrices(rows: list[int], width: int) -> dict[str, torch.Tensor]:
    """Random K and V matrices of a model, (out, width) each."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"m{i:03}_attn2_to_k": torch.randn(out, width, generator=generator) / width**0.5
        for i, out in enumerate(rows)
    }


def edits(count: int, width: int, tokens: int = TOKENS) -> tuple[list[TokenTargets], torch.Tensor]:
    """Concepts and the null prompt: all prompts share a part at each position, as in CLIP."""
    generator = torch.Generator().manual_seed(1)
    null = torch.randn(tokens, width, generator=generator)
    prompts = []
    for _ in range(count):
        word = torch.randn(2, 1, width, generator=generator)
        context = torch.rand(2, TEMPLATES * tokens, 1, generator=generator)
        shared = null.repeat(TEMPLATES, 1)
        own = 0.2 * torch.randn(2, TEMPLATES * tokens, width, generator=generator)
        prompts.append(TokenTargets(*(shared + context * word + own)))
    return prompts, null


class Stages:
    """Wall and CPU seconds by stage."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] = round(time.perf_counter() - wall, 2)
        self.cpu[name] = round(time.process_time() - cpu, 2)


def solve_vectors(concepts: int) -> None:
    """The same for pooled vectors."""
    concept_edits, null = edits(concepts, POOLED, tokens=1)
    vectors = torch.randn(256, POOLED, generator=torch.Generator().manual_seed(3)).double()
    matrix = next(iter(matrices([POOLED_MATRIX[0]], POOLED_MATRIX[1]).values()))
    moment = shrunk(vectors.T @ vectors / len(vectors), OTHER_SHRINKAGE)
    exact = exact_set([edit.change for edit in concept_edits], [null], [])
    way = WayIn(POOLED_WAY, {"pooled": matrix}, concept_edits, exact, moment)
    choice = strongest_that_moves(way.regression, RANK, None, ridges=RIDGES[::2])
    assert way.edit(choice.solution)


def solve(rows: list[int], width: int, concepts: int, pooled: bool = False) -> dict[str, Any]:
    """One instant erasure without its encoding: exact set, choice of the ridge, factors."""
    weights = matrices(rows, width)
    concept_edits, null = edits(concepts, width)
    words = torch.randn(20_000, width, generator=torch.Generator().manual_seed(2))
    moment = (words.T @ words / len(words)).double() + (null.T @ null / TOKENS).double()
    stages = Stages()
    with stages.stage("exact set"):
        exact = exact_set([edit.change for edit in concept_edits], [null], [])
    with stages.stage("regression"):
        regression = EditRegression(concept_edits, exact.basis, moment, weights)
    with stages.stage("choice"):
        choice = strongest_that_moves(regression, RANK, None)
    with stages.stage("factors"):
        factors = choice.solution.factors(weights)
    if pooled:
        with stages.stage("pooled vector"):
            solve_vectors(concepts)
    columns = choice.solution.basis.shape[1]
    values = sum(factor.numel() + width * columns for factor in factors.values())
    return {
        "concepts": concepts,
        "seconds": round(sum(stages.wall.values()), 2),
        "cpu_seconds": round(sum(stages.cpu.values()), 2),
        "seconds_by_stage": stages.wall,
        "cpu_seconds_by_stage": stages.cpu,
        "ridge": choice.ridge,
        "columns": columns,
        "file_megabytes": round(4 * values / 2**20, 1),
        "keys_and_values_moved_least": round(min(choice.solution.moved), 3),
        "harm": round(choice.solution.harm, 4),
        "share_left": round(exact.share_left, 3),
        "null_leakage": leakage(choice.solution.basis, null),
    }


def main() -> None:
    torch.set_num_threads(THREADS)
    result = {"threads": THREADS, "rank": RANK}
    result["SD1.5"] = [solve(SD15, 768, concepts) for concepts in MANY]
    result["SDXL"] = [solve(SDXL, 2048, concepts, pooled=True) for concepts in MANY[:1]]
    for model in ("SD1.5", "SDXL"):
        for line in result[model]:
            print(model)
            for name, value in line.items():
                print(f"  {name}: {value}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
