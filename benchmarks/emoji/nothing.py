"""Teaches the text encoder to tell prompts that name nothing.

``python -m benchmarks.emoji.nothing``, after ``text.py`` and before the denoiser is trained. The
contrastive training shows the encoder sentences about things only. The end token of any other
prompt then points at some thing, and a denoiser has to learn by heart which phrasings are empty.
Here those prompts are led to one direction of their own, and all others are held where they were,
so that a trained denoiser still reads them. What a prompt without a thing says besides stays in it
at half the size.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from benchmarks.emoji.data import load_others
from benchmarks.emoji.loop import Log, cosine_rate, load, mixed, pick_device, save, set_rate
from benchmarks.emoji.text import (
    END,
    PATH,
    POSITIONS,
    TAUGHT,
    WIDTH,
    TextEncoder,
    load_text_encoder,
    states_at_end,
    tokenize,
    unknown_words,
)
from benchmarks.emoji.words import OBJECT_NAMES, PLAIN, STYLE_NAMES, SYNONYMS, PromptMaker, fill

STEPS, RATE = 2000, 6e-4
# Prompts in a batch, besides the empty one.
NOTHING, OBJECTS, SYNONYMS_TOO, OTHERS, ANYTHING = 28, 20, 3, 12, 3
REMAINS = 0.5  # of what a prompt without a thing pointed to before
INSIDE = 0.3  # weight of the states before the end token
SEED = 78
_SAMPLE = 600  # prompts without a thing that give the direction


class Prompts:
    """Draws prompts that name nothing and others, as the denoiser's training mixes them."""

    def __init__(self, seed: int) -> None:
        self._maker, self._random = PromptMaker(seed, unknown_words()), random.Random(seed)
        self._others = load_others()[0]

    def nothing(self, count: int) -> list[str]:
        """Never the prompt of no words at all, which shows everything."""
        found: list[str] = []
        while len(found) < count:
            text = self._maker.draw_nothing()
            if text:
                found.append(text)
        return found

    def named(self) -> list[str]:
        """Objects, their rarer words, other things, styles alone and the empty prompt."""
        choose, maker = self._random.choice, self._maker
        objects = [
            maker.draw(choose(OBJECT_NAMES), choose(STYLE_NAMES), allow_empty=False)[0]
            for _ in range(OBJECTS)
        ]
        others = [
            maker.draw_other(choose(self._others), choose(STYLE_NAMES)) for _ in range(OTHERS)
        ]
        return [
            *objects,
            *(fill(choose(PLAIN), choose(tuple(SYNONYMS))) for _ in range(SYNONYMS_TOO)),
            *others,
            *(maker.draw_anything(choose(STYLE_NAMES)) for _ in range(ANYTHING)),
            "",
        ]


def direction_of_nothing(encoder: TextEncoder, prompts: Prompts) -> torch.Tensor:
    """Where prompts without a thing lie on the average, less where the others lie: (768,).

    As long as a state is.
    """
    named = [text for _ in range(_SAMPLE // OBJECTS) for text in prompts.named()]
    nothing = states_at_end(encoder, prompts.nothing(_SAMPLE)).mean(0)
    way = nothing - states_at_end(encoder, named).mean(0)
    return functional.normalize(way, dim=0) * WIDTH**0.5


class _Lesson:
    """One encoder teaches another that starts as its copy."""

    def __init__(self, teacher: TextEncoder, student: TextEncoder, prompts: Prompts) -> None:
        self._teacher, self._student, self._prompts = teacher, student, prompts
        self._nothing = direction_of_nothing(teacher, prompts)
        self._random = random.Random(SEED)

    def loss(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared distance of prompts without a thing, and of all others."""
        tokens = tokenize(self._prompts.nothing(NOTHING) + self._prompts.named()).to(device)
        ends = (tokens == END).int().argmax(1)
        length = int(ends.max()) + 4 if self._random.random() < 0.8 else POSITIONS
        tokens = tokens[:, : min(length, POSITIONS)]
        after = torch.arange(tokens.shape[1], device=device) >= ends[:, None]
        with torch.no_grad(), mixed(device):
            wanted = self._teacher(tokens)
            led = functional.layer_norm(REMAINS * wanted + self._nothing, (WIDTH,))
            empty = torch.arange(len(tokens), device=device)[:, None] < NOTHING
            wanted = torch.where((after & empty).unsqueeze(2), led, wanted)
        with mixed(device):
            states = self._student(tokens)
        errors = (states - wanted).square().mean(2)
        # Each prompt counts the same, however much of it is padding.
        inside = (errors * ~after).sum(1) / (~after).sum(1)
        errors = (errors * after).sum(1) / after.sum(1) + INSIDE * inside
        return errors[:NOTHING].mean(), errors[NOTHING:].mean()


def train(steps: int = STEPS) -> None:
    """Teach the trained encoder, once, and write it in its own place; it takes minutes."""
    if knows_nothing():
        return
    log, device = Log("nothing"), pick_device()
    torch.manual_seed(SEED)
    teacher, student = load_text_encoder(device), load_text_encoder(device)
    student.layers.requires_grad_(True)
    lesson = _Lesson(teacher, student, Prompts(SEED))
    optimizer = torch.optim.AdamW(student.layers.parameters(), RATE, weight_decay=0.0)
    clock, totals = time.monotonic(), torch.zeros(2)
    for step in range(steps):
        set_rate(optimizer, cosine_rate(RATE, step, steps, warmup=50))
        nothing, named = lesson.loss(device)
        optimizer.zero_grad()
        (nothing + named).backward()
        clip_grad_norm_(student.layers.parameters(), 1.0)
        optimizer.step()
        totals += torch.tensor([nothing.item(), named.item()]) / 100
        if (step + 1) % 100 == 0:
            seconds = (time.monotonic() - clock) / 100
            log(
                f"step {step + 1}/{steps} nothing {totals[0]:.4f} named {totals[1]:.4f} "
                f"{seconds:.2f} s"
            )
            clock, totals = time.monotonic(), torch.zeros(2)
    save({"known": student.known, "model": student.state_dict(), TAUGHT: True}, PATH)


def knows_nothing() -> bool:
    """Whether the encoder that lies there has been taught."""
    return bool((load(PATH) or {}).get(TAUGHT))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    train(parser.parse_args().steps)
