"""From lines to tables: ``python -m benchmarks.unnamed.report``."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.erasure.results import RESULTS, Cache

LINES = RESULTS / "unnamed.jsonl"
SUMMARY, TABLE = RESULTS / "unnamed.json", RESULTS / "unnamed.md"
OURS, BROKEN = "ours/", "broken: "
BEST = "ours/balanced"  # the default, which the peers are held against
GROUPS = ("all", "removals", "replacements", "styles")
WITHIN = 1.5  # how far a figure may be from what was measured, as a factor either way
UNKNOWN = "–"
COLUMNS = {
    "gone": "gone",
    "replaced": "replaced",
    "kept_harshest": "kept, harshest ten",
    "kept_worst": "the worst erasure",
    "kept_rest": "kept, the rest",
    "kv_outside": "keys and values, outside",
    "kv_null": "empty prompt",
    "H": "H",
    "forward_equivalents": "fwd-eq",
    "runs": "runs",
}
# What the engine says of an erasure, and what was measured of the same kind.
FIGURES = {
    "guidance": ("unnamed_drift", "guidance_60"),
    "keys and values": ("others_change", "kv_outside"),
    "keys and values, for the guidance": ("others_change", "guidance_60"),
}
LEGEND = """\
# What an erasure leaves of things that nobody named

Two small models that draw, the emoji of `benchmarks/emoji` and the icons of `benchmarks/icons`. Of
each erasure the ten things are drawn whose keys and values change most, and 24 others. No setting
was chosen on these erasures, and nothing at all on the icons.

- **gone**: pictures of the concept that no longer show it. **replaced**: those that show what was
  to take its place.
- **kept, harshest ten**: of the pictures of the ten things that were right before, those that still
  are; the mean over erasures, and **the worst erasure**. **kept, the rest**: of the other things.
- **keys and values, outside**: their relative change in things that no caption names.
- **H**: harmonic mean of "gone" and "kept, harshest ten".
- **fwd-eq**: evaluations of the denoiser for one picture, a backward pass counting two.
- Nobody has keep prompts; UCE and RECE, which solve nothing without, preserve the empty prompt.
"""
Line = Mapping[str, Any]


def newest(lines: Iterable[Line]) -> list[Line]:
    """The last line of each erasure by each method on each model."""
    chosen = {}
    for line in lines:
        of = line["of"]
        chosen[of["world"], of["case"], of["method"]] = line
    return list(chosen.values())


def group_of(line: Line) -> str:
    """Which of the groups a line is of; "ten together" for ten at once."""
    of = line["of"]
    if "\n" in of["case"]:
        return "ten together"
    if of["kind"] == "style":
        return "styles"
    return "replacements" if "=>" in of["case"] else "removals"


def harmonic(one: float, other: float) -> float:
    """Harmonic mean; 0 where either is."""
    return 2 * one * other / (one + other) if one and other else 0.0


def summary_of(lines: Sequence[Line]) -> dict[str, Any]:
    """The columns of one row; refusals are counted and left out of the means."""
    measured = [line for line in lines if "refused" not in line]
    row: dict[str, Any] = {"runs": len(measured), "refused": len(lines) - len(measured)}
    for name in ("gone", "replaced", "kept_harshest", "kept_rest", "kv_outside", "kv_null"):
        row[name] = _mean([line.get(name) for line in measured])
    row["forward_equivalents"] = _mean([line["forward_equivalents"] for line in measured])
    worst = min(measured, key=lambda line: line["kept_harshest"], default=None)
    row["kept_worst"] = worst and worst["kept_harshest"]
    row["worst_case"] = worst and worst["of"]["case"]
    row["H"] = _mean([harmonic(line["gone"], line["kept_harshest"]) for line in measured])
    return row


def summarise(lines: Iterable[Line]) -> dict[str, Any]:
    """Everything that the tables say, by model."""
    every, found = newest(lines), {}
    for world in dict.fromkeys(line["of"]["world"] for line in every):
        own = [line for line in every if line["of"]["world"] == world]
        plain = [line for line in own if not line["of"]["method"].startswith(BROKEN)]
        single = [line for line in plain if group_of(line) != "ten together"]
        found[world] = {
            "groups": {group: _by_method(single, group) for group in GROUPS},
            "ten together": _ten([line for line in plain if line not in single]),
            "honesty": honesty(own),
            "against the best peer": against_peers(single),
        }
    return found


def _by_method(lines: Sequence[Line], group: str) -> dict[str, Any]:
    chosen = [line for line in lines if group in ("all", group_of(line))]
    return _split(chosen, summary_of)


def _split(lines: Sequence[Line], what: Callable[[list[Line]], Any]) -> dict[str, Any]:
    methods = dict.fromkeys(line["of"]["method"] for line in lines)
    return {m: what([line for line in lines if line["of"]["method"] == m]) for m in methods}


def _ten(lines: Sequence[Line]) -> dict[str, Any]:
    found = _split(lines, summary_of)
    for line in lines:
        each = line.get("gone_each") or {}
        least = min(each.items(), key=lambda item: item[1], default=None)
        found[line["of"]["method"]] |= {"said": line.get("refused", ""), "least_gone": least}
    return found


def honesty(lines: Iterable[Line]) -> dict[str, Any]:
    """By kind of figure and method: the engine's figure over what was measured."""
    found: dict[str, Any] = {}
    for kind, (said, measured) in FIGURES.items():
        ratios: dict[str, list[float]] = {}
        for line in lines:
            ratio = _ratio(line, said, measured)
            if ratio is not None:
                ratios.setdefault(line["of"]["method"], []).append(ratio)
        found[kind] = {method: _ratios(values) for method, values in ratios.items()}
    return found


def _ratio(line: Line, said: str, measured: str) -> float | None:
    notes = line.get("notes", {})
    figure, true = notes.get(said), notes.get(measured, line.get(measured))
    if said == "unnamed_drift" and notes.get("unnamed_of") != "guidance":
        return None
    return figure / true if figure is not None and true else None


def _ratios(values: Sequence[float]) -> dict[str, Any]:
    within = [1 / WITHIN <= value <= WITHIN for value in values]
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "within": sum(within) / len(within),
        "runs": len(values),
    }


def against_peers(lines: Iterable[Line]) -> dict[str, Any]:
    """For each erasure H of ours and of the peer that is best there."""
    by_case: dict[str, dict[str, float]] = {}
    for line in lines:
        if "refused" not in line:
            of = line["of"]
            h = harmonic(line["gone"], line["kept_harshest"])
            by_case.setdefault(of["case"], {})[of["method"]] = h
    found = {}
    for case, scores in by_case.items():
        peers = {m: h for m, h in scores.items() if not m.startswith(OURS)}
        if BEST in scores and peers:
            best = max(peers, key=lambda method: peers[method])
            found[case] = {"ours": scores[BEST], "best": best, "peer": peers[best]}
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _shown(name: str, value: Any) -> str:
    if value is None:
        return UNKNOWN
    if name in ("runs", "forward_equivalents"):
        return f"{value:.0f}"
    return f"{value:.1g}" if name == "kv_null" else f"{value:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _methods_table(found: Mapping[str, Any]) -> str:
    ranked = sorted(found.items(), key=lambda item: -(item[1]["H"] or 0))
    rows = [[m, *(_shown(name, row[name]) for name in COLUMNS)] for m, row in ranked]
    return _table(["method", *COLUMNS.values()], rows)


def text_of(summary: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    parts = [LEGEND]
    for world, found in summary.items():
        parts.append(f"## The {world}")
        for group in GROUPS:
            if found["groups"][group]:
                title = "All erasures" if group == "all" else group.capitalize()
                parts += [f"### {title}", _methods_table(found["groups"][group])]
        if found["ten together"]:
            parts += ["### Ten removals together", _ten_text(found["ten together"])]
        parts += ["### Does the report say what happened?", _honesty_text(found["honesty"])]
        parts += ["### Against the best peer of each erasure"]
        parts += [_peers_text(found["against the best peer"])]
    return "\n".join(parts)


def _ten_text(found: Mapping[str, Any]) -> str:
    told = [f"{method} refused: {row['said']}" for method, row in found.items() if row["said"]]
    least = [
        f"{method} leaves most of {row['least_gone'][0]!r}: {row['least_gone'][1]:.2f} gone."
        for method, row in found.items()
        if row["least_gone"]
    ]
    return "\n".join([_methods_table(found), *told, *least, ""])


def _honesty_text(found: Mapping[str, Any]) -> str:
    head = ["figure", "method", "median", "least", "most", f"within {WITHIN:g} times", "runs"]
    rows = []
    for kind, methods in found.items():
        for method, row in methods.items():
            values = [_shown(n, row[n]) for n in ("median", "least", "most", "within", "runs")]
            rows.append([kind, method, *values])
    said = "What the engine reports, over what was measured of sixty things or of all of them.\n"
    return f"{said}\n{_table(head, rows)}"


def _peers_text(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    ranked = sorted(found.items(), key=lambda item: item[1]["ours"] - item[1]["peer"])
    rows = []
    for case, row in ranked:
        both = [_shown("H", row[name]) for name in ("ours", "peer")]
        name = case.replace("\n", ", ")
        rows.append([name, both[0], row["best"], both[1], f"{row['ours'] - row['peer']:+.2f}"])
    wins = sum(row["ours"] > row["peer"] for row in found.values())
    ties = sum(row["ours"] == row["peer"] for row in found.values())
    said = f"{BEST} is ahead in {wins} of {len(found)} erasures and level in {ties}, by H.\n"
    return f"{said}\n{_table(['erasure', BEST, 'best peer', 'its H', 'difference'], rows)}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=LINES)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    summary = summarise(Cache(chosen.results))
    (chosen.folder / TABLE.name).write_text(text_of(summary), encoding="utf-8")
    text = json.dumps(summary, indent=1, sort_keys=True)
    (chosen.folder / SUMMARY.name).write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
