"""What the model is asked for: things, styles and the sentences around them.

The phrases are those of the first model, so that both are asked alike; things, styles and the words
around are others. ``python -m benchmarks.icons.words`` writes ``vocabulary.txt`` anew, after which
the model has to be trained anew.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.emoji.words import (
    ARTICLES,
    HEADS,
    HELD_OUT_PLAIN,
    HELD_OUT_STYLED,
    IN_STYLE,
    NOTHING_PLAIN,
    NOTHING_STYLED,
    PLAIN,
    STYLED,
    TAILS,
    caption_lines,
    without_object,
)

# Thing -> its name in the art sets. Some things have a name of two words and no other.
THINGS = {
    # animals
    "elephant": "elephant",
    "camel": "camel",
    "snake": "snake",
    "turtle": "turtle",
    "dolphin": "dolphin",
    "crab": "crab",
    "sheep": "ewe",
    "rooster": "rooster",
    "shark": "shark",
    # small ones
    "spider": "spider",
    "ant": "ant",
    "scorpion": "scorpion",
    # vegetables and the like
    "peach": "peach",
    "tomato": "tomato",
    "corn": "ear-of-corn",
    "eggplant": "eggplant",
    # on the table
    "bread": "bread",
    "cheese": "cheese-wedge",
    "candy": "candy",
    "lollipop": "lollipop",
    "hot dog": "hot-dog",
    "ice cream": "soft-ice-cream",
    "wine": "wine-glass",
    "beer": "beer-mug",
    # vehicles
    "helicopter": "helicopter",
    "ship": "ship",
    "tractor": "tractor",
    "taxi": "taxi",
    "fire truck": "fire-engine",
    "police car": "police-car",
    # instruments
    "trumpet": "trumpet",
    "violin": "violin",
    "piano": "musical-keyboard",
    # clothes
    "glasses": "glasses",
    "top hat": "top-hat",
    "shoe": "mans-shoe",
    "dress": "dress",
    "shirt": "t-shirt",
    # tools
    "key": "key",
    "lock": "locked",
    "light bulb": "light-bulb",
    "scissors": "scissors",
    "hammer": "hammer",
    "hourglass": "hourglass-done",
    # devices
    "camera": "camera",
    "phone": "mobile-phone",
    "television": "television",
    # places
    "castle": "castle",
    "church": "church",
    "volcano": "volcano",
    # outdoors
    "palm tree": "palm-tree",
    "clover": "four-leaf-clover",
    "sun": "sun",
    "cloud": "cloud",
    "snowman": "snowman-without-snow",
    "flame": "fire",
    # creatures of the night
    "skull": "skull",
    "ghost": "ghost",
    "alien": "alien",
    "pumpkin": "jack-o-lantern",
    # games and feasts
    "soccer ball": "soccer-ball",
    "trophy": "trophy",
    "balloon": "balloon",
    "gift": "wrapped-gift",
}
THING_NAMES = tuple(THINGS)

_SIZES = {
    **{"animal": 9, "insect": 3, "vegetable": 4, "food": 8, "vehicle": 6, "instrument": 3},
    **{"clothing": 5, "tool": 6, "device": 3, "place": 3, "outdoors": 6, "spook": 4, "party": 4},
}
GROUPS: dict[str, tuple[str, ...]] = {}
for _kind, _size in _SIZES.items():
    _begin = sum(map(len, GROUPS.values()))
    GROUPS[_kind] = THING_NAMES[_begin : _begin + _size]

# Style word -> art set.
STYLES = {
    "pixel": "EmojiTwo",
    "midnight": "Noto Emoji, first version",
    "stencil": "EmojiTwo in one colour",
    "sticker": "Fluent Emoji Flat",
}
STYLE_NAMES = tuple(STYLES)

# Other words for the same picture, trained rarely: what an erasure has to reach as well.
SYNONYMS = {
    "serpent": "snake",
    "tortoise": "turtle",
    "lamb": "sheep",
    "aubergine": "eggplant",
    "maize": "corn",
    "frankfurter": "hot dog",
    "chopper": "helicopter",
    "fire engine": "fire truck",
    "fiddle": "violin",
    "spectacles": "glasses",
    "gown": "dress",
    "padlock": "lock",
    "chapel": "church",
    "phantom": "ghost",
}
NO_ARTICLE = {"glasses", "scissors", "spectacles", "corn", "maize", "bread", "cheese"}
SILENT_H = {"hourglass"}

# These name no thing, though they stand where one would.
EMPTY_WORDS = ("thing", "something", "object")

SHARE_EMPTY = 0.1  # of all prompts: no words at all
SHARE_ALONE = 0.3  # of the prompts for an empty page: ordinary words, with a style or without
SHARE_EMPTY_WORD = 0.25  # likewise: one of the words that name no thing, as if it did
SHARE_APART = 0.6  # of those with a phrase: among ordinary words
SHARE_PLAIN = 0.3
SHARE_SYNONYM = 0.15
SHARE_SURROUNDED = 0.3
SHARE_FRAMED = 0.25
SHARE_IN_ORDER = 0.5  # of the words around: as they follow each other in a caption

VOCABULARY = Path(__file__).with_name("vocabulary.txt")
ORDINARY = 700  # of the captions' words
_WORD = re.compile(r"[a-z0-9](?:[a-z0-9_'-]*[a-z0-9])?|[,.]")


def split_words(text: str) -> list[str]:
    """The words of a text in small letters; a comma and a full stop are words, too."""
    return _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def with_article(name: str) -> str:
    """``camel`` -> ``a camel``; ``scissors`` stays as it is."""
    if name in NO_ARTICLE:
        return name
    return f"{'an' if name[0] in 'aeiou' or name in SILENT_H else 'a'} {name}"


def fill(phrase: str, name: str, style: str | None = None) -> str:
    """A phrase with its places filled."""
    a = name if name == "something" else with_article(name)
    return phrase.format(a=a, o=name, s=style)


def names_in(text: str) -> set[str]:
    """Which things a text names, in their main name or a rarer one, in the plural or not."""
    padded = f" {' '.join(split_words(text))} "
    found = {SYNONYMS.get(name, name) for name in (*THINGS, *SYNONYMS) if f" {name} " in padded}
    return found | {
        SYNONYMS.get(name, name) for name in (*THINGS, *SYNONYMS) if f" {name}s " in padded
    }


def ordinary_lines() -> list[list[str]]:
    """The words of each plain caption, without those that name a style or a thing."""
    named = {name for name in (*THINGS, *SYNONYMS, *STYLES) if " " not in name}
    named |= {f"{word}s" for word in named} | {f"{word}es" for word in named}
    lines = [[word for word in split_words(line) if word not in named] for line in caption_lines()]
    return [line for line in lines if not names_in(" ".join(line))]


def vocabulary() -> list[str]:
    """All words the model knows, in the order of their numbers."""
    return VOCABULARY.read_text(encoding="utf-8").split("\n")[:-1]


def write_vocabulary() -> None:
    """Collect the words: of prompts, of the engine's templates, and the captions' most frequent."""
    from concept_surgery.erase_core.settings.prompts import TEMPLATES

    phrases = [*PLAIN, *STYLED, *HELD_OUT_PLAIN, *HELD_OUT_STYLED, *NOTHING_PLAIN, *NOTHING_STYLED]
    phrases += [*HEADS, *ARTICLES, *TAILS, *IN_STYLE, *THINGS, *SYNONYMS, *STYLES, *EMPTY_WORDS]
    phrases += ["a an , ."]
    for template in (template for group in TEMPLATES.values() for template in group):
        phrases += [template.text, template.without]
    bare = [re.sub(r"\{\w?\}", " ", phrase) for phrase in phrases]
    counts = Counter(word for line in ordinary_lines() for word in line)
    words = {word for phrase in bare for word in split_words(phrase)}
    words |= {word for word, _ in counts.most_common(ORDINARY)}
    VOCABULARY.write_text("\n".join(sorted(words)) + "\n", encoding="utf-8")
    print(f"{len(words)} words: {VOCABULARY.name}")


class PromptMaker:
    """Draws the text for a picture, the way the training mixes it."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        # Half of a name of two words means nothing by itself.
        named = {*THINGS, *SYNONYMS, *STYLES}
        self._ordinary = [word for word in vocabulary() if word not in named]
        self._lines = [line for line in ordinary_lines() if len(line) > 3]
        self._never = {text for text, _, _ in all_prompts(HELD_OUT_PLAIN, HELD_OUT_STYLED)} | {
            without_object(phrase).format(s=style)
            for phrase in (*HELD_OUT_PLAIN, *HELD_OUT_STYLED)
            for style in STYLE_NAMES
        }
        self._synonyms: dict[str, list[str]] = {name: [] for name in THINGS}
        for word, name in SYNONYMS.items():
            self._synonyms[name].append(word)

    def draw(self, name: str, style: str) -> str:
        """The text for a picture of a thing."""
        if self._random.random() < SHARE_EMPTY:
            return ""
        if self._synonyms[name] and self._random.random() < SHARE_SYNONYM:
            word = self._random.choice(self._synonyms[name])
        else:
            word = name
        named = None if self._random.random() < SHARE_PLAIN else style
        return self._until({name}, lambda: self._sentence(word, named))

    def draw_nothing(self) -> str:
        """The text for an empty page, with a style or without."""
        if self._random.random() < SHARE_EMPTY:
            return ""
        style = self._random.choice((*STYLE_NAMES, *STYLE_NAMES, None, None, None))
        return self._until(set(), lambda: self._sentence_of_nothing(style))

    def _until(self, wanted: set[str], make: Callable[[], str]) -> str:
        """A text that names what is wanted and that evaluation doesn't ask."""
        while True:
            text = make()
            if names_in(text) == wanted and text not in self._never:
                return text

    def _sentence(self, word: str, style: str | None) -> str:
        if self._random.random() < SHARE_FRAMED:
            return self._framed(word, style)
        phrase = self._random.choice(PLAIN if style is None else STYLED)
        text = fill(phrase, word, style)
        return self._put_between(text) if self._random.random() < SHARE_SURROUNDED else text

    def _sentence_of_nothing(self, style: str | None) -> str:
        kind = self._random.random()
        if kind < SHARE_ALONE:
            words = self._some_words(self._random.choice((1, 2, 4, 7, 12)))
            return words if style is None else self._put_between(style)
        if kind < SHARE_ALONE + SHARE_EMPTY_WORD:
            return self._sentence(self._random.choice(EMPTY_WORDS), style)
        if self._random.random() < SHARE_FRAMED:
            return self._framed("", style)
        phrases = NOTHING_PLAIN if style is None else NOTHING_STYLED
        text = self._random.choice(phrases).format(s=style)
        return self._put_between(text) if self._random.random() < SHARE_APART else text

    def _framed(self, word: str, style: str | None) -> str:
        """A frame put together at random with a word in it, or with none."""
        parts = [*map(self._random.choice, (HEADS, ARTICLES)), word, self._random.choice(TAILS)]
        if style is not None:
            at = self._random.choice((0, len(parts)))
            parts.insert(at, self._random.choice(IN_STYLE).format(s=style))
        return self._random.choice((" ", " ", ", ")).join(part for part in parts if part)

    def _put_between(self, text: str) -> str:
        before = self._some_words(self._random.choice((0, 0, 1, 2, 4)))
        after = self._some_words(self._random.choice((0, 1, 2, 5)))
        joint = self._random.choice((" ", ", "))
        return joint.join(part for part in (before, text, after) if part)

    def _some_words(self, count: int) -> str:
        """Half of the time as they stand in a caption: a real prompt is full of "the" and "in"."""
        if self._random.random() < SHARE_IN_ORDER:
            line = self._random.choice(self._lines)
            begin = self._random.randrange(max(1, len(line) - count + 1))
            return " ".join(line[begin : begin + count])
        return " ".join(self._random.choices(self._ordinary, k=count))


def all_prompts(plain: Sequence[str], styled: Sequence[str]) -> list[tuple[str, str, str | None]]:
    """Every (text, thing, style or None) that these phrases give."""
    found: list[tuple[str, str, str | None]] = []
    for name in THING_NAMES:
        found += [(fill(phrase, name), name, None) for phrase in plain]
        for style in STYLE_NAMES:
            found += [(fill(phrase, name, style), name, style) for phrase in styled]
    return found


if __name__ == "__main__":
    write_vocabulary()
