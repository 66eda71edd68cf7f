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
MEMORY = RESULTS / "erasure_memory.json"
BEST = "ours/balanced"  # the default, which the others are held against
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
UNKNOWN = "–"
LEGEND = """\
Shares of pictures, means over the erasures; ± half of the 95 % interval over erasures and their
seeds. *Relative*: over the untouched model's, so that it can exceed 1.

- **UA**: erased prompts whose picture no longer shows the concept; **intact**: and lies near real
  pictures. **integrity**: intact pictures of the erased prompts, relative. **replaced**: shows the
  alternative, where one was named.
- **synonyms**, **from a picture**: the concept is also gone from prompts with another word for it,
  and from pictures redrawn from a real one that shows it (img2img).
- **IRA**, **CRA**: pictures of things and styles that the run never named, right in the erased
  concept's own domain (of an object: which object) and in the other, relative. **change**: root
  mean square difference of their pixels, same seed. **crossing**: the other domain's label on the
  erased prompts' pictures, relative.
- **left out**, **kept**, **negative**: right pictures of pairs of object and style that the model
  was never trained on, of the keep prompts, and of prompts with the concept in the negative prompt,
  relative.
- **H**: harmonic mean of "UA, intact", IRA and CRA.
- **null drift**: change of the null prompt's prediction, relative, the worst over sigma and runs.
  **fwd-eq**: evaluations of the denoiser for one picture, a backward pass counting two.
  **steps' worth**: time over that of a bare forward and backward. **memory**: peak while training
  over plain inference.
"""
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


def table(summary: Mapping[str, Mapping[str, Any]], memory: Mapping[str, float]) -> str:
    """Markdown, best H first; half the width of the interval behind each figure.

    Args:
        memory: peak in training over plain inference, of the methods of which it is known.
    """
    heads = ["method", *COLUMNS.values(), "null drift", "fwd-eq", "steps' worth", "memory", "runs"]
    rows = []
    for method, row in sorted(summary.items(), key=_best_first):
        cells = [_cell(row.get(name), row["erasures"] > 1) for name in COLUMNS]
        costs = [f"{row['null_drift']:.1g}", f"{row['forward_equivalents']:.0f}"]
        costs += [f"{row['bare_steps']:.0f}"]
        costs += [f"{memory[method]:.2f}" if method in memory else UNKNOWN, f"{row['runs']}"]
        rows.append([method, *cells, *costs])
    return markdown(heads, rows)


def seeds_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: each method's H by seed, and how far it is behind :data:`BEST` on common runs."""
    seeds = sorted({line["of"]["seed"] for line in lines})
    rows = []
    for method, row in sorted(summarise(lines).items(), key=_best_first):
        own = [line for line in lines if line["of"]["method"] == method]
        cells = [_of_seed(own, seed, row["erasures"]) for seed in seeds]
        rows.append([method, *cells, "" if method == BEST else _behind(lines, method)])
    return markdown(["H", *(f"seed {seed}" for seed in seeds), f"behind {BEST}"], rows)


def _behind(lines: Sequence[Mapping[str, Any]], method: str) -> str:
    """Mean difference of H from :data:`BEST`, with its interval."""
    found = compare(lines, BEST, method, "H")
    if found is None:
        return UNKNOWN
    value, low, high = (round(figure, 2) + 0.0 for figure in found)  # + 0: no minus before a zero
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _of_seed(lines: Lines, seed: int, erasures: int) -> str:
    """Mean H of a seed; how many erasures it has, where some are missing."""
    values = [line["measures"].get("H") for line in lines if line["of"]["seed"] == seed]
    values = [value for value in values if value is not None]
    if not values:
        return UNKNOWN
    some = "" if len(values) == erasures else f" (of {len(values)})"
    return f"{np.mean(values):.2f}{some}"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    every = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in every)


def known_memory(path: Path = MEMORY) -> dict[str, float]:
    """Peak in training over plain inference by method, from ``benchmarks.erasure.memory``."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {method: peaks["ratio"] for method, peaks in found.items()}


def _best_first(item: tuple[str, Mapping[str, Any]]) -> float:
    return -_value(item[1], "H")


def _cell(figure: Sequence[float] | None, several: bool) -> str:
    if figure is None:
        return UNKNOWN
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
    summary, memory = summarise(lines), known_memory()
    parts = [LEGEND, table(summary, memory)]
    common = common_lines(lines)
    if 0 < len(common) < len(lines):
        parts += ["On the runs that every method has:\n", table(summarise(common), memory)]
    if len({line["of"]["seed"] for line in lines}) > 1:
        parts += ["By seed, and how far behind the default on the runs that both have:\n"]
        parts += [seeds_table(lines)]
    text = "\n".join(parts)
    asked.folder.mkdir(parents=True, exist_ok=True)
    kept = {"model": model, "methods": rounded(summary)}
    (asked.folder / SUMMARY.name).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (asked.folder / TABLE.name).write_text(text, encoding="utf-8")
    plot(summary, asked.folder / PLOT.name)
    print(text)


if __name__ == "__main__":
    main()
