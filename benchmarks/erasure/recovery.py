"""Can the concept be brought back? ``python -m benchmarks.erasure.recovery``

Textual inversion of one token against the edited model: the embedding of the concept's word in a
prompt that doesn't name it is trained on real pictures of the concept, with the denoising loss and
the edited weights fixed. It is trained behind the text encoder, which no erasure here changes: the
row is free to be what no word becomes. The untouched model under the same attack is the yardstick.
(Redrawing a real picture, the other way back, is part of every run: "from a picture".)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from concept_surgery.erase_core.model.denoiser import Denoiser
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.model.prompt import Encoded
from torch import Tensor

from benchmarks.emoji.data import SIZE, load_pictures, render
from benchmarks.emoji.words import OBJECT_NAMES, STYLE_NAMES
from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods.base import Method, predict_eps
from benchmarks.erasure.metrics import rounded
from benchmarks.erasure.protocol import Bench, method_code
from benchmarks.erasure.results import RESULTS

LINES = RESULTS / "erasure_recovery.jsonl"
PROMPT, WORD = "a picture of thing", 4  # the word's row: the start token is row 0
STEPS, BATCH, RATE, LEVELS = 150, 4, 0.03, 1000
PICTURES = 8
UNTOUCHED = "untouched"


def invert(
    denoiser: Denoiser,
    edit: LowRankEdit | None,
    clean: Tensor,
    tokens: Tensor,
    row: int,
    seed: int,
    steps: int = STEPS,
    rate: float = RATE,
) -> tuple[Tensor, list[float]]:
    """Token embeddings (tokens, width) with one row trained, and the loss of each step.

    Args:
        edit: what the model carries; None for the untouched one.
        clean: latents (n, c, h, w) of real pictures of the concept.
        tokens: embeddings of the prompt, (tokens, width).
        rate: Adam's step relative to the root mean square of that row.
    """
    generator = torch.Generator().manual_seed(seed)
    start = tokens[row].clone()
    change = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.Adam([change], rate * float(start.square().mean().sqrt()))
    levels, losses = denoiser.sigmas(LEVELS)[:-1], []
    at = torch.zeros(len(tokens), 1)
    at[row] = 1
    for _ in range(steps):
        chosen = torch.randint(len(clean), (BATCH,), generator=generator)
        sigma = levels[torch.randint(len(levels), (BATCH,), generator=generator)]
        noise = torch.randn(BATCH, *clean.shape[1:], generator=generator)
        x = clean[chosen] + sigma.view(-1, 1, 1, 1) * noise
        prompt = Encoded(tokens + at * change)
        loss = (predict_eps(denoiser, x, sigma, [prompt] * BATCH, edit) - noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return (tokens + at * change).detach(), losses


def recovered(bench: Bench, case: Case, method: Method | None, seed: int) -> dict[str, Any]:
    """Share of pictures with the first concept before the attack and after it."""
    concept = case.concepts[0].text
    edit = None if method is None else bench.train(case, method, seed)[0]
    clean = bench.painter.encoded(real_pictures(case.kind, concept))
    (tokens,) = bench.painter.encode([PROMPT])
    with bench.painter.denoiser("key-value" if method is None else method.layers) as denoiser:
        found, losses = invert(denoiser, edit, clean, tokens, WORD, seed)
    noise = torch.randn(PICTURES, *clean.shape[1:], generator=torch.Generator().manual_seed(seed))
    texts = {
        "named": f"a picture of {concept}",
        "attacked": bench.painter.remember("\0inverted", found),
    }
    shares = {}
    for label, text in texts.items():
        pages = bench.painter.pages(
            bench.painter.latents([text] * PICTURES, [""] * PICTURES, noise, edit)
        )
        verdicts = bench.judge.judge(pages)
        drawn = verdicts.names if case.kind == "object" else verdicts.styles
        shares[label] = float(np.mean([name == concept for name in drawn]))
    tenth = max(1, len(losses) // 10)
    return {
        **shares,
        "loss_first": float(np.mean(losses[:tenth])),
        "loss_last": float(np.mean(losses[-tenth:])),
    }


def real_pictures(kind: str, word: str) -> np.ndarray:
    """Real pictures with a concept, uint8 (n, 64, 64, 3)."""
    masters = load_pictures()
    chosen = (
        masters[OBJECT_NAMES.index(word)]
        if kind == "object"
        else masters[::4, STYLE_NAMES.index(word)]
    )
    pages = np.stack([render(master) for master in chosen])
    assert pages.shape[1:] == (SIZE, SIZE, 3)
    return pages


def run(bench: Bench, case: Case, method: Method | None, seed: int) -> dict[str, Any]:
    """The line of an attack, from the cache where it is there."""
    of = {
        "model": bench.painter.identity,
        "case": case.text,
        "method": UNTOUCHED if method is None else method.name,
        "settings": {} if method is None else dict(method.settings),
        "code": "" if method is None else method_code(method.files, method.uses_engine),
        "seed": seed,
        "attack": [PROMPT, WORD, STEPS, BATCH, RATE, PICTURES, bench.painter.steps],
        "judge": bench.judge.identity,
    }
    known = bench.cache.get(of)
    return known or bench.cache.add(of, rounded(recovered(bench, case, method, seed)))


def main() -> None:
    """The command line."""
    from benchmarks.erasure.painter import STEPS as SAMPLER_STEPS
    from benchmarks.erasure.run import QUICK_CASES, find_cases, find_methods, open_bench

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--cases", nargs="*", default=QUICK_CASES)
    parser.add_argument("--methods", nargs="*", default=["ours/balanced", "esd-x", "uce"])
    parser.add_argument("--results", type=Path, default=LINES)
    parser.add_argument("--steps", type=int, default=SAMPLER_STEPS, help="of the sampler")
    asked = parser.parse_args()
    bench = open_bench(asked.checkpoint, asked.results, asked.steps)
    methods: Sequence[Method | None] = [None, *find_methods(asked.methods)]
    for case in find_cases(asked.cases):
        for method in methods:
            line = run(bench, case, method, 0)
            print(case.name, line["of"]["method"], {k: line[k] for k in ("named", "attacked")})


if __name__ == "__main__":
    main()
