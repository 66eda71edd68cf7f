"""The measures: plain functions of verdicts, features and pictures.

Names follow UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846). Of an erased object, other
objects are in-domain and styles cross-domain; of an erased style it is the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SHARED = "seconds of shared states"  # a note of runs that another sampled the states for
NUMBERS = ("change", "distance", "distance_before")  # of a picture; all else are flags


def nearest_distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean distances (n, m) of points (n, d) and others (m, d)."""
    squared = (points**2).sum(1)[:, None] + (others**2).sum(1) - 2 * points @ others.T
    return np.sqrt(squared.clip(0))


def neighbourhood_radii(real: np.ndarray, k: int) -> np.ndarray:
    """Distance (n,) of each real feature (n, d) to its k-th nearest other one."""
    distances = nearest_distances(real, real)
    np.fill_diagonal(distances, np.inf)
    return np.partition(distances, k - 1, axis=1)[:, k - 1]


def inside_manifold(
    features: np.ndarray, real: np.ndarray, radii: np.ndarray | float
) -> np.ndarray:
    """Which features (n, d) lie within the radius of a real one: bool (n,).

    With :func:`neighbourhood_radii` the mean is the precision of Kynkäänniemi et al. 2019, arXiv
    1904.06991.
    """
    return (nearest_distances(features, real) <= radii).any(1)


def share(flags: Sequence[bool | float]) -> float | None:
    """Mean, or None of nothing."""
    return float(np.mean(flags)) if len(flags) else None


def relative(after: float | None, before: float | None) -> float | None:
    """``after / before``; None where there was nothing to lose."""
    return after / before if after is not None and before else None


def harmonic_mean(values: Sequence[float]) -> float:
    """0 as soon as one of them is 0; values above 1 count as 1, so none makes up for another."""
    values = [min(value, 1.0) for value in values]
    return len(values) / sum(1 / value for value in values) if min(values) > 0 else 0.0


def mean_of_means(means: np.ndarray) -> np.ndarray:
    """Of erasures' means (..., erasures, columns): (...)."""
    return means.mean((-2, -1))


def ratio_of_means(means: np.ndarray) -> np.ndarray:
    """Of (..., erasures, 2): what is left of the second column in the first, over all."""
    return means[..., 0].mean(-1) / means[..., 1].mean(-1)


def bootstrap(
    clusters: Sequence[Sequence[float] | Sequence[tuple[float, ...]]],
    statistic: Callable[[np.ndarray], np.ndarray] = mean_of_means,
    draws: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A statistic of the clusters' means and its 95 % interval.

    Erasures are drawn with replacement, and within each its seeds: pictures of one run aren't
    independent, so they are never drawn one by one.

    Args:
        clusters: the values of each erasure, one for each seed; or rows of several.
        statistic: of the erasures' means, (draws, erasures, columns) to (draws,).

    Returns:
        The value, the 2.5th and the 97.5th percentile.

    Raises:
        ValueError: no values.
    """
    tables = [np.asarray(values, dtype=float) for values in clusters if len(values)]
    if not tables:
        raise ValueError("bootstrap needs at least one value.")
    tables = [table.reshape(len(table), -1) for table in tables]
    value = statistic(np.array([[table.mean(0) for table in tables]]))[0]
    generator, count = np.random.default_rng(seed), len(tables)
    chosen = generator.integers(count, size=(draws, count))
    means = np.empty((draws, count, tables[0].shape[1]))
    for number, table in enumerate(tables):
        here = chosen == number
        seeds = generator.integers(len(table), size=(here.sum(), len(table)))
        means[here] = table[seeds].mean(1)
    low, high = np.percentile(statistic(means), (2.5, 97.5))
    return float(value), float(low), float(high)


def measures(groups: Mapping[str, Mapping[str, Sequence]], kind: str) -> dict[str, float | None]:
    """The figures of one run from the verdicts on each of its pictures.

    Args:
        groups: by group of questions, lists with one entry a picture: ``name`` and ``style``
            (drawn as asked; ``style`` None where none was asked), ``gone`` (not classified as the
            concept), ``distance`` (to the nearest real picture, in features) and ``intact``
            (whether that is near enough); the same with ``_before`` of the untouched model;
            ``replaced`` (classified as its alternative; None without one) and ``change`` (root mean
            square difference from the untouched model's picture, 0..1).
        kind: "object" or "style".

    Returns:
        UA, UA_intact, intact, replaced, IRA and CRA (relative to the untouched model), crossing
        (the other domain's label on the erased prompts' pictures, relative; None for objects that
        nothing replaces), and for every other
        group the picture change, the distance to real pictures relative to the untouched model's,
        and either the share without the concept, where it is asked for,
        or the share of right pictures relative to the untouched model.
    """
    own, cross = ("name", "style") if kind == "object" else ("style", "name")
    erased, others = groups["erased"], groups["others"]
    found: dict[str, float | None] = {
        "UA": share(erased["gone"]),
        "UA_intact": share(
            [g and i for g, i in zip(erased["gone"], erased["intact"], strict=True)]
        ),
        "UA_before": share(erased["gone_before"]),
        "intact": share(erased["intact"]),
        "intact_before": share(erased["intact_before"]),
        "replaced": share(_asked(erased["replaced"])),
        "IRA": _retained(others, own),
        "CRA": _retained(others, cross),
        # An empty page, what the removal of an object leads to, has no style.
        "crossing": _retained(erased, cross)
        if kind == "style" or _asked(erased["replaced"])
        else None,
        "accuracy_before": share(_asked(others["name_before"])),
    }
    found["H"] = score(found)
    for group, verdicts in groups.items():
        label = group.replace(" ", "_")
        found[f"{label}_change"] = share(verdicts["change"])
        found[f"{label}_distance"] = relative(
            share(verdicts["distance"]), share(verdicts["distance_before"])
        )
        if group not in ("erased", "others"):
            if None in verdicts["gone"]:
                found[f"{label}_right"] = _retained(verdicts, "both")
            else:  # asks for the concept
                found[f"{label}_gone"] = share(verdicts["gone"])
                found[f"{label}_gone_before"] = share(verdicts["gone_before"])
    return found


def score(found: Mapping[str, float | None]) -> float | None:
    """What settings are chosen by: the harmonic mean of UA_intact, IRA and CRA."""
    parts = [found[name] for name in ("UA_intact", "IRA", "CRA")]
    return None if any(part is None for part in parts) else harmonic_mean(parts)


def _asked(flags: Sequence) -> list:
    return [flag for flag in flags if flag is not None]


def _retained(verdicts: Mapping[str, Sequence], label: str) -> float | None:
    after, before = (_labels(verdicts, label, tail) for tail in ("", "_before"))
    return relative(share(_asked(after)), share(_asked(before)))


def _labels(verdicts: Mapping[str, Sequence], label: str, tail: str) -> Sequence:
    if label != "both":
        return verdicts[label + tail]
    pairs = zip(verdicts[f"name{tail}"], verdicts[f"style{tail}"], strict=True)
    return [name and style is not False for name, style in pairs]


def rounded(value: object, digits: int = 4) -> object:
    """The same JSON value with its numbers cut to a few significant digits."""
    if isinstance(value, Mapping):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry, digits) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def packed(verdicts: Mapping[str, list]) -> dict[str, Any]:
    """Flags as a text of 1, 0 and - each, so that a line stays short."""
    signs = {True: "1", False: "0", None: "-"}
    return {
        name: values if name in NUMBERS else "".join(signs[value] for value in values)
        for name, values in verdicts.items()
    }


def measured(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line with its measures, always taken anew from the verdicts that it holds.

    The time that another run spent on states of this one is its own as well.
    """
    groups = {group: unpacked(verdicts) for group, verdicts in line["groups"].items()}
    found = {**line, "measures": measures(groups, line["of"]["kind"])}
    shared = line.get("notes", {}).get(SHARED)
    if shared:
        seconds = line["cost"]["seconds"] + shared
        steps = seconds / line["cost"]["bare_step_seconds"]
        found["cost"] = {**line["cost"], "seconds": seconds, "bare_steps": steps}
    return found


def unpacked(verdicts: Mapping[str, Any]) -> dict[str, list]:
    """The way back from a line to flags."""
    values = {"1": True, "0": False, "-": None}
    return {
        name: kept if name in NUMBERS else [values[sign] for sign in kept]
        for name, kept in verdicts.items()
    }
