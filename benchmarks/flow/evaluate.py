"""Does the model draw what it is asked for? Judged by the second model's classifier.

``python -m benchmarks.flow.evaluate`` judges the committed weights, with ``--trained`` those of the
last snapshot. Results go to ``build/flow/evaluation.json``, with contact sheets beside it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.emoji.data import contact_sheet
from benchmarks.emoji.loop import load
from benchmarks.emoji.words import NOTHING
from benchmarks.flow.build import AVERAGE, filled_network
from benchmarks.flow.model import FlowModel
from benchmarks.flow.words import FOLDER, THING_NAMES
from benchmarks.icons.evaluate import KINDS, Question
from benchmarks.icons.evaluate import questions as all_questions


def questions(kind: str) -> list[Question]:
    """The second model's, for the things that this one draws."""
    return [one for one in all_questions(kind) if one[1] in (*THING_NAMES, NOTHING)]


def evaluate(
    model: FlowModel, kinds: Sequence[str], most: int, seed: int
) -> dict[str, dict[str, float]]:
    """Shares of right things, styles and both, for each kind; contact sheets beside."""
    scores = {}
    for kind in kinds:
        asked = questions(kind)
        if most < len(asked):
            asked = random.Random(seed).sample(asked, most)
        texts = [text for text, _, _ in asked]
        pages = model.pictures(texts, [""] * len(texts), model.draw_noise(len(texts), seed))
        found = zip(asked, *model.classify(pages), strict=True)
        right = [
            (name == seen, style is None or style == drawn)
            for (_, name, style), seen, drawn in found
        ]
        score = dict(zip(("thing", "style"), np.mean(right, 0).tolist(), strict=True))
        score |= {"both": float(np.mean([all(pair) for pair in right])), "count": len(asked)}
        scores[kind] = score
        print(kind, {name: round(value, 3) for name, value in score.items()}, flush=True)
        wrong = [text for text, pair in zip(texts, right, strict=True) if not all(pair)]
        print("   wrong:", wrong[:12], flush=True)
        contact_sheet(pages, 16, FOLDER / f"evaluation_{kind.replace(' ', '_')}.png")
    return scores


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--most", type=int, default=1000, help="prompts of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trained", action="store_true", help="judge the last snapshot")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    state = load(AVERAGE) if chosen.trained else None
    model = FlowModel(network=state and filled_network(state["network"]))
    scores = evaluate(model, chosen.kinds, chosen.most, chosen.seed)
    what = f"step {state['step']}" if state else "packed"
    kept = {"of": what, "seed": chosen.seed, "scores": scores}
    path = FOLDER / "evaluation.json"
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
