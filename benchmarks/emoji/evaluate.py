"""Does the model draw what it is asked for? Judged by the classifier.

``python -m benchmarks.emoji.evaluate`` samples with the host's Euler steps, written out here so
that it needs no checkpoint file; ``--host FILE`` samples a few prompts through the host itself.
Results go to ``build/emoji/evaluation.json`` and a contact sheet beside it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.emoji.autoencoder import Autoencoder, load_autoencoder, to_pages
from benchmarks.emoji.build import WEIGHTS, unpack
from benchmarks.emoji.classifier import classify, load_classifier
from benchmarks.emoji.data import FOLDER, contact_sheet
from benchmarks.emoji.loop import pick_device
from benchmarks.emoji.text import TextEncoder, load_text_encoder, tokenize
from benchmarks.emoji.unet import build_unet, draw_noise, load_unet, sample
from benchmarks.emoji.words import (
    HELD_OUT_PLAIN,
    HELD_OUT_STYLED,
    LEFT_OUT_PAIRS,
    OBJECT_NAMES,
    PLAIN,
    STYLE_NAMES,
    STYLED,
    SYNONYMS,
    fill,
)

STEPS, GUIDANCE, SIZE = 20, 4.0, 64  # sampler: euler, scheduler: normal
BATCH = 30
Question = tuple[str, str, str | None]  # text, object, style or None


def questions(kind: str) -> list[Question]:
    """The prompts of one kind of test, in a fixed order."""
    if kind == "left out":
        texts = [(phrase, name, style) for name, style in LEFT_OUT_PAIRS for phrase in STYLED]
        return [(fill(phrase, name, style), name, style) for phrase, name, style in texts]
    if kind == "synonyms":
        texts = [(phrase, word) for word in SYNONYMS for phrase in PLAIN[:4]]
        return [(fill(phrase, word), SYNONYMS[word], None) for phrase, word in texts]
    if kind in ("plain", "new plain"):
        phrases = PLAIN if kind == "plain" else HELD_OUT_PLAIN
        turns = enumerate(OBJECT_NAMES)
        return [(fill(phrases[n % len(phrases)], name), name, None) for n, name in turns]
    phrases = STYLED if kind == "styled" else HELD_OUT_STYLED
    pairs = [(name, style) for name in OBJECT_NAMES for style in STYLE_NAMES]
    pairs = [pair for pair in pairs if pair not in LEFT_OUT_PAIRS]
    turns = enumerate(pairs)
    return [(fill(phrases[n % len(phrases)], *pair), *pair) for n, pair in turns]


KINDS = ("styled", "left out", "plain", "new styled", "new plain", "synonyms")


class Sampler:
    """Texts to pictures uint8 (B, 64, 64, 3)."""

    def __init__(
        self,
        unet: nn.Module,
        text: TextEncoder,
        autoencoder: Autoencoder,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
    ) -> None:
        self._unet, self._text, self._autoencoder = unet, text, autoencoder
        self._steps, self._guidance = steps, guidance

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], seed: int) -> np.ndarray:
        device, done = self._text.basis.device, []
        states = self._text(tokenize([*texts, ""]).to(device))
        noise = draw_noise(len(texts), seed).to(device)
        for begin in range(0, len(texts), BATCH):
            part = slice(begin, min(begin + BATCH, len(texts)))
            drawn = sample(
                *(self._unet, states[part], states[-1:], noise[part]),
                steps=self._steps,
                guidance=self._guidance,
            )
            done.append(to_pages(self._autoencoder.decode(drawn)))
        return np.concatenate(done)


def trained_sampler(steps: int = STEPS, guidance: float = GUIDANCE) -> tuple[Sampler, int]:
    """Of the newest snapshot, and its step."""
    device = pick_device()
    unet, step = load_unet(device)
    parts = (unet, load_text_encoder(device), load_autoencoder(device))
    return Sampler(*parts, steps=steps, guidance=guidance), step


def packed_sampler(steps: int = STEPS, guidance: float = GUIDANCE) -> Sampler:
    """Of the committed weights."""
    device = pick_device()
    tensors, text, autoencoder = unpack(load_file(WEIGHTS))
    unet = build_unet()
    unet.load_state_dict(tensors)
    parts = [part.to(device).requires_grad_(False) for part in (unet, text, autoencoder)]
    return Sampler(*parts, steps=steps, guidance=guidance)


def judge(
    draw: Sampler, kind: str, most: int, seed: int = 0
) -> tuple[dict[str, float], np.ndarray, list[Question]]:
    """Shares of right objects, styles and both, the pictures and what was asked."""
    asked = questions(kind)
    if most < len(asked):
        asked = random.Random(seed).sample(asked, most)
    pages = draw([text for text, _, _ in asked], seed)
    names, styles = classify(load_classifier(device=pick_device()), pages)
    right = [
        (name == found, style is None or style == drawn)
        for (_, name, style), found, drawn in zip(asked, names, styles, strict=True)
    ]
    object_share, style_share = np.mean(right, axis=0).tolist()
    both = float(np.mean([all(pair) for pair in right]))
    score = {"object": object_share, "both": both, "count": len(asked)}
    if asked[0][2] is not None:
        score["style"] = style_share
    return score, pages, asked


def evaluate(draw: Sampler, kinds: Sequence[str], most: int, seed: int, label: str) -> dict:
    """Judge all kinds, print and write what comes out."""
    scores = {}
    for kind in kinds:
        scores[kind], pages, _ = judge(draw, kind, most, seed)
        print(kind, {name: round(value, 3) for name, value in scores[kind].items()}, flush=True)
        contact_sheet(pages, 12, FOLDER / f"evaluation_{kind.replace(' ', '_')}.png")
    path = FOLDER / "evaluation.json"
    path.write_text(json.dumps({"of": label, "seed": seed, "scores": scores}, indent=1) + "\n")
    return scores


def host_pictures(
    path: Path, texts: Sequence[str], seed: int = 0, steps: int = STEPS, guidance: float = GUIDANCE
) -> np.ndarray:
    """Sampled by the real host from a checkpoint file."""
    from tools.pack import use_host

    use_host()
    import comfy.sample
    import comfy.sd

    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(path))[:3]
    noise = draw_noise(len(texts), seed)

    def encode(text: str) -> list:
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    pages = []
    for number, text in enumerate(texts):
        drawn = comfy.sample.sample(
            *(model, noise[number : number + 1], steps, guidance, "euler", "normal"),
            *(encode(text), encode(""), torch.zeros(1, *noise.shape[1:])),
            denoise=1.0,
            disable_pbar=True,
        )
        pages.append(vae.decode(drawn)[0].mul(255).round().byte().numpy())
    return np.stack(pages)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--most", type=int, default=1000, help="prompts of each kind")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packed", action="store_true", help="judge the committed weights")
    parser.add_argument("--host", type=Path, help="draw 24 prompts from this file in the host")
    chosen = parser.parse_args()
    if chosen.host:
        asked = random.Random(chosen.seed).sample(questions("styled"), 24)
        texts = [text for text, _, _ in asked]
        pages = host_pictures(chosen.host, texts, chosen.seed, chosen.steps, chosen.guidance)
        contact_sheet(pages, 6, FOLDER / "host.png", zoom=2)
        found = list(zip(texts, *classify(load_classifier(), pages), strict=True))
        print("\n".join(" | ".join(row) for row in found))
        return
    if chosen.packed:
        draw, label = packed_sampler(chosen.steps, chosen.guidance), "packed"
    else:
        draw, step = trained_sampler(chosen.steps, chosen.guidance)
        label = f"step {step}"
    print(label, flush=True)
    evaluate(draw, chosen.kinds, chosen.most, chosen.seed, label)


if __name__ == "__main__":
    main()
