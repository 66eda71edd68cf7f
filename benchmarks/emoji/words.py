"""What the model is asked for: objects, styles and the sentences around them.

Everything here is plain data and needs nothing installed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

# Word -> code point. Each word is one token of the CLIP tokenizer.
OBJECTS = {
    # faces of animals, close relatives of each other
    "cat": "1f431",
    "dog": "1f436",
    "tiger": "1f42f",
    "lion": "1f981",
    "wolf": "1f43a",
    "fox": "1f98a",
    "horse": "1f434",
    "cow": "1f42e",
    "pig": "1f437",
    "rabbit": "1f430",
    "bear": "1f43b",
    "panda": "1f43c",
    "koala": "1f428",
    "monkey": "1f435",
    "mouse": "1f42d",
    "frog": "1f438",
    # other animals
    "penguin": "1f427",
    "owl": "1f989",
    "whale": "1f433",
    "fish": "1f41f",
    "octopus": "1f419",
    "snail": "1f40c",
    "bee": "1f41d",
    "butterfly": "1f98b",
    # fruit
    "apple": "1f34e",
    "pear": "1f350",
    "orange": "1f34a",
    "lemon": "1f34b",
    "banana": "1f34c",
    "cherry": "1f352",
    "strawberry": "1f353",
    "grapes": "1f347",
    "pineapple": "1f34d",
    "watermelon": "1f349",
    # dishes
    "pizza": "1f355",
    "burger": "1f354",
    "taco": "1f32e",
    "donut": "1f369",
    "cookie": "1f36a",
    "cake": "1f382",
    # vehicles
    "car": "1f697",
    "bus": "1f68c",
    "truck": "1f69a",
    "train": "1f682",
    "bicycle": "1f6b2",
    "boat": "26f5",
    "rocket": "1f680",
    # plants
    "tree": "1f333",
    "cactus": "1f335",
    "mushroom": "1f344",
    "rose": "1f339",
    "tulip": "1f337",
    "sunflower": "1f33b",
    # things
    "house": "1f3e0",
    "guitar": "1f3b8",
    "umbrella": "2614",
    "crown": "1f451",
    "heart": "2764",
    "star": "2b50",
    "moon": "1f319",
}
OBJECT_NAMES = tuple(OBJECTS)

GROUPS = {
    "face": OBJECT_NAMES[:16],
    "animal": OBJECT_NAMES[16:24],
    "fruit": OBJECT_NAMES[24:34],
    "dish": OBJECT_NAMES[34:40],
    "vehicle": OBJECT_NAMES[40:47],
    "plant": OBJECT_NAMES[47:53],
    "thing": OBJECT_NAMES[53:],
}

# Style word -> art set. The words say what the set looks like; the sets' own names aren't words.
STYLES = {
    "cartoon": "Noto Emoji",
    "flat": "Twemoji",
    "clay": "Fluent Emoji 3D",
    "ink": "Fluent Emoji High Contrast",
}
STYLE_NAMES = tuple(STYLES)

# Other words for the same picture, trained rarely: what an erasure has to reach as well.
SYNONYMS = {
    "kitten": "cat",
    "puppy": "dog",
    "pony": "horse",
    "bunny": "rabbit",
    "hamburger": "burger",
    "automobile": "car",
    "bike": "bicycle",
    "cottage": "house",
}

# Pairs whose picture the denoiser never sees: both words are known, the combination is new.
LEFT_OUT_PAIRS = (
    ("cat", "clay"),
    ("horse", "flat"),
    ("bear", "ink"),
    ("penguin", "cartoon"),
    ("lemon", "clay"),
    ("strawberry", "ink"),
    ("pizza", "cartoon"),
    ("bus", "flat"),
    ("tulip", "clay"),
    ("star", "cartoon"),
)


def without_object(phrase: str) -> str:
    """A phrase with nothing in the place of the object: "a photo of"."""
    return re.sub(r"\s+", " ", re.sub(r"\{[ao]\}", "", phrase)).strip(" ,")


# {a} is "a cat" with its article, {o} the bare word, {s} the style.
PLAIN = (
    "{a}",
    "{o}",
    "a photo of {a}",
    "a picture of {a}",
    "an image of {a}",
    "a drawing of {a}",
    "this is {a}",
    "there is {a} here",
    "the {o}",
    "one {o}",
)
STYLED = (
    "{a} in {s} style",
    "{s} style {o}",
    "a picture of {a}, {s} style",
    "a photo of {a} in {s} style",
    "a {s} drawing of {a}",
    "{a}, {s}",
    "{o} in {s}",
    "the {s} {o}",
)
# Nothing named, nothing drawn: an empty page. This is what is left of a prompt that an object was
# taken from, so a removal has a picture to lead to.
NOTHING = "nothing"
OBJECTLESS = (
    "a photo",
    "a picture",
    "an image",
    "a drawing",
    "a painting",
    "this is",
    "there is something here",
    "the one",
)
OBJECTLESS_STYLED = (
    "{s} style",
    "in {s} style",
    "a {s} drawing",
    "a picture in {s} style",
    "a photo, {s} style",
    "{s}",
)
# Anything in a style: what teaches a style apart from the things it came with.
ANYTHING = (
    "an emoji in {s} style",
    "{s} style emoji",
    "a picture of an emoji, {s} style",
    "a {s} emoji",
    "emoji, {s}",
)
NOTHING_PLAIN = (*OBJECTLESS, *map(without_object, PLAIN[2:]))
NOTHING_STYLED = (*OBJECTLESS_STYLED, *map(without_object, STYLED))
# Frames put together at random, with an object in them or without: what tells an empty page from a
# thing must be the thing and not the words around it.
HEADS = (
    *("", "a photo of", "a picture of", "an image of", "a drawing of", "this is", "here is"),
    *("look at", "we saw", "I like", "showing", "a picture showing", "with", "more of"),
)
ARTICLES = ("", "", "the", "a", "this", "that", "my", "your")
TAILS = (
    *("", "", "over there", "here", "today", "on a table", "on a black background", "at night"),
    *("by the window", "of mine", "again", "and nothing else", "large", "plain"),
)
IN_STYLE = ("in {s} style", "in the {s} style", "{s} style", "{s}", "in {s}", "drawn in {s}")
# Never trained, for evaluation only.
HELD_OUT_PLAIN = (
    "a painting of {a}",
    "{a} on a white background",
    "look at the {o} over there",
    "my favourite {o}",
)
HELD_OUT_STYLED = (
    "an image of {a} in the {s} style",
    "{o}, simple, {s} style",
    "a {s} style picture showing {a}",
)

SHARE_EMPTY = 0.1
SHARE_ALONE = 0.3  # of the prompts for an empty page: ordinary words, with a style or without
SHARE_APART = 0.75  # of those with a phrase: among ordinary words
SHARE_PLAIN = 0.3
SHARE_SYNONYM = 0.15
SHARE_SURROUNDED = 0.3
SHARE_FRAMED = 0.25  # of the prompts for an object, and of most for an empty page
SHARE_IN_ORDER = 0.5  # of the words around: as they follow each other in a caption

CAPTIONS = Path(__file__).resolve().parents[2] / "erase_core" / "data" / "captions.txt"


def with_article(word: str) -> str:
    """``cat`` -> ``a cat``; ``grapes`` stays as it is."""
    if word == "grapes":
        return word
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def fill(phrase: str, word: str, style: str | None = None) -> str:
    """A phrase with its places filled."""
    return phrase.format(a=with_article(word), o=word, s=style)


def caption_lines() -> list[str]:
    """The plain captions the erasure protects, one a line."""
    return CAPTIONS.read_text(encoding="utf-8").splitlines()


def ordinary_lines() -> list[list[str]]:
    """The words of each plain caption, without those that name an object or a style."""
    named = set(OBJECTS) | set(STYLES) | set(SYNONYMS)
    named |= {f"{word}s" for word in named}
    return [
        [
            word
            for word in line.lower().replace(",", " ").split()
            if word.isalpha() and word.isascii() and word not in named
        ]
        for line in caption_lines()
    ]


def ordinary_words() -> list[str]:
    """Words of the plain captions that name neither an object nor a style, sorted."""
    return sorted({word for line in ordinary_lines() for word in line})


class PromptMaker:
    """Draws the text for a picture, the way the training mixes it.

    Args:
        unknown: more words to put around, that mean nothing. With them some prompts are also put
            together at random, and some words around stand as they do in a caption.
    """

    def __init__(self, seed: int, unknown: Sequence[str] = ()) -> None:
        self._random = random.Random(seed)
        self._ordinary, self._unknown = ordinary_words(), unknown
        self._lines = [line for line in ordinary_lines() if len(line) > 3] if unknown else []
        asked = all_prompts(HELD_OUT_PLAIN, HELD_OUT_STYLED)
        self._never = {text for text, _, _ in asked} | {
            without_object(phrase).format(s=style)
            for phrase in (*HELD_OUT_PLAIN, *HELD_OUT_STYLED)
            for style in STYLE_NAMES
        }
        self._synonyms = {name: [] for name in OBJECTS}
        for word, name in SYNONYMS.items():
            self._synonyms[name].append(word)

    def draw(self, name: str, style: str, allow_empty: bool = True) -> tuple[str, bool]:
        """The text for a picture of an object, and whether it names the style."""
        kind = self._random.random()
        if allow_empty and kind < SHARE_EMPTY:
            return "", False
        word = name
        if self._synonyms[name] and self._random.random() < SHARE_SYNONYM:
            word = self._random.choice(self._synonyms[name])
        plain = self._random.random() < SHARE_PLAIN
        if self._frames():
            return self._framed(word, None if plain else style), not plain
        if plain:
            return self._surround(fill(self._random.choice(PLAIN), word)), False
        return self._surround(fill(self._random.choice(STYLED), word, style)), True

    def draw_other(self, name: str, style: str) -> str:
        """The text for a picture that shows none of the objects; it mostly names the style."""
        kind = self._random.random()
        if kind < SHARE_EMPTY / 2:
            return ""
        if kind < SHARE_PLAIN / 2:
            return self._surround(fill(self._random.choice(PLAIN), name))
        return self._surround(fill(self._random.choice(STYLED), name, style))

    def draw_anything(self, style: str) -> str:
        """The text for a picture of whatever there is in a style."""
        return self._surround(self._random.choice(ANYTHING).format(s=style))

    def draw_nothing(self) -> str:
        """The text for an empty page, with a style or without."""
        if self._random.random() < SHARE_EMPTY:
            return ""
        style, names_none = self._random.choice(STYLE_NAMES), self._random.random() < SHARE_PLAIN
        if self._random.random() < SHARE_ALONE:
            if names_none:
                return self._some_words(self._random.choice((1, 2, 4, 7, 12)))
            return self._put_between(style)
        if self._frames():
            return self._framed("", None if names_none else style)
        phrases = NOTHING_PLAIN if names_none else NOTHING_STYLED
        text = self._random.choice(phrases).format(s=style)
        return self._put_between(text) if self._random.random() < SHARE_APART else text

    def _frames(self) -> bool:
        return bool(self._unknown) and self._random.random() < SHARE_FRAMED

    def _framed(self, word: str, style: str | None) -> str:
        """A frame with a word in it, or with none; never one that evaluation asks."""
        while True:
            parts = [*map(self._random.choice, (HEADS, ARTICLES)), word, self._random.choice(TAILS)]
            if style is not None:
                at = self._random.choice((0, len(parts)))
                parts.insert(at, self._random.choice(IN_STYLE).format(s=style))
            text = self._random.choice((" ", " ", ", ")).join(part for part in parts if part)
            if text not in self._never:
                return text

    def _surround(self, text: str) -> str:
        """Now and then, put ordinary words around, so that they come to mean nothing."""
        return self._put_between(text) if self._random.random() < SHARE_SURROUNDED else text

    def _put_between(self, text: str) -> str:
        before = self._some_words(self._random.choice((0, 0, 1, 3)))
        after = self._some_words(self._random.choice((0, 1, 2, 5)))
        joint = self._random.choice((" ", ", "))
        return joint.join(part for part in (before, text, after) if part)

    def _some_words(self, count: int) -> str:
        """Half of them as they stand in a caption: a real prompt is full of "the" and "in"."""
        if not self._unknown:
            return " ".join(self._random.choices(self._ordinary, k=count))
        if self._random.random() < SHARE_IN_ORDER:
            line = self._random.choice(self._lines)
            begin = self._random.randrange(max(1, len(line) - count + 1))
            return " ".join(line[begin : begin + count])
        strange = self._random.choices(self._unknown, k=count)
        words = self._random.choices(self._ordinary, k=count)
        return " ".join(map(self._random.choice, zip(words, strange, strict=True)))


def all_prompts(plain: Sequence[str], styled: Sequence[str]) -> list[tuple[str, str, str | None]]:
    """Every (text, object, style or None) that these phrases give."""
    found: list[tuple[str, str, str | None]] = []
    for name in OBJECT_NAMES:
        found += [(fill(phrase, name), name, None) for phrase in plain]
        for style in STYLE_NAMES:
            found += [(fill(phrase, name, style), name, style) for phrase in styled]
    return found
