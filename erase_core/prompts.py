"""The prompts an erasure is trained on: templates with the concept, its alternative, or without."""

from __future__ import annotations

from dataclasses import dataclass

from .settings import EraseSettings, SettingsError, same_text


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
    """A prompt with the concept (``erased``) and what must be drawn instead (``alternative``)."""

    erased: str
    alternative: str


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

TEMPLATES = {"object": OBJECT_TEMPLATES, "style": STYLE_TEMPLATES}


def prompt_pairs(settings: EraseSettings) -> list[PromptPair]:
    """The training prompts of a concept, one pair a template.

    Raises:
        SettingsError: when a prompt that must be kept is itself a prompt to erase.
    """
    pairs = []
    for template in TEMPLATES[settings.kind]:
        alternative = (
            template.fill(_bare(settings, settings.alternative))
            if settings.alternative
            else template.without
        )
        pairs.append(PromptPair(template.fill(_bare(settings, settings.concept)), alternative))
    _refuse_contradictions(settings, pairs)
    return pairs


def with_article(concept: str) -> str:
    """The concept as it stands in a sentence: "a cat", "an owl"; names and plurals stay bare."""
    first = concept.split()[0].casefold()
    is_name = concept[:1].isupper()
    is_plural = concept.endswith("s") and not concept.endswith(("ss", "us", "is"))
    if is_name or is_plural or first in {"a", "an", "the", "some", "my"}:
        return concept
    return f"{'an' if first[0] in 'aeiou' else 'a'} {concept}"


def _bare(settings: EraseSettings, concept: str) -> str:
    """A style without the word "style", which the templates add themselves."""
    words = concept.split()
    if settings.kind == "style" and len(words) > 1 and words[-1].casefold() == "style":
        return " ".join(words[:-1])
    return concept


def _refuse_contradictions(settings: EraseSettings, pairs: list[PromptPair]) -> None:
    erased = [settings.concept, *(pair.erased for pair in pairs)]
    for label, prompts in (
        ("keep", settings.keep),
        ("negative prompts you use", settings.negative_prompts),
    ):
        for prompt in prompts:
            if any(same_text(prompt, text) for text in erased):
                raise SettingsError(
                    f"{prompt!r} is under '{label}' and is also a prompt for the concept "
                    f"{settings.concept!r} that is to be erased. Both can't hold: take the line "
                    "out, or name a different concept."
                )
