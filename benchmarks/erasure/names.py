"""Do other names of a concept go with it? ``python -m benchmarks.erasure.names``

The emoji model knows eight words that draw the same as another one. Some concepts are removed by
*instant*, once under their own name and once under both, and drawn under each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from concept_surgery.erase_core import erase, preset_settings
from concept_surgery.erase_core.artefact.language_store import LanguageStore
from concept_surgery.erase_core.model.low_rank import LowRankEdit

from benchmarks.emoji.classifier import COMMITTED, classify, load_classifier
from benchmarks.emoji.words import SYNONYMS
from benchmarks.erasure.painter import FOLDER, Painter
from benchmarks.erasure.results import RESULTS
from benchmarks.erasure.run import checkpoint, leave_out_empty_layers

CONCEPTS = ("car", "house", "cat", "bicycle")
OTHERS = ("bus", "tree", "dog")
PHRASES = ("a photo of a {}", "a {} in a garden", "{}", "a drawing of a {}")
LANGUAGE = FOLDER / "language"
PICTURES, STEPS, SEED = 4, 8, 5  # of each phrase; sampler steps; of the noise


def share_drawn(
    painter: Painter, drawn: str, words: Sequence[str], edit: LowRankEdit | None
) -> float:
    """Share of the pictures under some words that show an object."""
    texts = [phrase.format(word) for word in words for phrase in PHRASES for _ in range(PICTURES)]
    noise = torch.randn(len(texts), 4, 8, 8, generator=torch.Generator().manual_seed(SEED))
    pages = painter.pages(painter.latents(texts, [""] * len(texts), noise, edit))
    names, _ = classify(load_classifier(COMMITTED), pages)
    return round(float(np.mean([name == drawn for name in names])), 3)


def measure(painter: Painter, concept: str) -> dict[str, Any]:
    """What is drawn under each name, before and after, erased under one name and under both."""
    (other,) = (word for word, meant in SYNONYMS.items() if meant == concept)
    kept = [word for word in OTHERS if word not in (concept, other)]
    edits: dict[str, LowRankEdit | None] = {"untouched": None}
    for asked in (concept, f"{concept} | {other}"):
        with painter.denoiser("key-value") as denoiser:
            settings = preset_settings("instant", concepts=asked, resolution=64)
            edits[asked] = erase(settings, denoiser, LanguageStore(LANGUAGE)).edit()
    return {
        asked: {
            concept: share_drawn(painter, concept, [concept], edit),
            other: share_drawn(painter, concept, [other], edit),
            "others": float(np.mean([share_drawn(painter, w, [w], edit) for w in kept]).round(3)),
        }
        for asked, edit in edits.items()
    }


def main(path: Path = RESULTS / "erasure_names.json") -> None:
    """Measure every concept, and write and print what was found."""
    painter = Painter(checkpoint(), STEPS, folder=FOLDER)
    leave_out_empty_layers(painter.clip)
    found = {}
    for concept in CONCEPTS:
        found[concept] = measure(painter, concept)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(concept, json.dumps(found[concept]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
