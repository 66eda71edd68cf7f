"""Whether the report says what the judge sees: ``python -m benchmarks.unnamed.agreement``.

The judge's words were settled before any verdict was held against them, with the same bounds for
what must go and for what must stay:

- a concept is *gone* if at least nine of ten pictures that showed it no longer do, *not gone* if
  fewer than half, and else *traces* of it remain;
- the rest is *kept* if at least nine of ten pictures that were right still are, *ruined* if fewer
  than half, and else *harmed*: the worse counts of the ten things whose keys and values change most
  and of the others.

A verdict agrees if all that it says is what the judge says. Of a ruined model it says nothing about
the concept.

Stored are the 28 erasures of each model with both presets, those that were broken on purpose, and
here two more of each with the ridge turned up until traces stay and down until little else does.
The thresholds of the verdict were chosen on the emoji; on the icons they are only reported.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.pack import load_pack, use_host

use_host()
load_pack()
from concept_surgery.erase_core import erase, preset_settings  # noqa: E402
from concept_surgery.erase_core.artefact import verdict  # noqa: E402

from benchmarks.engine import ENGINE  # noqa: E402
from benchmarks.erasure.results import RESULTS, Cache  # noqa: E402
from benchmarks.unnamed.cases import Case  # noqa: E402

STORED, LINES = RESULTS / "unnamed.jsonl", RESULTS / "agreement.jsonl"
TABLE = RESULTS / "agreement.md"
MOST, LEAST = 0.9, 0.5
# From what leaves most of a concept to what leaves little of anything else.
PROTECTIONS = (3000.0, 500.0, 1e-4)
WEAK_AND_RUINED = {
    "emoji": (Case("cactus"), Case("pear => cherry")),
    "icons": (Case("castle"), Case("key => lock")),
}
SEED, RESOLUTION = 0, 64


@dataclass(frozen=True)
class Judged:
    """One erasure as the report puts it, and as the judge does.

    Attributes:
        said: "gone", "traces", "not gone" or nothing, and "kept", "harmed" or "ruined".
        seen: the same of the judge.
    """

    world: str
    name: str
    said: tuple[str, str]
    seen: tuple[str, str]

    @property
    def agrees(self) -> bool:
        """Whether all that is said is what is seen."""
        return all(word in ("", there) for word, there in zip(self.said, self.seen, strict=True))


def seen(found: Mapping[str, Any]) -> tuple[str, str]:
    """The judge's words for what was drawn."""
    gone, kept = found["gone"], min(found["kept_harshest"], found["kept_rest"])
    return (
        "gone" if gone >= MOST else "traces" if gone >= LEAST else "not gone",
        "kept" if kept >= MOST else "harmed" if kept >= LEAST else "ruined",
    )


def said(record: Mapping[str, Any]) -> tuple[str, str]:
    """The report's words for a record."""
    words = {verdict.GONE: "gone", verdict.TRACES: "traces", verdict.THERE: "not gone"}
    return (
        words.get(verdict.worst_outcome(record), ""),
        {"": "kept", "harm": "harmed", "ruin": "ruined"}[verdict.harm(record)],
    )


def record_of(line: Mapping[str, Any], sampled: bool) -> dict[str, Any]:
    """What the verdict reads of a record, of what a line of results keeps of it."""
    notes, of = line["notes"], line["of"]
    alternatives = [text.partition("=>")[2].strip() for text in of["case"].split("\n")]
    guidance = notes.get("guidance", notes["unnamed_drift"])
    moved = notes["moved"] if sampled else None
    return {
        "concepts": [
            {"text": "", "alternative": text, "keys_and_values_moved": share, "moved": moved}
            for text, share in zip(alternatives, notes["keys_and_values_moved"], strict=True)
        ],
        "settings": {"kind": of["kind"]},
        "measures": {
            "moved_held_out": None if moved is None else notes.get("held_out", {"overall": moved}),
            "unnamed_of": "guidance" if sampled else "keys and values",
            "unnamed_drift": notes["unnamed_drift"] if sampled else notes["others_change"],
            **({"unnamed_guidance": guidance} if sampled else {}),
            "kept": [],
            "unnamed": [],
        },
        "others": {"change": notes["others_change"]},
    }


def stored() -> Iterator[Judged]:
    """The erasures that were measured for other reasons, as far as they are today's."""
    for line in Cache(STORED):
        of, notes = line["of"], line.get("notes", {})
        if of["engine"] != ENGINE or "keys_and_values_moved" not in notes:
            continue
        record = record_of(line, notes["moved"] is not None)
        yield Judged(of["world"], _name(of), said(record), seen(line))


def weak_and_ruined() -> Iterator[Judged]:
    """Those that are measured here, judged by their words alone and by predictions, too."""
    for line in Cache(LINES):
        if line["of"]["engine"] == ENGINE:
            for sampled in (False, True):
                record = record_of(line, sampled)
                name = f"{_name(line['of'])}, {'sampled' if sampled else 'words alone'}"
                yield Judged(line["of"]["world"], name, said(record), seen(line))


def _name(of: Mapping[str, Any]) -> str:
    how = f"protection {of['protection']:g}" if "protection" in of else of["method"]
    return f"{of['case']}, {how}".replace("\n", ", ")


def run(worlds: Iterable[str]) -> None:
    """Measure what isn't measured yet, a line at a time."""
    from benchmarks.unnamed.methods import _language
    from benchmarks.unnamed.protocol import Untouched, measure
    from benchmarks.unnamed.run import _rounded
    from benchmarks.unnamed.worlds import identity, open_world

    cache = Cache(LINES)
    for name in worlds:
        world = open_world(name)
        untouched = Untouched(world)
        for protection in PROTECTIONS:
            for case in WEAK_AND_RUINED[name]:
                of = {
                    "world": name,
                    "model": identity(name),
                    "case": case.text,
                    "kind": case.kind,
                    "protection": protection,
                    "engine": ENGINE,
                }
                if cache.get(of) is not None:
                    continue
                settings = preset_settings(
                    "balanced",
                    concepts=case.text,
                    kind=case.kind,
                    seed=SEED,
                    resolution=RESOLUTION,
                    protection=protection,
                    steps=0,
                )
                with world.denoiser() as denoiser:
                    erasure = erase(settings, denoiser, _language())
                found = measure(world, case, erasure.edit(), untouched)
                line = {**_rounded(found), "notes": _noted(erasure.record)}
                line["drawing"] = world.drawing
                print(name, case.name, protection, seen(cache.add(of, line)), flush=True)


def _noted(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the verdict reads of a record, and a little more."""
    measures = record["measures"]
    return {
        "others_change": record["others"]["change"],
        "unnamed_drift": measures["unnamed_drift"],
        "guidance": measures["unnamed_guidance"],
        "moved": record["concepts"][0]["moved"],
        "held_out": measures["moved_held_out"],
        "sampled": measures["moved_sampled"],
        "keys_and_values_moved": [c["keys_and_values_moved"] for c in record["concepts"]],
    }


def table(judged: Iterable[Judged]) -> str:
    """How often they agree, and where they don't."""
    judged = list(judged)
    lines = ["| model | erasures | agree | share |", "| --- | --- | --- | --- |"]
    for world in sorted({one.world for one in judged}):
        own = [one for one in judged if one.world == world]
        right = sum(one.agrees for one in own)
        lines.append(f"| {world} | {len(own)} | {right} | {right / len(own):.1%} |")
    pairs = Counter((one.world, *one.said, *one.seen) for one in judged)
    lines += ["", "| model | the report says | the judge says | erasures |"]
    lines.append("| --- | --- | --- | --- |")
    for (world, *words), count in sorted(pairs.items()):
        lines.append(f"| {world} | {_joined(words[:2])} | {_joined(words[2:])} | {count} |")
    lines += ["", "Where they differ:", ""]
    lines += [
        f"- {one.world}, {one.name}: says {_joined(one.said)}; is {_joined(one.seen)}"
        for one in judged
        if not one.agrees
    ]
    return "\n".join(lines) + "\n"


def _joined(words: Iterable[str]) -> str:
    return ", ".join(word for word in words if word)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", nargs="*", default=[*WEAK_AND_RUINED])
    parser.add_argument("--table", type=Path, default=TABLE)
    chosen = parser.parse_args()
    run(chosen.worlds)
    chosen.table.write_text(table([*stored(), *weak_and_ruined()]), encoding="utf-8")


if __name__ == "__main__":
    main()
