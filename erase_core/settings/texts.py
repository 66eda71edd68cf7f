"""What a person types: lines of prompts, and concepts with what takes their place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("object", "style", "person", "tags")
ARROW = "=>"

# Limits that no use known to us comes near. Beyond them a text was connected by mistake, and
# reading it would take hours.
MOST_CONCEPTS = 100
MOST_LINES = 500
MOST_CHARACTERS = 5000  # of one line; CLIP reads 77 tokens at a time, some 300 characters

# "cat -> dog" and the like are meant as "cat => dog". Not within an emoticon among the tags of
# anime models, such as ":->".
_ARROWS = re.compile(
    r"\s*(?:=>|[⇒→➔➜➝➞⟶⟹⭢🡒]|(?<![^\s\w)\]\"'.,!?])(?:-+|=+|—|–|－|＝|~)[>＞](?![^\s\w(\[\"'.,!?#]))\s*"
)
# "cat | kitten" are two names of one concept. Not the bars of emoticons among tags, such as "|_|".
_BAR = re.compile(r"(?:^|\s+)\|(?:\s+|$)|(?<=\w)\|(?=\w)")
# What people write where they mean that nothing takes the place.
_NOTHING = frozenset(("none", "null", "nothing"))
_COMMENT = re.compile(r"#(?:[\s#]|$)")


class SettingsError(ValueError):
    """A setting that can't work. The message says what is wrong, what was given, what to do.

    Attributes:
        setting: name of the field of :class:`settings.EraseSettings` that it is about; "" where it
            is about none in particular.
    """

    def __init__(self, message: str, setting: str = "") -> None:
        super().__init__(message)
        self.setting = setting


@dataclass(frozen=True)
class Concept:
    """One thing to erase.

    Attributes:
        text: what the model must stop drawing, as a user types it ("cat", "Van Gogh").
        alternative: what takes its place; empty means nothing in particular, a neutral word.
        kind: a key of :data:`KINDS`; empty for that of the settings.
        also: other names of the same thing ("kitten", "tomcat"), which go with it.
    """

    text: str
    alternative: str = ""
    kind: str = ""
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names of it, the one that it is called by first."""
        return (self.text, *self.also)

    def __str__(self) -> str:
        names = " | ".join(self.names)
        return f"{names} {ARROW} {self.alternative}" if self.alternative else names


def concept_values(concept: Concept) -> dict[str, Any]:
    """A concept as plain JSON values; other names only where it has some, as before there were."""
    values = dataclasses.asdict(concept)
    also = list(values.pop("also"))
    return {**values, "also": also} if also else values


def parse_concepts(given: Any, alternative: Any = "") -> tuple[Concept, ...]:
    """Concepts from text, one a line, ``cat => dog`` naming what takes its place.

    Arrows of other shapes (``->``, ``→``) are read as ``=>``, "none" after one as nothing, and a
    line that begins with ``#`` and a blank is a comment. ``cat | kitten => dog`` gives one concept
    several names.

    Args:
        given: text, or a sequence of texts, :class:`Concept` objects or their dictionaries.
        alternative: what takes the place of those that name nothing themselves.

    Raises:
        SettingsError: nothing to erase, a line that can't be read, a concept named twice, of an
            unknown kind, or one that is its own or another concept's alternative.
    """
    alternative = _shared_alternative(alternative)
    lines = given_lines("concepts", given)
    concepts = [c for c in (_concept(line, alternative) for line in lines) if c is not None]
    if not concepts:
        raise SettingsError(
            "Nothing to erase: the concept is empty. Type what the model must stop drawing, "
            "for example 'cat'.",
            "concepts",
        )
    if len(concepts) > MOST_CONCEPTS:
        raise SettingsError(
            f"At most {MOST_CONCEPTS} concepts can be erased in one run, not {len(concepts)}. "
            "Erase the rest in further runs.",
            "concepts",
        )
    _check_concepts(concepts)
    return tuple(concepts)


def refuse_unfinished(given: Any) -> None:
    """Refuse lines that end with their arrow, which a person has most likely not finished.

    Who typed one is asked; to :func:`parse_concepts` nothing after an arrow is nothing in
    particular.

    Raises:
        SettingsError: there is one.
    """
    for line in given_lines("concepts", given):
        text = line.strip() if isinstance(line, str) else ""
        name, *after = (part.strip() for part in _ARROWS.split(text))
        if name and after == [""] and not _COMMENT.match(text):
            raise SettingsError(
                f"The line {text!r} names nothing after the arrow. Write what to draw instead, "
                f"{name} {ARROW} dog, or {name!r} alone to remove it.",
                "concepts",
            )


def concept_names(given: Any) -> tuple[str, ...]:
    """Names of concepts from text, one a line; of ``cat => dog`` what stands before the arrow.

    Blank and repeated lines are dropped.

    Raises:
        SettingsError: a line that can't be read.
    """
    concepts = (_concept(line, "") for line in given_lines("concepts", given))
    return distinct_lines("concepts", [name for c in concepts if c is not None for name in c.names])


def same_text(one: str, other: str) -> bool:
    """Whether two texts are one prompt to a text encoder that folds case and white space."""
    return folded(one) == folded(other)


def folded(text: str) -> str:
    """A text as an encoder that folds case and white space reads it."""
    return " ".join(text.casefold().split())


def plain_text(setting: str, value: Any) -> str:
    """A text without blanks around it.

    Raises:
        SettingsError: something else than text, or text with half of a character, which no text
            encoder and no file takes.
    """
    if not isinstance(value, str):
        raise SettingsError(f"{label(setting)} must be text, not {_shown(value)}.", setting)
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise SettingsError(
            f"{label(setting)} has half of a character in it: {ascii(value[:60])}. Type the text "
            "again; where it was copied from, a character was cut in two.",
            setting,
        )
    return value.strip()


def distinct_lines(setting: str, given: Any) -> tuple[str, ...]:
    """The lines of a text, or the texts of a sequence, without blank, repeated and comment lines.

    Raises:
        SettingsError: too many lines, too long ones, or something else than text.
    """
    found: dict[str, str] = {}
    for line in given_lines(setting, given):
        text = plain_text(setting, line)
        if text and not _COMMENT.match(text):
            found.setdefault(folded(text), text)
    return tuple(found.values())


def given_lines(setting: str, given: Any) -> Sequence[Any]:
    """A text as its lines; a sequence as it is; nothing for None, which an empty link gives.

    Raises:
        SettingsError: too many lines, too long ones, or neither text nor a sequence.
    """
    if given is None:
        return ()
    if isinstance(given, str):
        given = () if given.strip() == str(None) else given.splitlines()
    elif isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise SettingsError(f"{label(setting)} must be text, not {_shown(given)}.", setting)
    lines = list(given)
    if len(lines) > MOST_LINES:
        raise SettingsError(
            f"{label(setting)} can have {MOST_LINES} lines at most, not {len(lines)}. Take out "
            "what isn't needed.",
            setting,
        )
    for number, line in enumerate(lines, start=1):
        if isinstance(line, str) and len(line) > MOST_CHARACTERS:
            raise SettingsError(
                f"Line {number} of {label(setting)} has {len(line):,} characters, and "
                f"{MOST_CHARACTERS:,} are the most that is read. Shorten it: it begins with "
                f"{line[:40]!r}.",
                setting,
            )
    return lines


def label(setting: str) -> str:
    """A setting's name as people read it."""
    return {"concepts": "concept"}.get(setting, setting.replace("_", " "))


def line_warnings(concepts: Sequence[Concept], kind: str) -> list[str]:
    """What a person should know who may have meant several lines, or none.

    Args:
        kind: of the concepts that name none themselves.
    """
    warnings = []
    for concept in concepts:
        several = [part.strip() for part in re.split(r"[,;]", concept.text) if part.strip()]
        if len(several) > 1:
            warnings.append(
                f"{concept.text!r} is erased as one phrase. If you mean {len(several)} concepts, "
                f"write each on a line of its own: {', '.join(map(repr, several))}. If they are "
                f"names of one: {' | '.join(several)}"
            )
        if concept.text.startswith("#") and (concept.kind or kind) != "tags":
            warnings.append(
                f"{concept.text!r} is erased with its #. To leave a line out, write a blank after "
                f"the #: '# {concept.text[1:]}'."
            )
    return warnings


def _shared_alternative(given: Any) -> str:
    """What takes the place of every concept that names nothing itself."""
    given = "" if given is None else plain_text("replace_with", given)
    lines = given.splitlines()
    if len(lines) > 1:
        raise SettingsError(
            f"replace with is one text for all concepts and has {len(lines)} lines: "
            f"{', '.join(map(repr, lines[:3]))}. Write what replaces each concept on its own line "
            f"under 'erase': cat {ARROW} dog",
            "replace_with",
        )
    if given.startswith(ARROW):  # "=> dog" in this place can only mean "dog"
        given = given.removeprefix(ARROW).strip()
    if _ARROWS.search(given):
        raise SettingsError(
            f"replace with is {given!r}, and is to be what is drawn instead, alone. Write "
            f"'{given}' under 'erase' if you mean a concept and what replaces it.",
            "replace_with",
        )
    return "" if given.casefold() in _NOTHING else given


def _concept(line: Any, alternative: str) -> Concept | None:
    if isinstance(line, Mapping):
        texts = {key: line.get(key, "") for key in ("text", "alternative", "kind")}
        line = Concept(**texts, also=tuple(line.get("also", ())))
    also: list[str] = []
    if isinstance(line, Concept):
        given = (line.text, line.alternative, line.kind, *line.also)
        text, own, kind, *also = (plain_text("concepts", part) for part in given)
        parts = [*(part.strip() for part in text.split(ARROW)), *([own] if own else [])]
    else:
        text, kind = plain_text("concepts", line), ""
        parts = [] if _COMMENT.match(text) else [part.strip() for part in _ARROWS.split(text)]
    if not any(parts):
        return None
    if len(parts) > 2 or not parts[0]:
        raise SettingsError(
            f"The line {str(line)!r} can't be read. Write the concept alone, or: cat {ARROW} dog",
            "concepts",
        )
    own = parts[1] if len(parts) == 2 else alternative
    first, *more = filter(None, (name.strip() for name in _BAR.split(parts[0])))
    names = dict.fromkeys([*more, *filter(None, also)])
    return Concept(first, "" if own.casefold() in _NOTHING else own, kind, tuple(names))


def _check_concepts(concepts: Sequence[Concept]) -> None:
    seen: dict[str, Concept] = {}
    for concept in concepts:
        if concept.kind and concept.kind not in KINDS:
            raise SettingsError(
                f"Unknown kind {concept.kind!r} of {concept.text!r}. Choose one of: "
                f"{', '.join(KINDS)}.",
                "kind",
            )
        for name in concept.names:
            if same_text(name, concept.alternative):
                raise SettingsError(
                    f"The concept and what replaces it are the same: {name!r}. Name something "
                    "else, or leave the replacement empty to remove the concept.",
                    "concepts",
                )
            if folded(name) in seen:
                raise SettingsError(f"{name!r} is named twice. Take one of them out.", "concepts")
            seen[folded(name)] = concept
    for concept in concepts:
        if concept.alternative and folded(concept.alternative) in seen:
            raise SettingsError(
                f"{concept.text!r} is to be replaced by {concept.alternative!r}, which is to be "
                "erased itself. Name a replacement that stays.",
                "concepts",
            )
        if _BAR.search(concept.alternative):
            raise SettingsError(
                f"{concept.text!r} is to be replaced by {concept.alternative!r}. Only what is "
                "erased can have several names: name one replacement.",
                "concepts",
            )


def _shown(value: Any) -> str:
    """A value of the wrong type, short enough for a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}... ({type(value).__name__})"
