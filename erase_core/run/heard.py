"""All that a run asks of the text encoder beside its own prompts.

It comes before the model is loaded: where memory is short, the host makes room for one by moving
the other away.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..method.language import Language, read_language, read_moment, shrunk
from ..method.reading import (
    WORDS_PER_CAPTION,
    Reading,
    choose_reading,
    evenly_spaced,
    plain_captions,
    those_naming,
)
from ..model.prompt import TOKENS, Encoded
from .given import Given
from .plan import UNNAMED_PROMPTS

# How many plain captions are held like keep prompts where there is no ridge.
PLAIN_CAPTIONS = 8
# Prompts of ordinary language that are read on other ways than that of the tokens: few, since some
# hosts give the pooled vector of one prompt only.
OTHER_PROMPTS = 256
# How far their second moment is drawn towards one that protects all directions alike: farther than
# that of tokens, as the prompts are few beside the size of a pooled vector.
OTHER_SHRINKAGE = 0.1


# What reading ordinary language may cost where the network has to do it, in forward-equivalents.
# At the models' own sizes it is less than one; on small ones it would be more than all the rest.
READING_BUDGET = 150
LEAST_CAPTIONS = 8


@dataclass(frozen=True)
class Heard:
    """Ordinary language as the text encoder speaks it.

    Attributes:
        language: what was read of it; None where no matrix is known that reads prompts alone.
        moments: second moments that are protected, (size, size), by way.
        unnamed: prompts of words that nobody named, to measure what else changes, by their texts.
        plain: plain captions that are held like keep prompts, where there is no language.
    """

    language: Language | None
    moments: Mapping[str, Tensor]
    unnamed: Mapping[str, Encoded]
    plain: list[Encoded]


def hear(given: Given, cache: MutableMapping[str, Tensor] | None) -> Heard:
    """Read ordinary language, from the text encoder or from the cache.

    Args:
        cache: see :func:`language.read_language`.

    Raises:
        NothingLearnedError: it is to stop.
    """
    settings, model = given.settings, given.model
    captions = plain_captions(_captions_to_read(settings.captions, model.reading_cost))
    reading = choose_reading(model, captions, settings.kind)
    words = [word for word, _ in reading.witnesses]
    if TOKENS not in model.ways:
        plain = model.encode(evenly_spaced(captions, PLAIN_CAPTIONS))
        return Heard(None, {}, _unnamed(given, reading, words), plain)

    progress = given.meter.read
    language = read_language(model, reading, cache, given.erased, progress)
    moments = {TOKENS: shrunk(language.moment)}
    asked = evenly_spaced(reading.protected, OTHER_PROMPTS)
    for way in model.ways:
        if way != TOKENS:
            moment = read_moment(model, asked, way, cache, given.erased, progress)
            moments[way] = shrunk(moment, OTHER_SHRINKAGE)
    words = list(language.witnesses.without(given.spoken).telling().texts)
    # Without predictions the rows that were read will do.
    unnamed = _unnamed(given, reading, words) if settings.samples else {}
    return Heard(language, moments, unnamed, [])


def _captions_to_read(asked: int, each: float) -> int:
    """How many captions are read, of those that were asked for.

    Args:
        each: forward-equivalents that one prompt costs.
    """
    if not each:
        return asked
    prompts = READING_BUDGET / each
    return max(LEAST_CAPTIONS, min(asked, int(prompts / (1 + WORDS_PER_CAPTION))))


def _unnamed(given: Given, reading: Reading, witnesses: Sequence[str]) -> dict[str, Encoded]:
    """Prompts of some words that nobody named, by their texts."""
    wanted = set(witnesses) - set(those_naming(witnesses, given.spoken))
    texts = [text for word, text in reading.witnesses if word in wanted]
    texts = evenly_spaced(texts, UNNAMED_PROMPTS) or evenly_spaced(
        reading.protected, UNNAMED_PROMPTS
    )
    return dict(zip(texts, given.model.encode(texts), strict=True))
