"""Can the pairs that were left out be told at all, and what does the model make of them?

``python -m benchmarks.emoji.left_out`` trains a judge that never saw them: names from the sixty
objects, styles from them and from most of the other things. It is then asked for the style of the
other things that it didn't see, of the real pictures of those pairs, and of what the committed
model draws for them. The usual judge has seen those pairs, so it knows them by their drawing; this
one has only the style to go by. Ten minutes on two cores; writes ``build/emoji/left_out.json``.
"""

from __future__ import annotations

import json

import numpy as np
import torch

from benchmarks.emoji.autoencoder import to_input
from benchmarks.emoji.classifier import (
    BATCH,
    NO_LABEL,
    STEPS,
    Classifier,
    Labelled,
    classify,
    decoded,
    fit,
)
from benchmarks.emoji.data import FOLDER, SIZE, load_others, training_pictures
from benchmarks.emoji.evaluate import packed_sampler, questions
from benchmarks.emoji.loop import Log, pick_device
from benchmarks.emoji.words import LEFT_OUT_PAIRS, OBJECT_NAMES, STYLE_NAMES

SEEN_OTHERS = 600
VARIANTS, VARIANTS_OF_OTHERS = 16, 2
SEED = 2


def with_decoded(pages: np.ndarray, count: int) -> np.ndarray:
    """Pictures (things, styles, variants, ...) with the first variants again, as decoded."""
    again = pages[:, :, :count]
    flat = decoded(again.reshape(-1, SIZE, SIZE, 3), pick_device())
    return np.concatenate([pages, flat.reshape(again.shape)], 2)


def blind_judge(pages: np.ndarray, others: np.ndarray) -> Classifier:
    """A judge of pictures that hasn't seen the left-out pairs, nor the last of the others."""
    torch.manual_seed(SEED)
    stream, device = torch.Generator().manual_seed(SEED), pick_device()
    left_out = torch.tensor(
        [[(name, style) in LEFT_OUT_PAIRS for style in STYLE_NAMES] for name in OBJECT_NAMES]
    )

    def draw() -> Labelled:
        own = [torch.randint(size, (BATCH,), generator=stream) for size in pages.shape[:3]]
        allowed = ~left_out[own[0], own[1]]
        own = [place[allowed] for place in own]
        sizes = (SEEN_OTHERS, *others.shape[1:3])
        other = [torch.randint(size, (BATCH,), generator=stream) for size in sizes]
        drawn = [
            bank[tuple(place.numpy() for place in places)]
            for bank, places in ((pages, own), (others, other))
        ]
        names = torch.cat([own[0], torch.full_like(other[0], NO_LABEL)])
        pictures = to_input(np.concatenate(drawn), device)
        return pictures, names, torch.cat([own[1], other[1]])

    model = fit(Classifier().to(device), draw, STEPS, stream, Log("left_out"))
    return model.requires_grad_(False)


def style_shares(model: Classifier, others: np.ndarray) -> dict[str, float]:
    """Share of pictures (things, styles, 64, 64, 3) whose style is named right, by style."""
    return {
        style: float(np.mean([found == style for found in classify(model, others[:, column])[1]]))
        for column, style in enumerate(STYLE_NAMES)
    }


def main() -> None:
    """Train, ask, print and write."""
    masters = load_others()[1]
    others = training_pictures(VARIANTS_OF_OTHERS, 6, masters)
    others = with_decoded(others, 1)
    pages = with_decoded(training_pictures(VARIANTS, SEED), 6)
    model = blind_judge(pages, others)
    unseen = others[SEEN_OTHERS:]
    places = [(OBJECT_NAMES.index(o), STYLE_NAMES.index(s)) for o, s in LEFT_OUT_PAIRS]
    real = np.concatenate([pages[place][VARIANTS:] for place in places])  # as decoded
    asked = [style for _, style in LEFT_OUT_PAIRS for _ in range(len(real) // len(places))]
    prompts = questions("left out")
    drawn = classify(model, packed_sampler()([text for text, _, _ in prompts], seed=0))
    right = [found == style for found, (_, _, style) in zip(drawn[1], prompts, strict=True)]
    each = len(prompts) // len(LEFT_OUT_PAIRS)
    result = {
        "unseen things, real": style_shares(model, unseen[:, :, 0]),
        "unseen things, decoded": style_shares(model, unseen[:, :, VARIANTS_OF_OTHERS]),
        "left-out pairs, decoded": float(np.mean(np.equal(classify(model, real)[1], asked))),
        "left-out pairs, drawn": float(np.mean(right)),
        "drawn, by pair": {
            f"{style} {name}": float(np.mean(right[each * row : each * (row + 1)]))
            for row, (name, style) in enumerate(LEFT_OUT_PAIRS)
        },
    }
    (FOLDER / "left_out.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
