"""The benchmark: ``python -m benchmarks.erasure.run`` measures what isn't measured yet.

Every line is written as soon as it is there, so a run can be stopped and goes on where it was.
Without a checkpoint it takes the emoji model of ``benchmarks/emoji``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.emoji.build import CHECKPOINT, WEIGHTS, build_emoji_checkpoint, place_judge
from benchmarks.erasure.cases import REPORTED, TUNED, Case
from benchmarks.erasure.methods import METHODS, Method
from benchmarks.erasure.painter import STEPS
from benchmarks.erasure.protocol import Bench
from benchmarks.erasure.results import LINES, Cache
from benchmarks.erasure.tuned import tuned_methods

SEEDS = 3
QUICK_CASES = ("cat => dog", "banana", "ink => flat")
QUICK_METHODS = ("ours/instant", "ours/balanced", "uce", "speed")
COSTLY = ("leco",)  # many times the cost of all others together: one seed


def run_all(
    bench: Bench, cases: Sequence[Case], methods: Sequence[Method], seeds: Sequence[int]
) -> None:
    """Measure everything, seed by seed, so that a run that is stopped covers all cases."""
    for seed in seeds:
        for case in cases:
            for method in methods:
                if seed and method.name.split("/")[0] in COSTLY:
                    continue
                began, known = time.monotonic(), len(bench.cache)
                line = bench.run(case, method, seed)
                if len(bench.cache) > known:
                    _say(line, time.monotonic() - began)


def checkpoint() -> Path:
    """The emoji model's checkpoint, built from the committed weights where there are any.

    So is its judge put in place, where none was trained.
    """
    if not WEIGHTS.exists():
        return CHECKPOINT
    place_judge()
    return build_emoji_checkpoint(CHECKPOINT)


def open_bench(path: Path | None, results: Path, steps: int) -> Bench:
    """What a command measures with: the emoji model unless another checkpoint is given."""
    bench = Bench(path or checkpoint(), Cache(results), steps)
    leave_out_empty_layers(bench.painter.clip)
    return bench


def leave_out_empty_layers(clip: Any) -> None:
    """Take those layers out of the host's CLIP-L that add nothing, which changes no bit.

    Of the emoji model's twelve they are ten, and four fifths of the time that encoding takes.
    """
    encoder = clip.cond_stage_model.clip_l.transformer.text_model.encoder
    adding = [
        layer
        for layer in encoder.layers
        if any(part.any() for end in _ends(layer) for part in end.parameters())
    ]
    encoder.layers = torch.nn.ModuleList(adding)


def _ends(layer: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    return layer.self_attn.out_proj, layer.mlp.fc2


def find_cases(names: Sequence[str]) -> list[Case]:
    """Cases by name.

    Raises:
        SystemExit: one that isn't there.
    """
    known = {case.name: case for case in (*REPORTED, *TUNED)}
    return [_known(known, name, "case") for name in names]


def find_methods(names: Sequence[str]) -> list[Method]:
    """Methods by name, the tuned ones among them.

    Raises:
        SystemExit: one that isn't there.
    """
    known = METHODS | tuned_methods()
    return [_known(known, name, "method") for name in names]


def _known(known: dict, name: str, what: str):
    if name not in known:
        raise SystemExit(f"There is no {what} {name!r}. There are: {', '.join(known)}.")
    return known[name]


def _say(line: dict, seconds: float) -> None:
    of, found = line["of"], line["measures"]
    names = ("UA", "UA_intact", "replaced", "IRA", "CRA", "crossing", "others_change", "H")
    figures = " ".join(f"{n} {found[n]:.2f}" for n in names if found.get(n) is not None)
    case = of["case"].replace("\n", ", ")
    spent = line["cost"]["forward_equivalents"]
    print(
        f"{case:28} {of['method']:18} {of['seed']} {figures} fwd {spent} ({seconds:.0f} s)",
        flush=True,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few erasures, few methods, one seed")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=LINES)
    parser.add_argument("--cases", nargs="*", help="names of cases")
    parser.add_argument("--methods", nargs="*", help="names of methods")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the sampler")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    bench = open_bench(chosen.checkpoint, chosen.results, chosen.steps)
    cases = find_cases(
        chosen.cases or (QUICK_CASES if chosen.quick else [c.name for c in REPORTED])
    )
    everything = [*METHODS, *tuned_methods()]
    methods = find_methods(chosen.methods or (QUICK_METHODS if chosen.quick else everything))
    run_all(bench, cases, methods, range(1 if chosen.quick else chosen.seeds))


if __name__ == "__main__":
    main()
