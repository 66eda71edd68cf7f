"""Whether the text encoder can read the texts of a run, before anything else is asked of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from ..model.prompt import Encoded
from ..settings.prompts import PromptPair
from ..settings.settings import EraseSettings, SettingsError
from .alignment import STREAM_IDS, VECTOR_IDS
from .subspace import NOT_FINITE, SubspaceError

# How a prompt of ComfyUI calls a textual inversion. Other hosts read that as words.
_EMBEDDING = re.compile(r"(?:^|(?<=[\s()]))embedding:((?:\\[()]|[^\s()])+)")
_WEIGHT_BEHIND = re.compile(r":[-+.\de]*$", re.IGNORECASE)
# No model draws from embeddings so many times as large as those of the empty prompt. The weights
# that people write, up to about 2, make them twice as large; beside much larger ones everything
# else is lost in rounding.
LARGEST = 100.0


class Texts(Protocol):
    """Texts with their token ids and embeddings, each asked for once."""

    ids: dict[str, list[int]]
    encoded: dict[str, Encoded]

    def encode(self, texts: Sequence[str]) -> None:
        """Encode those that aren't yet."""


def check_named(settings: EraseSettings, texts: Texts) -> list[str]:
    """Encode the texts that the user named, and see whether there is something in them.

    Returns:
        What a person should know about those that can be done without.

    Raises:
        SettingsError: a concept or a replacement of which nothing is read or an embedding isn't
            found; any text that has no finite embeddings, or far too large ones.
        SubspaceError: the text encoder itself gives such numbers.
    """
    places = _places(settings)
    texts.encode(["", *places])
    refuse_out_of_range(texts, places)
    needed = {text for c in settings.concepts for text in (*c.names, c.alternative) if text}
    warnings = []
    for text, place in places.items():
        problem = _nothing_read(text, place, texts, text in needed)
        if problem and text in needed:
            raise SettingsError(problem)
        warnings += [problem] if problem else []
    return warnings


def check_phrases(settings: EraseSettings, pairs: Sequence[PromptPair], texts: Texts) -> list[str]:
    """The same for the phrases that the concepts stand in.

    Raises:
        SettingsError: a phrase in which the embedding of its concept is read as something else.
        SubspaceError: see :func:`check_named`.
    """
    refuse_out_of_range(texts, _places(settings))
    warnings = {}
    for pair in pairs:
        concept = settings.concepts[pair.concept]
        for text, prompt in ((pair.name, pair.erased), (concept.alternative, pair.alternative)):
            if not text or not prompt:
                continue
            if not _vectors(text, texts) <= _vectors(prompt, texts):
                raise SettingsError(
                    f"In the phrase {prompt!r} the text encoder doesn't find {text!r}. Leave a "
                    "space or a comma between {} and what stands beside it in the template."
                )
            for name in _missing(prompt, texts) if settings.templates else ():
                warnings[name] = (
                    f"The phrase {prompt!r} is read without the embedding {name!r}, which isn't "
                    f"found. {_ADVICE}"
                )
    return list(warnings.values())


def _largest(prompt: Encoded) -> float:
    """Size of the largest token embedding; 0 of a prompt that has none."""
    return float(prompt.tokens.norm(dim=1).max()) if len(prompt.tokens) else 0.0


def refuse_out_of_range(texts: Texts, places: Mapping[str, str]) -> None:
    """No algebra can be done on what isn't finite, and none is right on what is far too large.

    Args:
        places: where the user named a text; others are phrases.

    Raises:
        SettingsError: a text that comes out so.
        SubspaceError: the empty prompt does, hence all others.
    """
    null = texts.encoded[""]
    if not _finite(null):
        raise SubspaceError(NOT_FINITE)
    usual = _largest(null)
    for text, prompt in texts.encoded.items():
        where = f" under {places[text]!r}" if text in places else ", one of the phrases,"
        if not _finite(prompt):
            raise SettingsError(
                f"{text!r}{where} comes out of the text encoder as infinity or as no number at "
                "all. Write a weight near 1 into its brackets, such as (cat:1.2), and check the "
                "embeddings that it names."
            )
        size = _largest(prompt)
        if size > LARGEST * usual > 0:
            raise SettingsError(
                f"{text!r}{where} comes out of the text encoder {size / usual:.3g} times as large "
                f"as the empty prompt (at most {LARGEST:g} times is taken), and no model draws "
                "from that. Write a weight near 1 into its brackets, such as (cat:1.2)."
            )


_ADVICE = (
    "Check its name, that its file lies in the embeddings folder, and that it was made for this "
    "kind of model."
)


def _places(settings: EraseSettings) -> dict[str, str]:
    """The texts that the user named, each with the input that it stands in."""
    places: dict[str, str] = {}
    for concept in settings.concepts:
        places |= dict.fromkeys(concept.names, "erase")
        if concept.alternative:
            places[concept.alternative] = "replace with"
    for text in settings.keep:
        places.setdefault(text, "keep")
    for text in settings.negative_prompts:
        places.setdefault(text, "negative prompts")
    return places


def _nothing_read(text: str, place: str, texts: Texts, needed: bool) -> str:
    """What is wrong with a text of which nothing, or not all, is read; "" if nothing is.

    Args:
        needed: whether its tokens must say something; else the pooled vector will do.
    """
    names = list(_missing(text, texts))
    if _same(texts.encoded[text], texts.encoded[""], tokens_alone=needed):
        if needed:
            advice = _ADVICE if names or _EMBEDDING.search(text) else "Write it in words."
        else:
            advice = f"It counts as empty. {_ADVICE}" if names else "It counts as empty."
        return f"The text encoder reads nothing in {text!r} under {place!r}. {advice}"
    if not names:
        return ""
    found = ", ".join(map(repr, names))
    rest = "" if needed else ", and the rest of it is read without"
    return f"{text!r} under {place!r} names an embedding that isn't found: {found}{rest}. {_ADVICE}"


def _missing(text: str, texts: Texts) -> Iterator[str]:
    """Names of the embeddings in a text without which it reads the same."""
    for found in _EMBEDDING.finditer(text):
        name = found[1].rstrip(",")  # the host leaves commas behind it to the text
        without = text[: found.start()] + found[1][len(name) :] + text[found.end() :]
        texts.encode([text, without])
        if _same(texts.encoded[text], texts.encoded[without]):
            yield _WEIGHT_BEHIND.sub("", name)


def _vectors(text: str, texts: Texts) -> set[int]:
    texts.encode([text])
    return {token for token in texts.ids[text] if token % STREAM_IDS >= VECTOR_IDS}


def _finite(prompt: Encoded) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in prompt.tensors())


def _same(one: Encoded, other: Encoded, tokens_alone: bool = False) -> bool:
    if tokens_alone:
        return torch.equal(one.tokens, other.tokens)
    return all(map(torch.equal, one.tensors(), other.tensors()))
