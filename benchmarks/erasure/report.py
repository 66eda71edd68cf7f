"""From lines to a summary, a table and a plot: ``python -m benchmarks.erasure.report``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.erasure.cases import REPORTED
from benchmarks.erasure.metrics import bootstrap, measured, ratio_of_means, rounded
from benchmarks.erasure.plot import plot
from benchmarks.erasure.results import LINES, RESULTS, Cache

SUMMARY, TABLE = RESULTS / "erasure.json", RESULTS / "erasure.md"
PLOT = RESULTS / "erasure.svg"
COLUMNS = {
    "UA": "UA",
    "UA_intact": "UA, intact",
    "integrity": "integrity",
    "replaced": "replaced",
    "synonym_gone": "synonyms",
    "from_a_picture_gone": "from a picture",
    "IRA": "IRA",
    "CRA": "CRA",
    "crossing": "crossing",
    "left_out_right": "left out",
    "kept_right": "kept",
    "negative_right": "negative",
    "others_change": "change",
    "H": "H",
}
COSTS = ("forward_equivalents", "bare_steps", "seconds")
Lines = Iterable[Mapping[str, Any]]


def newest_model(lines: Lines) -> str:
    """The model of the last line: results of two models are never mixed.

    Raises:
        ValueError: no lines.
    """
    models = [line["of"]["model"] for line in lines]
    if not models:
        raise ValueError("There are no results yet: run python -m benchmarks.erasure.run first.")
    return models[-1]


def newest_lines(lines: Lines, model: str) -> list[Mapping[str, Any]]:
    """The last line of each case, method and seed on a model: older code gives way."""
    chosen = {}
    for line in lines:
        of = line["of"]
        if of["model"] == model:
            chosen[of["case"], of["method"], of["seed"]] = line
    return list(chosen.values())


def common_lines(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of erasures and seeds that every method was measured on: only those compare."""
    runs: dict[tuple[str, int], set[str]] = {}
    for line in lines:
        of = line["of"]
        runs.setdefault((of["case"], of["seed"]), set()).add(of["method"])
    every = set().union(*runs.values())
    return [line for line in lines if runs[line["of"]["case"], line["of"]["seed"]] == every]


def summarise(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method: each measure with its 95 % interval over erasures and seeds, and the costs."""
    summary: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(line["of"]["method"] for line in lines):
        own = [line for line in lines if line["of"]["method"] == method]
        row: dict[str, Any] = {"runs": len(own), "erasures": len(_by_case(own))}
        for name in COLUMNS:
            clusters = _clusters(own, lambda line, name=name: line["measures"].get(name))
            if clusters:
                row[name] = bootstrap(clusters)
        # Intact pictures of the erased prompts over those of the untouched model's. Of all erasures
        # together: of one, each is a few pictures.
        both = _clusters(own, lambda line: _intact(line["measures"]))
        if both:
            row["integrity"] = bootstrap(both, ratio_of_means)
        clusters = _clusters(own, lambda line: max(line["null_drift"].values()))
        row["null_drift"] = max(max(values) for values in clusters)
        for name in COSTS:
            clusters = _clusters(own, lambda line, name=name: line["cost"][name])
            row[name] = float(np.mean([np.mean(values) for values in clusters]))
        summary[method] = row
    return summary


def compare(
    lines: Sequence[Mapping[str, Any]], one: str, other: str, measure: str
) -> tuple[float, float, float] | None:
    """Mean difference of two methods on the same erasures and seeds, with its interval."""
    runs: dict[tuple[str, int], dict[str, float]] = {}
    for line in lines:
        value = line["measures"].get(measure)
        if value is not None:
            of = line["of"]
            runs.setdefault((of["case"], of["seed"]), {})[of["method"]] = value
    clusters: dict[str, list[float]] = {}
    for (case, _), values in runs.items():
        if one in values and other in values:
            clusters.setdefault(case, []).append(values[one] - values[other])
    return bootstrap(list(clusters.values())) if clusters else None


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, best H first; half the width of the interval behind each figure."""
    heads = ["method", *COLUMNS.values(), "null drift", "fwd-eq", "steps' worth", "runs"]
    rows = [heads, ["---"] * len(heads)]
    for method, row in sorted(summary.items(), key=lambda item: -_value(item[1], "H")):
        cells = [_cell(row.get(name), row["erasures"] > 1) for name in COLUMNS]
        costs = [f"{row['null_drift']:.1g}", f"{row['forward_equivalents']:.0f}"]
        costs += [f"{row['bare_steps']:.0f}", f"{row['runs']}"]
        rows.append([method, *cells, *costs])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(figure: Sequence[float] | None, several: bool) -> str:
    if figure is None:
        return "–"
    value, low, high = figure
    # Of one erasure nothing follows for another, so there is no interval.
    return f"{value:.2f} ±{(high - low) / 2:.2f}" if several else f"{value:.2f}"


def _value(row: Mapping[str, Any], name: str) -> float:
    return row[name][0] if name in row else 0.0


def _intact(measures: Mapping[str, Any]) -> tuple[float, float] | None:
    pair = measures.get("intact"), measures.get("intact_before")
    return None if None in pair else pair


def _by_case(lines: Lines) -> dict[str, list[Mapping[str, Any]]]:
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        cases.setdefault(line["of"]["case"], []).append(line)
    return cases


def _clusters(lines: Lines, of) -> list[list[float]]:
    clusters = [[of(line) for line in own] for own in _by_case(lines).values()]
    clusters = [[value for value in values if value is not None] for values in clusters]
    return [values for values in clusters if values]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=LINES)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--all", action="store_true", help="also erasures that are tuned on")
    asked = parser.parse_args()
    cache = Cache(asked.results)
    model = newest_model(cache)
    lines = [measured(line) for line in newest_lines(cache, model)]
    if not asked.all:
        reported = {case.text for case in REPORTED}
        lines = [line for line in lines if line["of"]["case"] in reported]
    summary = summarise(lines)
    text = table(summary)
    common = common_lines(lines)
    if 0 < len(common) < len(lines):
        text += f"\nOn the runs that every method has:\n\n{table(summarise(common))}"
    asked.folder.mkdir(parents=True, exist_ok=True)
    kept = {"model": model, "methods": rounded(summary)}
    (asked.folder / SUMMARY.name).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (asked.folder / TABLE.name).write_text(text, encoding="utf-8")
    plot(summary, asked.folder / PLOT.name)
    print(text)


if __name__ == "__main__":
    main()
