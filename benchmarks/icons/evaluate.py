"""Does the model draw what it is asked for? Judged by the classifier.

``python -m benchmarks.icons.evaluate`` judges the committed weights, with ``--trained`` those of
the last snapshot. Results go to ``build/icons/evaluation.json``, with contact sheets beside it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.emoji.loop import pick_device
from benchmarks.emoji.words import NOTHING
from benchmarks.icons.build import packed_network
from benchmarks.icons.classifier import classify, load_judge
from benchmarks.icons.data import FOLDER, sheet
from benchmarks.icons.network import GUIDANCE, STEPS, Network, sample, tokenize
from benchmarks.icons.train import trained_network
from benchmarks.icons.words import (
    EMPTY_WORDS,
    HELD_OUT_PLAIN,
    HELD_OUT_STYLED,
    NOTHING_PLAIN,
    NOTHING_STYLED,
    PLAIN,
    STYLE_NAMES,
    STYLED,
    SYNONYMS,
    THING_NAMES,
    fill,
    without_object,
)
from benchmarks.velocity import draw_noise

BATCH = 64
Question = tuple[str, str, str | None]  # text, thing, style or None
Draw = Callable[[Sequence[str], int], np.ndarray]
KINDS = ("styled", "plain", "new styled", "new plain", "synonyms", "nothing", "new nothing")


def questions(kind: str) -> list[Question]:
    """The prompts of one kind of test, in a fixed order."""
    if kind == "synonyms":
        texts = [(phrase, word) for word in SYNONYMS for phrase in PLAIN[:4]]
        return [(fill(phrase, word), SYNONYMS[word], None) for phrase, word in texts]
    if kind == "nothing":
        phrases = (*NOTHING_PLAIN, *NOTHING_STYLED)
        texts = {phrase.format(s=style) for phrase in phrases for style in STYLE_NAMES}
        texts |= {fill(phrase, word) for phrase in PLAIN for word in EMPTY_WORDS}
        return [(text, NOTHING, None) for text in sorted(texts)]
    if kind == "new nothing":
        phrases = [*map(without_object, HELD_OUT_PLAIN), *map(without_object, HELD_OUT_STYLED)]
        texts = {phrase.format(s=style) for phrase in phrases for style in STYLE_NAMES}
        for word in EMPTY_WORDS:
            texts |= {fill(phrase, word) for phrase in HELD_OUT_PLAIN}
            texts |= {fill(p, word, style) for p in HELD_OUT_STYLED for style in STYLE_NAMES}
        return [(text, NOTHING, None) for text in sorted(texts)]
    if kind in ("plain", "new plain"):
        phrases = PLAIN if kind == "plain" else HELD_OUT_PLAIN
        turns = enumerate(THING_NAMES * 2)
        return [(fill(phrases[n % len(phrases)], name), name, None) for n, name in turns]
    phrases = STYLED if kind == "styled" else HELD_OUT_STYLED
    turns = enumerate((name, style) for name in THING_NAMES for style in STYLE_NAMES)
    # Each style meets each phrase: four styles go on by one phrase more with each thing.
    return [(fill(phrases[(n + n // 4) % len(phrases)], *pair), *pair) for n, pair in turns]


def drawer(network: Network, steps: int, guidance: float) -> Draw:
    """Draws texts and a seed to pictures uint8 (B, 64, 64, 3)."""

    @torch.no_grad()
    def draw(texts: Sequence[str], seed: int) -> np.ndarray:
        device, done = network.patches.mean.device, []
        states = network.encode(tokenize([*texts, ""]).to(device))
        noise = draw_noise(len(texts), seed).to(device)
        for begin in range(0, len(texts), BATCH):
            part = slice(begin, min(begin + BATCH, len(texts)))
            against = states[-1:].expand_as(states[part])
            drawn = sample(network, states[part], against, noise[part], steps, guidance)
            done.append(network.patches.pages(drawn))
        return np.concatenate(done)

    return draw


def evaluate(draw: Draw, kinds: Sequence[str], most: int, seed: int) -> dict[str, dict[str, float]]:
    """Shares of right things, styles and both, for each kind; contact sheets beside."""
    judge, scores = load_judge(device=pick_device()), {}
    for kind in kinds:
        asked = questions(kind)
        if most < len(asked):
            asked = random.Random(seed).sample(asked, most)
        pages = draw([text for text, _, _ in asked], seed)
        found = zip(asked, *classify(judge, pages), strict=True)
        right = [
            (name == seen, style is None or style == drawn)
            for (_, name, style), seen, drawn in found
        ]
        score = dict(zip(("thing", "style"), np.mean(right, 0).tolist(), strict=True))
        score |= {"both": float(np.mean([all(pair) for pair in right])), "count": len(asked)}
        scores[kind] = score
        print(kind, {name: round(value, 3) for name, value in score.items()}, flush=True)
        wrong = [text for (text, _, _), pair in zip(asked, right, strict=True) if not all(pair)]
        print("   wrong:", wrong[:12], flush=True)
        sheet(pages, 16, f"evaluation_{kind.replace(' ', '_')}.png")
    return scores


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--most", type=int, default=1000, help="prompts of each kind")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trained", action="store_true", help="judge the last snapshot")
    chosen = parser.parse_args()
    device = pick_device()
    network = trained_network(device) if chosen.trained else packed_network().to(device)
    draw = drawer(network, chosen.steps, chosen.guidance)
    scores = evaluate(draw, chosen.kinds, chosen.most, chosen.seed)
    path, what = FOLDER / "evaluation.json", "last snapshot" if chosen.trained else "packed"
    kept = {"of": what, "steps": chosen.steps, "guidance": chosen.guidance, "seed": chosen.seed}
    path.write_text(json.dumps({**kept, "scores": scores}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
