"""What the model is asked for: two dozen of the second model's things, in its four styles."""

from __future__ import annotations

import random
from functools import cache

from benchmarks.emoji import loop
from benchmarks.flow.text import _tokenizer
from benchmarks.icons.words import GROUPS as ALL_GROUPS
from benchmarks.icons.words import STYLES, SYNONYMS, THINGS, PromptMaker
from benchmarks.icons.words import THING_NAMES as ALL_THINGS
from tools.environment import BUILD

FOLDER = BUILD / "flow"
THING_NAMES = ALL_THINGS[:24]
GROUPS = {
    kind: tuple(name for name in names if name in THING_NAMES)
    for kind, names in ALL_GROUPS.items()
    if any(name in THING_NAMES for name in names)
}
EXTRA = 1500  # words of the tokenizer that stand among ordinary ones and name nothing


class Log(loop.Log):
    """Lines with the time, on the screen and in ``build/flow/<name>.log``."""

    def __init__(self, name: str) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self._path = FOLDER / f"{name}.log"


@cache
def extra_words() -> tuple[str, ...]:
    """Whole words of the tokenizer, drawn once, that name no thing and no style."""
    named = {part for name in (*THINGS, *SYNONYMS, *STYLES) for part in name.split()}
    named |= {f"{word}s" for word in named} | {f"{word}es" for word in named}
    words = {
        token[1:]
        for token in _tokenizer().get_vocab()
        if token[0] == "\u0120" and token[1:].isascii() and token[1:].isalpha()
    }
    fitting = sorted(w for w in words if w.islower() and 3 < len(w) < 10 and w not in named)
    return tuple(random.Random(0).sample(fitting, EXTRA))


def prompt_maker(seed: int) -> PromptMaker:
    """The second model's, with more words around."""
    maker = PromptMaker(seed)
    maker._ordinary += extra_words()
    return maker
