"""What an erasure should lead to, drawn before it: ``python -m benchmarks.erasure.instead``

An erased prompt should give the picture of the prompt with the alternative in it, or without the
concept where there is none. How intact that picture is, is all that can be asked of the erased
model's: the untouched one isn't whole everywhere either. Draws those prompts with the same noise
for every case and writes the share of intact ones beside that of each method in the benchmark's
lines.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.emoji.words import with_article
from benchmarks.erasure.cases import ERASED, REPORTED, Case, Question
from benchmarks.erasure.metrics import measured
from benchmarks.erasure.results import LINES, RESULTS, Cache

RESULT = RESULTS / "erasure_instead.json"


def text_instead(question: Question, case: Case) -> str:
    """The prompt that an erased one should come out as."""
    concept = case.concepts[question.concept]
    word, alternative = concept.text, concept.alternative
    if case.kind == "style":
        if alternative:
            return re.sub(rf"\b{word}\b", alternative, question.text)
        less = re.sub(rf" in the {word} style|, {word} style|\b{word} style ", "", question.text)
        return re.sub(r"^(an|a) (?=picture)", "a ", less)
    named = rf"\b{with_article(word)}\b"
    text = re.sub(named, with_article(alternative) if alternative else "", question.text)
    text = re.sub(rf"\b{word}\b", alternative, text)
    return " ".join(text.split()).removeprefix(", ")


def intact_instead(bench: Any, case: Case, seed: int) -> float:
    """Share of intact pictures of those prompts, drawn by the untouched model."""
    from benchmarks.erasure.protocol import draw_noise

    places = [n for n, q in enumerate(case.questions) if q.group == ERASED]
    noise = draw_noise(case.questions, seed, bench.painter.model)[places]
    texts = [text_instead(case.questions[n], case) for n in places]
    pages = bench.painter.pages(bench.painter.latents(texts, [""] * len(texts), noise))
    distances = bench.judge.distances(bench.judge.judge(pages).features)
    return float(np.mean(distances <= bench.judge.radius))


def summarise(instead: Mapping[str, float], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By method, for replacements and removals apart: mean share intact, there and instead."""
    table: dict[str, Any] = {}
    for method in dict.fromkeys(line["of"]["method"] for line in lines):
        own = {
            line["of"]["case"]: line["measures"]["intact"]
            for line in lines
            if line["of"]["method"] == method and line["of"]["case"] in instead
        }
        for label, wanted in (("replaced", True), ("removed", False)):
            cases = [case for case in own if ("=>" in case) is wanted]
            if cases:
                table.setdefault(method, {})[label] = {
                    "erasures": len(cases),
                    "intact": round(float(np.mean([own[case] for case in cases])), 3),
                    "instead": round(float(np.mean([instead[case] for case in cases])), 3),
                }
    return table


def main() -> None:
    """The command line."""
    from benchmarks.erasure.painter import STEPS
    from benchmarks.erasure.protocol import Bench
    from benchmarks.erasure.run import checkpoint

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=LINES)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the sampler")
    asked = parser.parse_args()
    cache = Cache(asked.results)
    bench = Bench(checkpoint(), cache, asked.steps)
    lines = [
        measured(line)
        for line in cache
        if line["of"]["model"] == bench.painter.identity
        and line["of"]["seed"] == 0
        and line["of"]["protocol"]["steps"] == asked.steps
    ]
    instead = {case.text: round(intact_instead(bench, case, 0), 3) for case in REPORTED}
    table = summarise(instead, lines)
    found = {"model": bench.painter.identity, "steps": asked.steps, "cases": instead} | {
        "methods": table
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
