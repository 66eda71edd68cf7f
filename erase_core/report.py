"""The report a person reads, from an erasure's record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def report_text(record: Mapping[str, Any], notes: list[str] | None = None) -> str:
    """Plain text: what was erased, how far, what stayed, what it cost.

    Args:
        record: the record of an erasure.
        notes: more lines, for example what the host could not take into account.
    """
    lines = [*_headline(record), *_movement(record), *_staying(record), *_cost(record)]
    return "\n".join([*lines, *_warnings(record), *(notes or [])])


def _headline(record: Mapping[str, Any]) -> list[str]:
    settings = record["settings"]
    instead = repr(settings["alternative"]) if settings["alternative"] else "nothing"
    base = record["base"].get("name") or record["family"]
    return [f"Erased {settings['concept']!r}, replaced by {instead}, on {base}."]


def _movement(record: Mapping[str, Any]) -> list[str]:
    frozen = record["measures"]["moved_held_out"]
    sampled = record["measures"]["moved_sampled"]
    return [
        f"Guidance moved {frozen['overall']:.0%} of the way on held-out states "
        f"(high noise {frozen['high']:.0%}, middle {frozen['middle']:.0%}, "
        f"low {frozen['low']:.0%}), {sampled['overall']:.0%} on the edited model's own.",
        f"Change of the erased prompts: {_share(frozen['erased_change'])} of the prediction.",
    ]


def _staying(record: Mapping[str, Any]) -> list[str]:
    measures = record["measures"]
    lines = [f"Null prompt: exact, drift {_share(measures['null_drift'])}."]
    lines += [
        f"Negative prompt {entry['text']!r}: exact, drift {_share(entry['drift'])}."
        for entry in measures["negative_prompts"]
    ]
    for entry in measures["kept"]:
        kind = "exact" if entry["exact"] else "approximate"
        lines.append(f"Kept {entry['text']!r}: {kind}, drift {_share(entry['drift'])}.")
    lines.append(
        f"Prompts nobody named: drift {_share(measures['unnamed_drift'])} on average "
        f"of {len(measures['unnamed'])}."
    )
    left = record["subspace"]["share_left"]
    lines.append(f"Share of the edit left beside the exact prompts: {left:.0%}.")
    return lines


def _cost(record: Mapping[str, Any]) -> list[str]:
    return [
        f"{record['steps_done']} steps, {record['forward_equivalents']} forward-equivalents, "
        f"{record['seconds']:.0f} s; {record['matrices']} matrices, rank {record['rank']}."
    ]


def _warnings(record: Mapping[str, Any]) -> list[str]:
    lines = []
    if record["stopped_early"]:
        lines.append(f"Stopped early, after {record['steps_done']} steps.")
    if record["settings"]["eta"] > 0:
        lines.append(
            f"eta is {record['settings']['eta']:g}: naming the concept in a negative prompt now "
            "draws it. Leave it out of your negative prompts."
        )
    if record["measures"]["moved_held_out"]["overall"] < 0.8:
        lines.append(
            "The guidance moved less than 80 % of the way: traces may remain. Try the preset "
            "'thorough', fewer keep prompts or a lower protection."
        )
    return lines


def _share(value: float) -> str:
    return f"{value:.1e}" if value < 1e-3 else f"{value:.1%}"
