"""The tables of the ablations: ``python -m benchmarks.erasure.ablation_tables``.

From the lines of the newest model: each factor's values on the erasures that all of them were
measured on, the preset as it is first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.erasure import ablations
from benchmarks.erasure.methods import ours
from benchmarks.erasure.methods.base import Method
from benchmarks.erasure.metrics import measured
from benchmarks.erasure.report import UNKNOWN, markdown, newest_model
from benchmarks.erasure.results import RESULTS, Cache

TABLES = RESULTS / "erasure_ablations.md"
AS_IT_IS = "as it is"
Line = Mapping[str, Any]
# By method and then by erasure; what was asked for without keep prompts is an erasure of its own.
Runs = Mapping[str, Mapping[tuple[str, bool], Line]]

INTRODUCTION = """\
One setting changed at a time, ten sampler steps, one seed, means over the erasures that all values
of a factor were measured on (*n* of those that are kept for tuning). The first row of each group is
the preset as it is.

**UA**: erased prompts without the concept; **intact**: and near real pictures. **IRA**: the same
kind of thing, named nowhere, still drawn right, over the untouched model's. **change**: root mean
square difference of those pictures; **kept**: of the keep prompts'. **moved**: how much of the
guidance goes over, on held-out states and on the edited model's own. **unnamed**: change of
predictions for prompts that nobody named, relative. **null**: of the null prompt's, at worst.
**ridge**: what was given or chosen. An erasure has 16 pictures of the concept and 24 of others: a
hundredth is nothing. What follows from it stands in `benchmarks/erasure/decisions.md`.
"""


def _measure(name: str) -> Callable[[Line], float | None]:
    return lambda line: line["measures"].get(name)


def _note(name: str) -> Callable[[Line], float | None]:
    return lambda line: line["notes"].get(name)


COLUMNS: dict[str, tuple[Callable[[Line], float | None], str]] = {
    "UA": (_measure("UA"), ".2f"),
    "intact": (_measure("UA_intact"), ".2f"),
    "IRA": (_measure("IRA"), ".2f"),
    "change": (_measure("others_change"), ".3f"),
    "kept": (_measure("kept_change"), ".3f"),
    "H": (_measure("H"), ".2f"),
    "moved": (_note("moved"), ".2f"),
    "own states": (_note("moved_sampled"), ".2f"),
    "unnamed": (_note("unnamed_drift"), ".3f"),
    "fwd-eq": (lambda line: line["cost"]["forward_equivalents"], ",.0f"),
}


def runs_of(lines: Iterable[Line], model: str) -> Runs:
    """The last line of each method and erasure on a model."""
    runs: dict[str, dict[tuple[str, bool], Line]] = {}
    for line in lines:
        of = line["of"]
        if of["model"] == model:
            runs.setdefault(of["method"], {})[of["case"], bool(of["keep"])] = measured(line)
    return runs


def factor_rows(runs: Runs, methods: Sequence[Method]) -> list[list[str]]:
    """Rows of those methods that were measured, on what all of them were measured on.

    Args:
        methods: the unchanged one first.
    """
    found = [method for method in methods if method.name in runs]
    common = [case for case in runs.get(methods[0].name, {}) if case[1]]
    common = [case for case in common if all(case in runs[m.name] for m in found)]
    if len(found) < 2 or not common:
        return []
    return [
        [AS_IT_IS if m is methods[0] else _label(m), *_cells([runs[m.name][c] for c in common])]
        for m in found
    ]


def _cells(lines: Sequence[Line]) -> list[str]:
    cells = []
    for value_of, form in COLUMNS.values():
        values = [value for value in map(value_of, lines) if value is not None]
        cells.append(format(np.mean(values), form) if values else UNKNOWN)
    drift = max(max(line["null_drift"].values()) for line in lines)
    ridges = sorted({line["notes"]["protection"] for line in lines})
    ends = [f"{ridge:g}" for ridge in dict.fromkeys((ridges[0], ridges[-1]))]
    return [*cells, f"{drift:.1g}", " to ".join(ends), f"{len(lines)}"]


def _label(method: Method) -> str:
    """What a variant changes: its name behind the factor's, or behind the preset's."""
    return method.name.split(": " if ": " in method.name else ", ", 1)[1]


def tables(runs: Runs) -> str:
    """Markdown: the factors of the closed form, then those of training, then keep prompts."""
    parts = [INTRODUCTION]
    for base in (ours.INSTANT, ablations.BASE):
        rows, last = [], None
        for factor in (*ablations.FACTORS, ablations.SUBSPACE):
            found = factor_rows(runs, ablations.variants(factor, base))
            if not found:
                continue
            first, *others = found
            if first != last:  # other erasures than the factor before
                rows.append(["", *first])
            rows += [["" if n else factor, *row] for n, row in enumerate(others)]
            last = first
        parts += [f"## {base.name.split('/')[1].capitalize()}\n", _table("factor", rows)]
    parts += ["## What is asked for\n", _table("erasure", _asked_rows(runs))]
    return "\n".join(parts)


def _asked_rows(runs: Runs) -> list[list[str]]:
    """The balanced preset with other alternatives, and with and without keep prompts."""
    base = runs.get(ablations.BASE.name, {})
    rows = []
    for case in ablations.CASES["instead"]:
        if (case.text, True) in base:
            rows.append([case.text, AS_IT_IS, *_cells([base[case.text, True]])])
    texts = [text for text, keeps in base if not keeps and (text, True) in base]
    for label, keeps in ((AS_IT_IS, True), ("no keep prompts", False)):
        if texts:
            rows.append(["all", label, *_cells([base[text, keeps] for text in texts])])
    return rows


def _table(first: str, rows: Sequence[Sequence[str]]) -> str:
    return markdown([first, "value", *COLUMNS, "null", "ridge", "n"], rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ablations.LINES)
    parser.add_argument("--tables", type=Path, default=TABLES)
    asked = parser.parse_args()
    cache = Cache(asked.results)
    text = tables(runs_of(cache, newest_model(cache)))
    asked.tables.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
