"""From lines to a summary, a table and two plots: ``python -m benchmarks.erasure.report``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from math import log10
from pathlib import Path
from typing import Any

from benchmarks.erasure.cases import REPORTED
from benchmarks.erasure.metrics import bootstrap, measured, ratio_of_means, rounded
from benchmarks.erasure.results import LINES, RESULTS, Cache

SUMMARY, TABLE = RESULTS / "erasure.json", RESULTS / "erasure.md"
PLOTS = {"retention": RESULTS / "erasure_retention.svg", "cost": RESULTS / "erasure_cost.svg"}
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
            row[name] = bootstrap(clusters)[0]
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


def scatter(
    points: Sequence[tuple[str, tuple[float, float, float], tuple[float, float, float]]],
    across: str,
    up: str,
    logarithmic: bool = False,
) -> str:
    """An SVG: a mark with its intervals for each method. Across, then up."""

    def place(value: float) -> float:
        return log10(max(value, 0.5)) if logarithmic else value

    lows = [place(x[1]) for _, x, _ in points]
    highs = [place(x[2]) for _, x, _ in points]
    left, right = min(lows), max(highs)
    right, bottom, top = max(right, left + 1e-3), min(y[1] for *_, y in points), 1.0
    bottom, top = min(bottom, top - 1e-3), max(top, *(y[2] for *_, y in points))

    def x_of(value: float) -> float:
        return 70 + 480 * (place(value) - left) / (right - left)

    def y_of(value: float) -> float:
        return 360 - 320 * (value - bottom) / (top - bottom)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 420" font-family="sans-serif"'
        ' font-size="12">',
        '<rect width="720" height="420" fill="white"/>',
        '<path d="M70 360H560M70 360V30" stroke="black" fill="none"/>',
        f'<text x="315" y="400" text-anchor="middle">{across}</text>',
        f'<text x="20" y="195" text-anchor="middle" transform="rotate(-90 20 195)">{up}</text>',
    ]
    for share in (0, 0.5, 1):
        at = left + share * (right - left)
        label = f"{10**at:.0f}" if logarithmic else f"{at:.2f}"
        parts.append(
            f'<text x="{70 + 480 * share:.0f}" y="378" text-anchor="middle">{label}</text>'
        )
        height = bottom + share * (top - bottom)
        parts.append(
            f'<text x="62" y="{y_of(height) + 4:.0f}" text-anchor="end">{height:.2f}</text>'
        )
    for number, (name, x, y) in enumerate(points):
        colour = f"hsl({number * 360 // len(points)} 70% 40%)"
        parts.append(
            f'<g stroke="{colour}" fill="{colour}"><path d="M{x_of(x[1]):.1f} {y_of(y[0]):.1f}'
            f'H{x_of(x[2]):.1f}M{x_of(x[0]):.1f} {y_of(y[1]):.1f}V{y_of(y[2]):.1f}"/>'
            f'<circle cx="{x_of(x[0]):.1f}" cy="{y_of(y[0]):.1f}" r="4"/>'
            f'<text stroke="none" x="570" y="{40 + 16 * number}">{name}</text></g>'
        )
    return "\n".join([*parts, "</svg>\n"])


def plots(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Efficacy against retention, and quality against cost."""
    whole = {
        m: row for m, row in summary.items() if all(n in row for n in ("UA_intact", "IRA", "H"))
    }
    if not whole:
        return {}
    retention = [(m, row["UA_intact"], row["IRA"]) for m, row in whole.items()]
    cost = [(m, (row["forward_equivalents"],) * 3, row["H"]) for m, row in whole.items()]
    return {
        "retention": scatter(retention, "erased and intact (UA)", "other objects kept (IRA)"),
        "cost": scatter(cost, "forward-equivalents", "H", logarithmic=True),
    }


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
    for name, drawing in plots(summary).items():
        (asked.folder / PLOTS[name].name).write_text(drawing, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
