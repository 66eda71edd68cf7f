"""The prompts an erasure is trained on: templates with the concept, its alternative, or without."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .settings import EraseSettings
from .texts import ARROW, Concept, SettingsError, folded, label, line_warnings


@dataclass(frozen=True)
class Template:
    """One phrasing.

    Attributes:
        text: the prompt; ``{}`` is the bare concept, ``{a}`` the concept with its article.
        without: what a user wants drawn when the concept is taken out; "" for the same prompt with
            a neutral word in the concept's place.
    """

    text: str
    without: str = ""

    def fill(self, concept: str) -> str:
        """The prompt with ``concept`` in it."""
        return self.text.replace("{a}", with_article(concept)).replace("{}", concept)

    def neutral(self, concept: str, filler: str) -> str:
        """The prompt with a filler where the concept stands, behind the concept's own article."""
        article = with_article(concept).removesuffix(concept)
        return self.text.replace("{a}", article + filler).replace("{}", filler)


@dataclass(frozen=True)
class PromptPair:
    """A prompt with the concept and what must be drawn instead.

    Attributes:
        erased: the prompt with the concept.
        alternative: the prompt of what takes its place. "" where nothing does: it is then the one
            of ``neutral`` that is as long as ``erased``.
        neutral: the erased prompt with a neutral word in the concept's place, one text for each
            length that the concept may have in tokens.
        neutral_alternative: the same for the alternative.
        concept: place of the concept in the settings.
        name: which of its names stands in the erased prompt, as it was typed.
    """

    erased: str
    alternative: str
    neutral: tuple[str, ...]
    neutral_alternative: tuple[str, ...]
    concept: int = 0
    name: str = ""


OBJECT_TEMPLATES = (
    Template("{}"),
    Template("a photo of {a}"),
    Template("{a} in a garden"),
    Template("a painting of {a}"),
    Template("{a} next to a wooden chair"),
    Template("a pencil drawing of {a} on white paper"),
    Template("a street at night with {a}"),
    Template("close-up of {a}, soft light"),
    Template("a 3d render of {a}, studio lighting"),
    Template("two people looking at {a}"),
    Template("{}, highly detailed, masterpiece"),
    Template("{a} in watercolor style"),
)

STYLE_TEMPLATES = (
    Template("{} style"),
    Template("a painting in {} style"),
    Template("a house in {} style"),
    Template("a portrait of a woman in {} style"),
    Template("a bowl of fruit, {} style"),
    Template("a city street in {} style, detailed"),
    Template("a horse running in a field, {} style"),
    Template("{} style drawing of a ship"),
    Template("a mountain landscape, {}"),
    Template("an old man reading a book in {} style"),
    Template("a car in {} style"),
    Template("{}"),
)

PERSON_TEMPLATES = (
    Template("{}"),
    Template("a photo of {}"),
    Template("a portrait of {}, studio lighting"),
    Template("{} smiling at the camera"),
    Template("a movie still of {}"),
    Template("{} walking in a park"),
    Template("an oil painting of {}"),
    Template("{} giving a speech on a stage"),
    Template("{} and a friend in a cafe"),
    Template("close-up of the face of {}"),
    Template("{} in a red jacket, full body"),
    Template("a black and white photo of {} at a desk"),
)

TAG_TEMPLATES = (
    Template("{}"),
    Template("1girl, {}, solo, looking at viewer"),
    Template("masterpiece, best quality, {}"),
    Template("1boy, {}, standing, outdoors"),
    Template("{}, simple background, white background"),
    Template("no humans, {}, scenery, blue sky"),
    Template("{}, upper body, smile, indoors"),
    Template("score_9, score_8_up, {}, full body"),
    Template("2girls, {}, sitting, night, city lights"),
    Template("very aesthetic, absurdres, {}, close-up"),
    Template("{}, monochrome, sketch"),
    Template("solo, {}, from side, wind, flower"),
)

TEMPLATES = {
    "object": OBJECT_TEMPLATES,
    "style": STYLE_TEMPLATES,
    "person": PERSON_TEMPLATES,
    "tags": TAG_TEMPLATES,
}

# The phrasing a person would try a concept with first.
_PLAIN = {
    "object": OBJECT_TEMPLATES[1],
    "style": STYLE_TEMPLATES[1],
    "person": PERSON_TEMPLATES[1],
    "tags": TAG_TEMPLATES[0],
}

# What stands in a concept's place when nothing is asked for, a word longer each, so that what comes
# after it keeps its place. A removal leads there (see ``encoded.py``).
_FILLER_WORDS = {
    "object": ("thing", "plain", "simple", "common", "other", "same", "only", "very"),
    "style": ("plain", "simple", "common", "other", "same", "only", "very", "most"),
    "person": ("person", "plain", "simple", "common", "other", "same", "only", "very"),
    "tags": ("thing", "plain", "simple", "common", "other", "same", "only", "very"),
}
FILLERS = {
    kind: tuple(" ".join(reversed(words[:count])) for count in range(1, len(words) + 1))
    for kind, words in _FILLER_WORDS.items()
}

# An opening bracket that the host reads as emphasis: not escaped, and not closed by a weight.
_BARE_BRACKET = re.compile(r"(?<!\\)\((?![^()]*:\s*[\d.]+\s*\))")


def templates(settings: EraseSettings, concept: Concept) -> list[Template]:
    """The phrasings of a concept: the user's own if there are any, else those of its kind."""
    if not settings.templates:
        return list(TEMPLATES[settings.kind_of(concept)])
    own = []
    for line in settings.templates:
        text, _, without = (part.strip() for part in line.partition(ARROW))
        own.append(Template(text, without))
    return own


def plain_phrase(concept: str, kind: str, own: Sequence[str] = ()) -> str:
    """A concept in a plain prompt: the first of a user's own phrases, else that of its kind.

    Args:
        concept: not empty.
        kind: a key of :data:`TEMPLATES`; any other is read as an object.
        own: the user's phrases, as the settings have them.
    """
    plain = _PLAIN.get(kind, _PLAIN["object"])
    template = Template(own[0].partition(ARROW)[0].strip()) if own else plain
    return template.fill(_bare(kind, concept))


def prompt_pairs(settings: EraseSettings) -> list[PromptPair]:
    """The training prompts of all concepts, one pair for each template and name of a concept.

    Raises:
        SettingsError: when a prompt that must be kept is itself a prompt to erase.
    """
    pairs = [
        _pair(settings, template, concept, index, name)
        for index, concept in enumerate(settings.concepts)
        for name in concept.names
        for template in templates(settings, concept)
    ]
    _refuse_contradictions(settings, pairs)
    return pairs


def _pair(
    settings: EraseSettings, template: Template, concept: Concept, index: int, name: str
) -> PromptPair:
    kind = settings.kind_of(concept)
    erased, fillers = _bare(kind, name), FILLERS[kind]
    neutral = tuple(template.neutral(erased, filler) for filler in fillers)
    if not concept.alternative:
        return PromptPair(template.fill(erased), template.without, neutral, (), index, name)
    instead = _bare(kind, concept.alternative)
    return PromptPair(
        template.fill(erased),
        template.fill(instead),
        neutral,
        tuple(template.neutral(instead, filler) for filler in fillers),
        index,
        name,
    )


def prompt_warnings(settings: EraseSettings) -> list[str]:
    """What a person should know about the texts they gave.

    Lines that may have been meant as several, and brackets that the host reads away.
    """
    warnings = line_warnings(settings.concepts, settings.kind)
    tags = [concept for concept in settings.concepts if settings.kind_of(concept) == "tags"]
    if not tags:
        return warnings
    concepts = [text for c in tags for text in (*c.names, c.alternative)]
    texts = [*concepts, *settings.keep, *settings.negative_prompts, *settings.templates]
    return [
        *warnings,
        *(
            f"The brackets in {text!r} are read as emphasis and are not part of the tag. If they "
            f"belong to it, write {_escaped(text)!r}."
            for text in texts
            if _BARE_BRACKET.search(text)
        ),
    ]


# Spelled with a vowel and spoken with a consonant, and the other way round.
_SPOKEN_CONSONANT = re.compile(r"(?:uni(?!n|m)|use|usu|uti|ura|ufo|euro|eu|ewe|one\b|once\b)")
_SPOKEN_VOWEL = re.compile(r"(?:hour|honest|honou?r|heir|herb\b)")
# Plurals without an s, and words that end like a plural and are none.
_PLURALS = frozenset(
    "people children men women feet teeth mice geese oxen dice cattle police scissors".split()
)
_SINGULARS = frozenset(
    "lens gas canvas atlas bias rhinoceros christmas alas texas pancreas cosmos chaos series "
    "species news mathematics".split()
)


def with_article(concept: str) -> str:
    """The concept as it stands in a sentence: "a cat", "an hourglass"; names and plurals stay bare.

    The first word decides whether it is "a" or "an", the last one whether it is a plural. A
    textual inversion is a name.
    """
    words = said(concept).split()
    first, last = words[0].casefold(), words[-1].casefold()
    is_tag = "_" in concept or "\\" in concept
    is_name = words[0][:1].isupper() or "embedding:" in concept
    ends_like_one = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    is_plural = last in _PLURALS or (ends_like_one and last not in _SINGULARS)
    if is_tag or is_name or is_plural or first in _DETERMINERS:
        return concept
    vowel = first[0] in "aeiou" and not _SPOKEN_CONSONANT.match(first)
    return f"{'an' if vowel or _SPOKEN_VOWEL.match(first) else 'a'} {concept}"


_DETERMINERS = frozenset(
    ("a", "an", "the", "some", "my", "your", "his", "her", "our", "their", "no")
)


# The word that style templates add themselves, also within brackets and before a weight.
_STYLE_AT_END = re.compile(r"\s+style(?=\s*(?::[-+.\s\d]*)?[)\]]*$)", re.IGNORECASE)
# What a host reads as emphasis: brackets that aren't escaped, and a weight before the closing one.
_EMPHASIS = re.compile(r"(?<!\\)[(\[]|(?::\s*[-+.\d][-+.\de]*\s*)?(?<!\\)[)\]]", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)")


def _bare(kind: str, concept: str) -> str:
    """A style without the word "style", which the templates add themselves."""
    if kind == "style" and _STYLE_AT_END.search(concept):
        return " ".join(_STYLE_AT_END.sub("", concept).split())
    return concept


def said(text: str) -> str:
    """A prompt's words as they are read: without emphasis, and without underscores for spaces.

    Brackets that belong to a tag keep their backslash, so that they stay apart from emphasis.
    """
    words = " ".join(_EMPHASIS.sub("", text).replace("_", " ").split())
    return words if re.search(r"\w", words) else text


def name_of(text: str, kind: str = "") -> str:
    """What prompts that name a concept call it: its words as the templates use them.

    Args:
        text: the concept, or what takes its place.
        kind: of the concept.
    """
    name = said(_bare(kind, text))
    return name if kind == "person" else _ARTICLE.sub("", name, count=1)


def _escaped(text: str) -> str:
    return re.sub(r"(?<!\\)([()])", r"\\\1", text)


def _refuse_contradictions(settings: EraseSettings, pairs: list[PromptPair]) -> None:
    erased = {folded(pair.erased): settings.concepts[pair.concept] for pair in reversed(pairs)}
    erased |= {folded(name): c for c in settings.concepts for name in c.names}
    for setting in ("keep", "negative_prompts"):
        for prompt in getattr(settings, setting):
            concept = erased.get(folded(prompt))
            if concept is not None:
                raise SettingsError(
                    f"{prompt!r} stands under {label(setting)} and is also a prompt for the "
                    f"concept {concept.text!r} that is to be erased. Both can't hold: take the "
                    "line out, or name a different concept.",
                    setting,
                )
