"""How many keep prompts are exact, at which cost: ``python -m benchmarks.unnamed.exactness``.

The same four keep prompts on both models, without and with a negative prompt, at several values of
the room that they must leave to the concept. The instant form, so nothing is drawn: how far the
concept moves and how much other words change are of keys and values.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.pack import load_pack, use_host

use_host()
load_pack()
from concept_surgery.erase_core import SubspaceError, erase, preset_settings  # noqa: E402
from concept_surgery.erase_core.artefact.verdict import EXACT  # noqa: E402

from benchmarks.engine import ENGINE  # noqa: E402
from benchmarks.erasure.results import RESULTS, Cache  # noqa: E402
from benchmarks.unnamed.worlds import identity, open_world  # noqa: E402

LINES, TABLE = RESULTS / "exactness.jsonl", RESULTS / "exactness.md"
ROOMS = (0.25, 0.15, 0.1, 0.03)
NEGATIVES = {
    "none": (),
    "short": ("blurry, low quality",),
    "long": (
        "lowres, bad anatomy, bad hands, text, error, missing fingers, cropped, worst quality, "
        "low quality, jpeg artifacts, signature, watermark, blurry",
    ),
}
# Two keep prompts that are close to the concept, and two that aren't.
CASES = {
    "emoji": {
        "cat": ("tiger", "rabbit", "lemon", "rocket"),
        "cat => dog": ("tiger", "rabbit", "lemon", "rocket"),
        "pear => cherry": ("apple", "lemon", "cat", "umbrella"),
    },
    "icons": {
        "shark": ("whale", "fish", "lemon", "rocket"),
        "shark => dolphin": ("whale", "fish", "lemon", "rocket"),
        "beer => wine": ("cup", "cheese", "cat", "umbrella"),
    },
}


def run(worlds: Iterable[str]) -> None:
    """Measure what isn't measured yet."""
    from benchmarks.unnamed.methods import _language

    cache = Cache(LINES)
    for name in worlds:
        world = open_world(name)
        asked = [(c, n, room) for c in CASES[name] for n in NEGATIVES for room in ROOMS]
        for case, negative, room in asked:
            of = {"world": name, "model": identity(name), "case": case, "negative": negative}
            of |= {"room": room, "keep": list(CASES[name][case]), "engine": ENGINE}
            if cache.get(of) is not None:
                continue
            settings = preset_settings(
                "instant",
                concepts=case,
                keep=tuple(f"a picture of a {word}" for word in CASES[name][case]),
                negative_prompts=NEGATIVES[negative],
                keep_room=room,
                resolution=64,
            )
            try:
                with world.denoiser() as denoiser:
                    found = _noted(erase(settings, denoiser, _language()).record)
            except SubspaceError as error:
                found = {"refused": str(error)}
            cache.add(of, found)
            print(name, case, negative, room, found.get("exact", "refused"), flush=True)


def _noted(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = record["measures"]["kept"]
    exact = [one for one in kept if one["exact"]]
    return {
        "exact": sum(one["drift"] <= EXACT for one in exact),
        "called_exact": len(exact),
        "worst_exact": max((one["drift"] for one in exact), default=0.0),
        "worst_other": max((one["drift"] for one in kept if not one["exact"]), default=0.0),
        "moved": record["concepts"][0]["keys_and_values_moved"],
        "others": record["others"]["change"],
    }


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """By model, negative prompt and room, over the cases."""
    lines = [line for line in lines if line["of"]["engine"] == ENGINE]
    head = ("model", "negative prompt", "room", "exact of 12", "worst of these", "moved")
    head += ("other words change", "at most", "refused")
    rows: list[Sequence[str]] = [head, ["---"] * len(head)]
    for world in CASES:
        for negative in NEGATIVES:
            for room in ROOMS:
                wanted = {"world": world, "negative": negative, "room": room}
                group = [one for one in lines if wanted.items() <= one["of"].items()]
                if group:
                    rows.append((world, negative, f"{room:g}", *_row(group)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(group: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    done = [one for one in group if "refused" not in one]
    if not done:
        return ("", "", "", "", "", str(len(group)))
    mean = {name: sum(one[name] for one in done) / len(done) for name in ("moved", "others")}
    return (
        str(sum(one["exact"] for one in done)),
        f"{max(one['worst_exact'] for one in done):.0e}",
        f"{mean['moved']:.3f}",
        f"{mean['others']:.3f}",
        f"{max(one['others'] for one in done):.3f}",
        str(len(group) - len(done)),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", nargs="*", default=[*CASES], choices=[*CASES])
    parser.add_argument("--table", type=Path, default=TABLE)
    chosen = parser.parse_args()
    run(chosen.worlds)
    chosen.table.write_text(table(Cache(LINES)), encoding="utf-8")


if __name__ == "__main__":
    main()
