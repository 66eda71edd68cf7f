"""Two pictures of a summary: what is erased against what is kept, and how good against how dear."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

NEEDED = ("UA_intact", "IRA", "H", "seconds")
OURS = "ours/"
VARIANTS = ("-tuned", "-phrased")
MARKERS = "osD^vPX<>*hpd"
Summary = Mapping[str, Mapping[str, Any]]


def plot(summary: Summary, path: Path) -> None:
    """Write an SVG of the methods that have all that it shows; nothing where none has.

    Of a method's variants (tuned, phrased) it shows the one with the highest H, or the marks would
    hide each other. Marks are means, lines their 95 % intervals over the erasures.
    """
    methods = {
        name: row for name, row in summary.items() if all(row.get(n) is not None for n in NEEDED)
    }
    methods = _best_variants(methods)
    if not methods:
        return
    with matplotlib.rc_context({"svg.hashsalt": "erasure", "svg.fonttype": "none"}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        kept, cost = figure.subplots(1, 2)
        for number, (name, row) in enumerate(sorted(methods.items(), key=_best_first)):
            look = _look(name, number)
            _mark(kept, row["UA_intact"], row["IRA"], look)
            _mark(cost, [row["seconds"]] * 3, row["H"], look)
        kept.set(xlabel="erased, and the picture whole", ylabel="same kind kept, of before")
        kept.set(xlim=(0, 1), ylim=(min(0.9, kept.get_ylim()[0]), max(1.02, kept.get_ylim()[1])))
        cost.set(xlabel="seconds on one core", ylabel="H", xscale="log", ylim=(0, 1))
        cost.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        figure.legend(*cost.get_legend_handles_labels(), loc="outside right upper", frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _best_variants(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """Of ``uce``, ``uce-tuned``, ``uce-phrased`` and ``uce-phrased-tuned`` one, and so on."""
    chosen: dict[str, str] = {}
    for name, _ in sorted(summary.items(), key=_best_first):
        plain = name
        for ending in VARIANTS:
            plain = plain.removesuffix(ending)
        chosen.setdefault(plain, name)
    return {name: summary[name] for name in chosen.values()}


def _best_first(item: tuple[str, Mapping[str, Any]]) -> float:
    return -item[1]["H"][0]


def _look(name: str, number: int) -> dict[str, Any]:
    colour = "tab:red" if name.startswith(OURS) else "tab:gray"
    return {"marker": MARKERS[number % len(MARKERS)], "color": colour, "label": name}


def _mark(axes: Axes, across: list[float], up: list[float], look: dict[str, Any]) -> None:
    (x, *x_ends), (y, *y_ends) = across, up
    axes.errorbar(
        x,
        y,
        xerr=[[abs(x - x_ends[0])], [abs(x_ends[1] - x)]],
        yerr=[[abs(y - y_ends[0])], [abs(y_ends[1] - y)]],
        **look,
        linewidth=0.8,
        linestyle="none",
    )
    axes.spines[["top", "right"]].set_visible(False)
