"""The benchmark: ``python -m benchmarks.unnamed.run`` measures what isn't measured yet.

Several processes share the work, one thread each; a run that is stopped goes on where it was. The
results of this project's methods are found again by the engine's version, not by its files' text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.pack import load_pack, use_host

use_host()
load_pack()
from concept_surgery.erase_core.method.subspace import SubspaceError  # noqa: E402
from concept_surgery.erase_core.model.gradient import GradientError  # noqa: E402
from concept_surgery.erase_core.run.states import PredictionError  # noqa: E402
from concept_surgery.erase_core.run.trainer import TrainingError  # noqa: E402
from concept_surgery.erase_core.settings.texts import SettingsError  # noqa: E402

from benchmarks.erasure.results import RESULTS, Cache, digest  # noqa: E402
from benchmarks.unnamed.cases import BROKEN as BROKEN_CASES  # noqa: E402
from benchmarks.unnamed.cases import CASES, Case, ten_together  # noqa: E402
from benchmarks.unnamed.methods import (  # noqa: E402
    BARE,
    BROKEN,
    INSTANT,
    METHODS,
    ONE_BY_ONE,
    OURS,
    TOLD,
    Method,
    caption_moment,
    words_to_retain,
)
from benchmarks.unnamed.protocol import (  # noqa: E402
    PROTOCOL_VERSION,
    Untouched,
    measure,
    measure_guidance,
    measure_ten,
    own_states,
    things_asked,
)
from benchmarks.unnamed.worlds import PLAIN, ROOT, WORK, World, identity, open_world  # noqa: E402

LINES = RESULTS / "unnamed.jsonl"
MERGE_EVERY = 15.0  # seconds
REFUSALS = (SettingsError, SubspaceError, PredictionError, TrainingError, GradientError)


@dataclass(frozen=True)
class Job:
    """One erasure by one method on one model."""

    world: str
    case: Case
    method: Method

    @property
    def of(self) -> dict[str, Any]:
        """Everything that decides the result."""
        return {
            "world": self.world,
            "model": identity(self.world),
            "case": self.case.text,
            "kind": self.case.kind,
            "method": self.method.name,
            "settings": dict(self.method.settings),
            "engine": self.method.engine,
            "protocol": PROTOCOL_VERSION,
        }


def all_jobs(worlds: Sequence[str], methods: Sequence[str], cases: Sequence[str] = ()) -> list[Job]:
    """What is to be measured, the most important first.

    Args:
        methods: names of them; with "ours/instant" also ten at once, with "ours/balanced" also
            settings that break things.
        cases: texts of cases; all if there are none.
    """

    def over(group: Iterable[Method]) -> list[Job]:
        wanted = [method for method in group if method.name in methods]
        pairs = [(method, world) for method in wanted for world in worlds]
        return [Job(world, case, method) for method, world in pairs for case in CASES[world]]

    jobs = [*over(OURS), *over(TOLD)]
    if "ours/balanced" in methods:
        jobs += [Job(w, c, method) for w in worlds for c in BROKEN_CASES[w] for method in BROKEN]
    if "ours/instant" in methods:
        jobs += [
            Job(w, ten_together(w), method) for w in worlds for method in (ONE_BY_ONE, INSTANT)
        ]
    jobs += over(BARE)
    return [job for job in jobs if not cases or job.case.text in cases]


def share(items: Sequence[Any], number: int, count: int) -> list[Any]:
    """The part of the work that falls to one of several processes."""
    return list(items[number::count])


def merge(results: Path, parts: Iterable[Path]) -> int:
    """Put the lines of the parts that the results don't have behind them; how many there are."""
    into = Cache(results)
    lines = list(into)
    known = {line["key"] for line in lines}
    for part in parts:
        if part.exists():
            for line in _whole_lines(part):
                if line["key"] not in known:
                    known.add(line["key"])
                    lines.append(line)
    results.parent.mkdir(parents=True, exist_ok=True)
    partial = results.with_name(f".{results.name}.part")
    text = "".join(f"{json.dumps(line, sort_keys=True, separators=(',', ':'))}\n" for line in lines)
    partial.write_text(text, encoding="utf-8")
    partial.replace(results)
    return len(lines)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Without one that is being written; the file stays as it is, since somebody writes to it."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


class Bench:
    """The models that one process has opened."""

    def __init__(self) -> None:
        self._worlds: dict[str, tuple[World, Untouched]] = {}

    def world(self, name: str) -> tuple[World, Untouched]:
        """A model with its untouched pictures."""
        if name not in self._worlds:
            world = open_world(name)
            self._worlds[name] = world, Untouched(world)
        return self._worlds[name]

    def run(self, job: Job) -> dict[str, Any]:
        """Train and measure; where the engine refuses, what it says."""
        world, untouched = self.world(job.world)
        began = time.monotonic()
        try:
            with world.denoiser() as denoiser:
                edit, notes = job.method.train(world, denoiser, job.case, job.method.settings)
                spent = denoiser.forward_equivalents
        except REFUSALS as error:
            return {"refused": str(error)}
        trained = time.monotonic()
        several = "\n" in job.case.text
        found = (measure_ten if several else measure)(world, job.case, edit, untouched)
        if job.method.engine:
            notes |= {"guidance_60": measure_guidance(world, job.case, edit)}
        seconds = [round(trained - began, 2), round(time.monotonic() - trained, 2)]
        return {
            **_rounded(found),
            "notes": _rounded(notes),
            "forward_equivalents": spent,
            "seconds": dict(zip(("training", "measuring"), seconds, strict=True)),
            "drawing": world.drawing,
        }


def _rounded(found: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in found.items()}


def prepare(name: str) -> None:
    """Do once what all processes need: checkpoint, ordinary language, states to look at."""
    began = time.monotonic()
    world = open_world(name)
    opened = time.monotonic()
    Untouched(world)([PLAIN[0].format(o=world.things[0])], [0])
    own_states(world)
    with world.denoiser() as denoiser:
        case = CASES[name][0]
        INSTANT.train(world, denoiser, case, INSTANT.settings)
        read = time.monotonic()
        caption_moment(world, denoiser)
        world.encode([*words_to_retain(denoiser), *things_asked(world.things)])
    seconds = opened - began, read - opened, time.monotonic() - read
    print(f"{name}: opened, read, captions: {' '.join(f'{s:.0f}' for s in seconds)} s", flush=True)


def work(jobs: Sequence[Job], part: Path, until: float) -> bool:
    """Measure jobs one after the other, until the time has come; whether none failed."""
    bench, cache, failed = Bench(), Cache(part), False
    for job in jobs:
        if time.time() > until:
            break
        if cache.get(job.of) is not None:
            continue
        began = time.monotonic()
        try:
            result = bench.run(job)
        except (ValueError, RuntimeError):  # the others go on, and the command ends as failed
            print(f"{job.world} {job.case.name} {job.method.name} failed", flush=True)
            traceback.print_exc()
            failed = True
            continue
        cache.add(job.of, result)
        _say(job, result, time.monotonic() - began)
    return not failed


def _say(job: Job, result: Mapping[str, Any], seconds: float) -> None:
    names = ("gone", "kept_harshest", "kept_rest", "kv_outside")
    figures = " ".join(f"{name} {result[name]:.2f}" for name in names if name in result)
    name = f"{job.world} {job.case.name[:40]:24} {job.method.name:16}"
    print(f"{name} {figures or 'refused'} ({seconds:.1f} s)", flush=True)


def _again(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", __spec__.name, *arguments], cwd=ROOT)


def run_all(jobs: Sequence[Job], processes: int, results: Path, until: float) -> int:
    """Share the work among processes; how many lines there are in the end.

    Raises:
        SystemExit: a run failed; those that didn't are kept.
    """
    folder = WORK / "parts" / digest(str(results.resolve()))
    parts = [folder / f"{number}.jsonl" for number in range(processes)]
    merge(results, sorted(folder.glob("*.jsonl")))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    known = {line["key"] for line in Cache(results)}
    todo = [job for job in jobs if digest(job.of) not in known]
    if not todo:
        return len(known)
    threads = str(max(1, processes // 2))
    first = [_again("--prepare", w, "--threads", threads) for w in {job.world for job in todo}]
    if any([process.wait() for process in first]):
        raise SystemExit("Preparing failed; see above.")
    workers = []
    for number in range(processes):
        wanted = folder / f"{number}.json"
        mine = [(j.world, j.case.text, j.method.name) for j in share(todo, number, processes)]
        wanted.write_text(json.dumps(mine), encoding="utf-8")
        if mine:
            workers.append(_again("--work", str(wanted), "--until", str(until)))
    try:
        while any(worker.poll() is None for worker in workers) and time.time() < until:
            _wait(workers, min(MERGE_EVERY, max(0.0, until - time.time())))
            merge(results, parts)
    finally:
        _end(workers)
        count = merge(results, parts)
    if any(worker.returncode > 0 for worker in workers):  # below 0: ended since time was up
        raise SystemExit("Some runs failed; see above. The others are kept.")
    return count


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        try:
            worker.wait(10)
        except subprocess.TimeoutExpired:
            worker.kill()


def _wait(workers: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(worker.poll() is None for worker in workers):
        time.sleep(0.2)


def _work_of(wanted: Path) -> list[Job]:
    asked = json.loads(wanted.read_text(encoding="utf-8"))
    jobs = {(j.world, j.case.text, j.method.name): j for j in all_jobs([*CASES], [*METHODS])}
    return [jobs[tuple(one)] for one in asked]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", nargs="*", default=[*CASES], choices=[*CASES])
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--cases", nargs="*", default=[], help="texts of cases")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--results", type=Path, default=LINES)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.prepare:
        prepare(chosen.prepare)
    elif chosen.work:
        if not work(_work_of(chosen.work), chosen.work.with_suffix(".jsonl"), chosen.until):
            raise SystemExit(1)
    else:
        until = time.time() + chosen.seconds
        jobs = all_jobs(chosen.worlds, chosen.methods, chosen.cases)
        print(f"{run_all(jobs, chosen.processes, chosen.results, until)} lines", flush=True)


if __name__ == "__main__":
    main()
