"""The prompts an erasure is trained on: templates with the concept, its alternative, or without."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .settings import ARROW, Concept, EraseSettings, SettingsError, same_text


@dataclass(frozen=True)
class Template:
    """One phrasing.

    Attributes:
        text: the prompt; ``{}`` is the bare concept, ``{a}`` the concept with its article.
        without: the same prompt when the concept is simply left out.
    """

    text: str
    without: str

    def fill(self, concept: str) -> str:
        """The prompt with ``concept`` in it."""
        return self.text.replace("{a}", with_article(concept)).replace("{}", concept)


@dataclass(frozen=True)
class PromptPair:
    """A prompt with the concept (``erased``) and what must be drawn instead (``alternative``).

    ``concept`` is the place of the concept in the settings.
    """

    erased: str
    alternative: str
    concept: int = 0


OBJECT_TEMPLATES = (
    Template("{}", ""),
    Template("a photo of {a}", "a photo"),
    Template("{a} in a garden", "a garden"),
    Template("a painting of {a}", "a painting"),
    Template("{a} next to a wooden chair", "a wooden chair"),
    Template("a pencil drawing of {a} on white paper", "a pencil drawing on white paper"),
    Template("a street at night with {a}", "a street at night"),
    Template("close-up of {a}, soft light", "close-up, soft light"),
    Template("a 3d render of {a}, studio lighting", "a 3d render, studio lighting"),
    Template("two people looking at {a}", "two people"),
    Template("{}, highly detailed, masterpiece", "highly detailed, masterpiece"),
    Template("{a} in watercolor style", "watercolor style"),
)

STYLE_TEMPLATES = (
    Template("{} style", ""),
    Template("a painting in {} style", "a painting"),
    Template("a house in {} style", "a house"),
    Template("a portrait of a woman in {} style", "a portrait of a woman"),
    Template("a bowl of fruit, {} style", "a bowl of fruit"),
    Template("a city street in {} style, detailed", "a city street, detailed"),
    Template("a horse running in a field, {} style", "a horse running in a field"),
    Template("{} style drawing of a ship", "a drawing of a ship"),
    Template("a mountain landscape, {}", "a mountain landscape"),
    Template("an old man reading a book in {} style", "an old man reading a book"),
    Template("a car in {} style", "a car"),
    Template("{}", ""),
)

PERSON_TEMPLATES = (
    Template("{}", "a person"),
    Template("a photo of {}", "a photo of a person"),
    Template("a portrait of {}, studio lighting", "a portrait of a person, studio lighting"),
    Template("{} smiling at the camera", "a person smiling at the camera"),
    Template("a movie still of {}", "a movie still of a person"),
    Template("{} walking in a park", "a person walking in a park"),
    Template("an oil painting of {}", "an oil painting of a person"),
    Template("{} giving a speech on a stage", "a person giving a speech on a stage"),
    Template("{} and a friend in a cafe", "a person and a friend in a cafe"),
    Template("close-up of the face of {}", "close-up of the face of a person"),
    Template("{} in a red jacket, full body", "a person in a red jacket, full body"),
    Template("a black and white photo of {} at a desk", "a black and white photo of a person"),
)

TAG_TEMPLATES = (
    Template("{}", ""),
    Template("1girl, {}, solo, looking at viewer", "1girl, solo, looking at viewer"),
    Template("masterpiece, best quality, {}", "masterpiece, best quality"),
    Template("1boy, {}, standing, outdoors", "1boy, standing, outdoors"),
    Template("{}, simple background, white background", "simple background, white background"),
    Template("no humans, {}, scenery, blue sky", "no humans, scenery, blue sky"),
    Template("{}, upper body, smile, indoors", "upper body, smile, indoors"),
    Template("score_9, score_8_up, {}, full body", "score_9, score_8_up, full body"),
    Template("2girls, {}, sitting, night, city lights", "2girls, sitting, night, city lights"),
    Template("very aesthetic, absurdres, {}, close-up", "very aesthetic, absurdres, close-up"),
    Template("{}, monochrome, sketch", "monochrome, sketch"),
    Template("solo, {}, from side, wind, flower", "solo, from side, wind, flower"),
)

TEMPLATES = {
    "object": OBJECT_TEMPLATES,
    "style": STYLE_TEMPLATES,
    "person": PERSON_TEMPLATES,
    "tags": TAG_TEMPLATES,
}

# An opening bracket that the host reads as emphasis: not escaped, and not closed by a weight.
_BARE_BRACKET = re.compile(r"(?<!\\)\((?![^()]*:\s*[\d.]+\s*\))")


def templates(settings: EraseSettings) -> list[Template]:
    """The phrasings of a run: the user's own if there are any, else those of the kind."""
    if not settings.templates:
        return list(TEMPLATES[settings.kind])
    own = []
    for line in settings.templates:
        text, _, without = (part.strip() for part in line.partition(ARROW))
        own.append(Template(text, without or _left_out(text)))
    return own


def prompt_pairs(settings: EraseSettings) -> list[PromptPair]:
    """The training prompts of all concepts, one pair for each template and concept.

    Raises:
        SettingsError: when a prompt that must be kept is itself a prompt to erase.
    """
    pairs = []
    for index, concept in enumerate(settings.concepts):
        for template in templates(settings):
            instead = (
                template.fill(_bare(settings, concept.alternative))
                if concept.alternative
                else template.without
            )
            erased = template.fill(_bare(settings, concept.text))
            pairs.append(PromptPair(erased, instead, index))
    _refuse_contradictions(settings, pairs)
    return pairs


def prompt_warnings(settings: EraseSettings) -> list[str]:
    """What a person should know about the texts they gave: brackets that the host reads away."""
    if settings.kind != "tags":
        return []
    concepts = [text for c in settings.concepts for text in (c.text, c.alternative)]
    texts = [*concepts, *settings.keep, *settings.negative_prompts, *settings.templates]
    return [
        f"The brackets in {text!r} are read as emphasis and are not part of the tag. If they "
        f"belong to it, write {_escaped(text)!r}."
        for text in texts
        if _BARE_BRACKET.search(text)
    ]


def with_article(concept: str) -> str:
    """The concept as it stands in a sentence: "a cat", "an owl"; names and plurals stay bare."""
    first = concept.split()[0].casefold()
    is_tag = "_" in concept or "\\" in concept
    is_name = concept[:1].isupper()
    is_plural = concept.endswith("s") and not concept.endswith(("ss", "us", "is"))
    if is_tag or is_name or is_plural or first in {"a", "an", "the", "some", "my"}:
        return concept
    return f"{'an' if first[0] in 'aeiou' else 'a'} {concept}"


def _bare(settings: EraseSettings, concept: str) -> str:
    """A style without the word "style", which the templates add themselves."""
    words = concept.split()
    if settings.kind == "style" and len(words) > 1 and words[-1].casefold() == "style":
        return " ".join(words[:-1])
    return concept


def _left_out(text: str) -> str:
    """A template of the user's without the concept and the commas and spaces around it."""
    rest = re.sub(r"\{a\}|\{\}", "", text)
    rest = re.sub(r"(\s*,)+", ",", rest)
    return re.sub(r"\s+", " ", rest).strip(" ,")


def _escaped(text: str) -> str:
    return re.sub(r"(?<!\\)([()])", r"\\\1", text)


def _refuse_contradictions(settings: EraseSettings, pairs: list[PromptPair]) -> None:
    erased: list[tuple[str, Concept]] = [(c.text, c) for c in settings.concepts]
    erased += [(pair.erased, settings.concepts[pair.concept]) for pair in pairs]
    for label, prompts in (
        ("keep", settings.keep),
        ("negative prompts you use", settings.negative_prompts),
    ):
        for prompt in prompts:
            for text, concept in erased:
                if same_text(prompt, text):
                    raise SettingsError(
                        f"{prompt!r} is under '{label}' and is also a prompt for the concept "
                        f"{concept.text!r} that is to be erased. Both can't hold: take the line "
                        "out, or name a different concept."
                    )
