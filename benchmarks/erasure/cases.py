"""What is erased, and what the erased model is asked afterwards.

Two lists that share no erased concept: settings are chosen on ``TUNED`` and reported on
``REPORTED``. Every question of a case uses a phrasing that is in no erasure's templates, and its
"others" are objects and styles that the run never named, neither as concept, alternative or keep
prompt nor inside a template.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from concept_surgery.erase_core.settings.prompts import TEMPLATES
from concept_surgery.erase_core.settings.texts import Concept, parse_concepts

from benchmarks.emoji.words import (
    GROUPS,
    HELD_OUT_PLAIN,
    HELD_OUT_STYLED,
    LEFT_OUT_PAIRS,
    OBJECT_NAMES,
    STYLE_NAMES,
    SYNONYMS,
    fill,
)

# "a painting of a cat" is among the erasure's own templates, so it isn't new to it.
PLAIN = tuple(phrase for phrase in HELD_OUT_PLAIN if phrase != "a painting of {a}")
STYLED = HELD_OUT_STYLED
KEPT = "a picture of {a}"

ERASED, SYNONYM, FROM_PICTURE, OTHERS, LEFT_OUT, NEGATIVE, KEEP = (
    "erased",
    "synonym",
    "from a picture",
    "others",
    "left out",
    "negative",
    "kept",
)
COUNTS = {
    ERASED: 16,
    SYNONYM: 4,
    FROM_PICTURE: 6,
    OTHERS: 24,
    LEFT_OUT: 6,
    NEGATIVE: 6,
    KEEP: 4,
}
PLAIN_OTHERS = 8  # of the 24, without a style in the prompt
MOST_KEPT = 4


@dataclass(frozen=True)
class Question:
    """One picture to draw and what should be on it.

    Attributes:
        group: what it is asked for, one of the constants above.
        text, negative: the prompts.
        name: object that the text names; for a synonym, the object that it stands for.
        style: style that the text names, or None.
        concept: which of the case's concepts it asks for; None where it asks for none.
        start: object and style of the real picture that it starts from (img2img), or None.
    """

    group: str
    text: str
    name: str
    style: str | None
    negative: str = ""
    concept: int | None = None
    start: tuple[str, str] | None = None


@dataclass(frozen=True)
class Case:
    """One erasure.

    Attributes:
        text: as a user types it, a concept a line.
        kind: "object" or "style".
        keeps: whether the run is given the keep prompts; the questions are the same without.
    """

    text: str
    kind: str
    keeps: bool = True

    @property
    def name(self) -> str:
        """One line, for tables."""
        return self.text.replace("\n", ", ")

    @cached_property
    def concepts(self) -> tuple[Concept, ...]:
        """What is erased and what takes its place."""
        return parse_concepts(self.text)

    @property
    def erased(self) -> tuple[str, ...]:
        """The words that must go."""
        return tuple(concept.text for concept in self.concepts)

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """Objects of the keep prompts: two close to what is erased, two that aren't."""
        if self.kind == "style":
            return ("bear", "lemon", "rocket", "umbrella")
        close = [n for group in _groups_of(self.erased) for n in group if n not in self._spoken]
        chosen = _spread(close, 2, self.text)
        rest = [n for n in OBJECT_NAMES if n not in self._spoken and n not in close]
        return (*chosen, *_spread(rest, MOST_KEPT - len(chosen), self.text))

    @property
    def keep(self) -> tuple[str, ...]:
        """The keep prompts, at most four."""
        return tuple(fill(KEPT, name) for name in self.kept) if self.keeps else ()

    @cached_property
    def _spoken(self) -> set[str]:
        """Every word of the concepts, their alternatives and the templates, without the keeps."""
        texts = [word for concept in self.concepts for word in (concept.text, concept.alternative)]
        texts += [part for t in TEMPLATES[self.kind] for part in (t.text, t.without)]
        return set(re.findall("[a-z]+", " ".join(texts)))

    @property
    def named(self) -> set[str]:
        """Every word that the run names."""
        return self._spoken | set(self.kept)

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """Everything that is drawn for the case, in a fixed order."""
        draw = random.Random(_number(self.text))
        asked = _ask_object(self, draw) if self.kind == "object" else _ask_style(self, draw)
        return tuple(asked)


def _ask_object(case: Case, draw: random.Random) -> list[Question]:
    asked = []
    share = COUNTS[ERASED] // len(case.concepts)
    for number, word in enumerate(case.erased):
        for turn in range(share):
            style = STYLE_NAMES[turn // 2 % len(STYLE_NAMES)] if turn % 2 else None
            text = _phrase(word, style, turn // 2)
            asked.append(Question(ERASED, text, word, style, concept=number))
        words = [synonym for synonym, name in SYNONYMS.items() if name == word]
        for turn in range(COUNTS[SYNONYM] if words else 0):
            text = _phrase(words[turn % len(words)], None, turn)
            asked.append(Question(SYNONYM, text, word, None, concept=number))
    asked += _from_pictures(case, [(word, None) for word in case.erased])
    unnamed = [name for name in OBJECT_NAMES if name not in case.named]
    close = [n for group in _groups_of(case.erased) for n in group if n in unnamed]
    close = draw.sample(close, min(len(close), COUNTS[OTHERS] // 2))
    far = draw.sample([n for n in unnamed if n not in close], COUNTS[OTHERS] - len(close))
    others = close + far
    draw.shuffle(others)
    asked += _others(others, STYLE_NAMES)
    asked += _left_out(case, draw)
    negatives = [fill("{a}", word) for word in case.erased]
    asked += _negatives(draw.sample(others, COUNTS[NEGATIVE]), negatives)
    return asked + [Question(KEEP, fill(KEPT, name), name, None) for name in case.kept]


def _ask_style(case: Case, draw: random.Random) -> list[Question]:
    unnamed = [name for name in OBJECT_NAMES if name not in case.named]
    styles = [style for style in STYLE_NAMES if style not in case.named]
    share = COUNTS[ERASED] // len(case.concepts)
    asked = []
    for number, style in enumerate(case.erased):
        for turn, name in enumerate(draw.sample(unnamed, share)):
            text = _phrase(name, style, turn)
            asked.append(Question(ERASED, text, name, style, concept=number))
    asked += _from_pictures(case, [(draw.choice(unnamed), style) for style in case.erased])
    others = draw.sample(unnamed, COUNTS[OTHERS])
    asked += _others(others, styles)
    asked += _left_out(case, draw)
    negatives = [f"{style} style" for style in case.erased]
    asked += _negatives(draw.sample(others, COUNTS[NEGATIVE]), negatives)
    return asked + [Question(KEEP, fill(KEPT, name), name, None) for name in case.kept]


def _from_pictures(case: Case, wanted: Sequence[tuple[str, str | None]]) -> list[Question]:
    """Real pictures of the concepts, to be redrawn under prompts that name them."""
    asked = []
    for turn in range(COUNTS[FROM_PICTURE]):
        number = turn % len(wanted)
        name, style = wanted[number]
        start = name, style or STYLE_NAMES[turn % len(STYLE_NAMES)]
        text = _phrase(name, style, turn)
        asked.append(Question(FROM_PICTURE, text, name, style, concept=number, start=start))
    return asked


def _others(names: Sequence[str], styles: Sequence[str]) -> list[Question]:
    asked = []
    for turn, name in enumerate(names):
        style = None if turn < PLAIN_OTHERS else styles[turn % len(styles)]
        asked.append(Question(OTHERS, _phrase(name, style, turn), name, style))
    return asked


def _left_out(case: Case, draw: random.Random) -> list[Question]:
    pairs = [pair for pair in LEFT_OUT_PAIRS if not case.named.intersection(pair)]
    pairs = draw.sample(pairs, min(len(pairs), COUNTS[LEFT_OUT]))
    return [
        Question(LEFT_OUT, _phrase(name, style, turn), name, style)
        for turn, (name, style) in enumerate(pairs)
    ]


def _negatives(names: Sequence[str], negatives: Sequence[str]) -> list[Question]:
    return [
        Question(NEGATIVE, _phrase(name, None, turn), name, None, negatives[turn % len(negatives)])
        for turn, name in enumerate(names)
    ]


def _phrase(word: str, style: str | None, turn: int) -> str:
    phrases = PLAIN if style is None else STYLED
    return fill(phrases[turn % len(phrases)], word, style)


def _groups_of(words: Sequence[str]) -> list[Sequence[str]]:
    return [group for group in GROUPS.values() if set(words) & set(group)]


def _spread(items: Sequence[str], count: int, seed: str) -> list[str]:
    return random.Random(_number(seed)).sample(list(items), min(count, len(items)))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


TUNED = (
    Case("fox => wolf", "object"),
    Case("train => bus", "object"),
    Case("apple", "object"),
    Case("rocket", "object"),
    Case("clay => cartoon", "style"),
    Case("cow => monkey\nlemon => orange", "object"),
)
REPORTED = (
    Case("cat => dog", "object"),
    Case("tiger => lion", "object"),
    Case("pizza => burger", "object"),
    Case("car => bicycle", "object"),
    Case("rose => tulip", "object"),
    Case("frog", "object"),
    Case("banana", "object"),
    Case("guitar", "object"),
    Case("octopus", "object"),
    Case("ink => flat", "style"),
    Case("flat => cartoon", "style"),
    Case("cartoon", "style"),
    Case("panda => koala\ncake => cookie", "object"),
    Case("bee\nmoon", "object"),
)
