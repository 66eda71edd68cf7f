"""One setting at a time: ``python -m benchmarks.erasure.ablations`` with the same measures.

Every factor starts from the balanced preset (with ``--instant`` from that one, where the factor is
one of the closed form); what doesn't change is measured once, since the cache
is the benchmark's own format. On the ``TUNED`` erasures, so that what is learned here may be put
into the presets without touching what is reported.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from concept_surgery.erase_core.settings.prompts import TEMPLATES

from benchmarks.emoji.words import STYLE_NAMES, fill, without_object
from benchmarks.erasure.cases import PLAIN, REPORTED, STYLED, TUNED, Case
from benchmarks.erasure.methods import esd, ours, subspaces
from benchmarks.erasure.methods.base import Method
from benchmarks.erasure.methods.phrased import phrased
from benchmarks.erasure.results import RESULTS

LINES = RESULTS / "erasure_ablations.jsonl"
BASE = ours.BALANCED
SOFT = {"form": "soft"}
# Of our own kind, without those that the questions use.
FEW_TEMPLATES = ("{}", "a photo of a {} => a photo")
_OWN = tuple(
    t.text.replace("{a}", "a {}") + (f" => {t.without}" if t.without else "")
    for t in TEMPLATES["object"]
)
# With what the questions ask, word for word: more than any templates could know.
AS_ASKED = _OWN + tuple(
    f"{fill(phrase, '{}', style)} => {without_object(phrase).format(s=style)}"
    for phrase, style in (
        *((phrase, None) for phrase in PLAIN),
        *((phrase, style) for phrase in STYLED for style in STYLE_NAMES),
    )
)
# A prompt for nothing in place of the same prompt without the concept; an empty one can't be given.
NEXT_TO_NOTHING = tuple(f"{t.text.replace('{a}', 'a {}')} => ," for t in TEMPLATES["object"])

FACTORS: dict[str, Sequence[Mapping[str, Any]]] = {
    "protection": [{"protection": p} for p in (0.0, 0.03, 0.3, 3.0, 30.0)],
    "rank": [{"rank": rank} for rank in (2, 4, 8, 32, 64)],
    "eta": [{"eta": eta} for eta in (0.5, 1.0, 2.0)],
    "pool": [{"trajectories": count} for count in (4, 8, 32)],
    "driver": [{"driven_by": driver} for driver in ("erased", "alternative")],
    "w(sigma)": [{"weighting": weighting} for weighting in ("relative", "image")],
    "sampling steps": [{"sampling_steps": steps} for steps in (5, 20)],
    "learning rate": [{"learning_rate": rate} for rate in (0.0003, 0.001, 0.01)],
    "steps": [{"steps": steps} for steps in (0, 12, 24, 96, 192)],
    "start": [{"warm_start": False}, {"warm_start": False, "steps": 192, "learning_rate": 0.02}],
    "templates": [{"templates": FEW_TEMPLATES}, {"templates": ("{}",)}],
    "as asked": [{"templates": AS_ASKED}, {"protection": 0.3, "templates": AS_ASKED}],
    "target": [{"templates": NEXT_TO_NOTHING}],
    "stop": [{"stop_below": 0.1, "steps": 192}],
    "guidance scale": [{"guidance_scale": scale} for scale in (1.0, 2.0, 8.0)],
    "captions": [{"captions": count} for count in (50, 200)],
    "null score": [{**SOFT, "null_score": n} for n in ("frozen", "student", "detached")],
    "drift weight": [{**SOFT, "drift_weight": weight} for weight in (0.0, 10.0)],
    "keep weight": [{**SOFT, "keep_weight": weight} for weight in (0.0, 10.0)],
    "layers": [{**SOFT, "layers": layers} for layers in ("cross-attention", "transformer")],
}
# What is asked for instead of how: the same settings throughout.
CASES: dict[str, Sequence[Case]] = {
    # What takes the place of the concept: a relative, something else, or nothing.
    "instead": [
        Case(text, "style" if "clay" in text else "object")
        for text in ("fox => wolf", "fox => umbrella", "fox", "clay => cartoon", "clay")
    ],
    "no keep prompts": [dataclasses.replace(case, keeps=False) for case in TUNED],
}
# Does ESD leave styles alone because the bare word, which it learns from, draws none? Nothing is
# chosen by this, so it is asked of the reported ones.
ON_STYLES: dict[str, Sequence[Method]] = {"phrasings": [phrased(esd.X), phrased(esd.X_STRICT)]}
STYLES = tuple(case for case in REPORTED if case.kind == "style")
# Where R comes from, and whether it is orthogonal to anything: not a setting, so it is replaced.
SUBSPACE = "subspace"
LONGEST_LABEL = 60


def variants(factor: str, base: Method = BASE) -> list[Method]:
    """The methods of a factor, the unchanged preset first."""
    if factor == SUBSPACE:
        return subspaces.variants(base)
    start = "" if base is BASE else f"{base.name.split('/')[1]}, "
    changed = [
        base.with_settings(f"{start}{factor}: {_label(values)}", **values)
        for values in FACTORS[factor]
    ]
    layers = [values.get("layers", base.layers) for values in FACTORS[factor]]
    pairs = zip(changed, layers, strict=True)
    return [base, *(dataclasses.replace(method, layers=rule) for method, rule in pairs)]


def _label(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())[:LONGEST_LABEL]


def main() -> None:
    """The command line."""
    from benchmarks.erasure.painter import STEPS
    from benchmarks.erasure.run import find_cases, open_bench, run_all

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("factors", nargs="*", default=[*FACTORS, SUBSPACE, *CASES, *ON_STYLES])
    parser.add_argument("--cases", nargs="*", help="names of cases")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=LINES)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the sampler")
    parser.add_argument("--instant", action="store_true", help="change the closed form alone")
    asked = parser.parse_args()
    base = ours.INSTANT if asked.instant else BASE
    bench = open_bench(asked.checkpoint, asked.results, asked.steps)
    cases: Sequence[Case] = find_cases(asked.cases) if asked.cases else TUNED
    for factor in asked.factors:
        if factor in CASES:
            run_all(bench, CASES[factor], [base], [0])
        elif factor in ON_STYLES:
            run_all(bench, STYLES, ON_STYLES[factor], [0])
        else:
            run_all(bench, cases, variants(factor, base), [0])


if __name__ == "__main__":
    main()
