"""Erasures that were solved apart: what one run that solves them together must be asked for, and
what they change while they are applied together as they are.

Each was solved as if the others weren't there, so what they change besides adds up. One system for
all concepts (:class:`closed_form.EditRegression`) needs the texts in their records and nothing
else of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..method.closed_form import Metric
from ..method.collateral import Others, WordChanges, together
from ..method.language import (
    WITNESS_ROWS,
    Language,
    Words,
    is_read,
    read_language,
    second_moment,
)
from ..method.reading import Reading, choose_reading, plain_captions, those_naming
from ..model.denoiser import Denoiser
from ..settings.families import by_name
from ..settings.layers import reads_prompt
from ..settings.prompts import name_of, prompt_pairs
from ..settings.settings import EraseSettings, preset_settings
from ..settings.texts import KINDS, Concept, SettingsError, same_text
from .erasure import Erasure

TAGS = "tags"
# What a run that solves everything anew takes from the erasures: of these the largest that one of
# them was made with, and of those what the first was made with.
_LARGEST = ("rank", "captions", "eta")
_FROM_THE_FIRST = ("layers", "resolution", "guidance_scale")


def settings_together(records: Sequence[Mapping[str, Any]], seed: int = 0) -> EraseSettings:
    """The settings of one instant run that erases what several erasures erase.

    * Concepts, keep and negative prompts are those of all, in order and each once. Concepts that
      were taken out of an erasure stay out.
    * Of rank, captions and eta the largest counts: no concept gets less room, less of the rest of
      the language is protected, or less of a push than before. Of the room beside kept prompts it
      is the smallest. The protection is chosen anew.
    * Own templates are used if all have the same, else those of each concept's kind.
    * Prompts that one keeps and another erases are not kept, see :func:`warnings_together`.

    Args:
        records: of the erasures. Those of older versions may lack fields.

    Raises:
        SettingsError: fewer than two, different families, the soft form, concepts that contradict
            each other.
    """
    settings = _without_prompts(records, seed)
    out = [text for text, _ in _contradictions(records, settings)]
    kept, negatives = (
        [text for text in _texts(records, which) if text not in out]
        for which in ("keep", "negative_prompts")
    )
    return dataclasses.replace(settings, keep=tuple(kept), negative_prompts=tuple(negatives))


def warnings_together(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a person should know about :func:`settings_together`: what of theirs it doesn't take.

    Raises:
        SettingsError: as there.
    """
    settings = _without_prompts(records)
    warnings = [
        f"{text!r} is no longer kept, because {concept!r} is erased with it now. If it must stay, "
        f"leave the erasure of {concept!r} out."
        for text, concept in _contradictions(records, settings)
    ]
    own = [_of(record, "templates", ()) for record in records]
    if any(own) and not settings.templates:
        warnings.append(
            "The erasures were learned from different phrases. Together, each concept is learned "
            "from those of its kind, not from your own."
        )
    pushes = sorted({float(_of(record, "eta", 0.0)) for record in records})
    if len(pushes) > 1:
        warnings.append(
            f"The erasures were made with different eta ({', '.join(f'{one:g}' for one in pushes)})"
            f". Together there is one for all concepts, the largest: {settings.eta:g}."
        )
    return warnings


def kind_together(records: Sequence[Mapping[str, Any]]) -> str:
    """The kind that decides what is read of ordinary language.

    Tags if any concept is one, since only models that read tags have such erasures; else the
    first's.
    """
    kinds = [concept.kind for record in records for concept in _concepts_of(record)]
    return TAGS if TAGS in kinds else kinds[0]


def changes_together(
    applied: Sequence[tuple[Erasure, float]],
    denoiser: Denoiser,
    matrices: Mapping[str, Tensor],
    cache: MutableMapping[str, Tensor] | None = None,
) -> WordChanges | None:
    """How far words that nobody named change while several erasures are applied together.

    Args:
        applied: the erasures, each with its strength.
        denoiser: whose text encoder is asked; the model makes no prediction.
        matrices: the model's own, (out, width), by the names that the erasures have for them.
        cache: ordinary language as :func:`language.read_language` keeps it. Where it isn't there,
            the held-out words alone are read, which are some forty prompts.

    Returns:
        None where it can't be known: no words to judge by, matrices that don't read the prompt
        alone, or a text encoder that isn't the model's.
    """
    records = [erasure.record for erasure, _ in applied]
    known = by_name(records[0]["family"]).readers_known
    readers = {n: weight for n, weight in matrices.items() if known and reads_prompt(n)}
    captions = max(int(_of(record, "captions", 0)) for record in records)
    language = _language(denoiser, captions or None, kind_together(records), cache)
    width = language.moment.shape[1]
    if not readers or any(weight.shape[1] != width for weight in readers.values()):
        return None
    concepts = [concept for record in records for concept in _concepts_of(record)]
    spoken = [name_of(text, c.kind) for c in concepts for text in (*c.names, c.alternative) if text]
    others = Others(spoken, language, Metric.of(readers, language.moment))
    if not others.witnesses.texts:
        return None
    edit = together([(erasure.edit(), strength) for erasure, strength in applied])
    return others.of_edit(edit, others.witnesses.telling())


def _language(
    denoiser: Denoiser,
    captions: int | None,
    kind: str,
    cache: MutableMapping[str, Tensor] | None,
) -> Language:
    """Ordinary language from the cache, or only its held-out words."""
    reading = choose_reading(denoiser, plain_captions(captions), kind)
    if cache and is_read(denoiser, reading, cache):
        return read_language(denoiser, reading, cache)
    return _witnesses(denoiser, reading)


def _witnesses(denoiser: Denoiser, reading: Reading) -> Language:
    """The held-out words alone, with the second moment of their own prompts."""
    texts = [text for _, text in reading.witnesses] or [""]
    prompts = [prompt.tokens for prompt in denoiser.encode(texts, together=True)]
    longest, width = max(len(rows) for rows in prompts), prompts[0].shape[1]
    kept = min(longest, WITNESS_ROWS)
    rows = torch.zeros(len(prompts), kept, width)
    for row, tokens in zip(rows, prompts, strict=True):
        row[: len(tokens)] = tokens[:kept]
    counts = torch.ones(kept)
    counts[-1] += longest - kept  # the last row stands for the padding after it
    words = tuple(word for word, _ in reading.witnesses)
    nothing = Words((), torch.zeros(0, 2, width), torch.ones(2))
    return Language(second_moment(prompts), nothing, Words(words, rows[: len(words)], counts), 0.0)


def _without_prompts(records: Sequence[Mapping[str, Any]], seed: int = 0) -> EraseSettings:
    """The settings of all but for what is kept."""
    _refuse_what_cannot_be_joined(records)
    kind = kind_together(records)
    concepts = [
        dataclasses.replace(concept, kind="" if concept.kind == kind else concept.kind)
        for concept in _concepts(records)
    ]
    templates = {tuple(_of(record, "templates", ())) for record in records}
    numbers: dict[str, Any] = {
        name: max((_of(record, name) for record in records if _of(record, name)), default=None)
        for name in _LARGEST
    }
    # The least room: no prompt that was exact beside one concept is refused for want of it.
    numbers["keep_room"] = min(_of(r, "keep_room", EraseSettings.keep_room) for r in records)
    numbers |= {name: _of(records[0], name) for name in _FROM_THE_FIRST}
    return preset_settings(
        "instant",
        family=by_name(records[0].get("family", "")).defaults,
        concepts=concepts,
        kind=kind,
        form="hard",
        templates=templates.pop() if len(templates) == 1 else (),
        seed=seed,
        **numbers,
    )


def _refuse_what_cannot_be_joined(records: Sequence[Mapping[str, Any]]) -> None:
    if len(records) < 2:
        raise SettingsError(
            f"Joining needs at least two erasures, and there are {len(records)}. Connect another "
            "one, or apply the one as it is."
        )
    for record in records:
        if not record.get("concepts"):
            raise SettingsError(
                "The record of an erasure names no concepts, so nothing says what it erases. Train "
                "it again."
            )
    families = dict.fromkeys(record.get("family", "?") for record in records)
    if len(families) > 1:
        of = "; ".join(f"{_name(record)} for {record.get('family', '?')}" for record in records)
        raise SettingsError(
            f"The erasures are for models of different families ({of}), and no model has both. "
            "Join those of one family."
        )
    for record in records:
        if record.get("form", "hard") != "hard":
            raise SettingsError(
                f"The erasure of {_name(record)} is in the soft form, which is learned by training "
                "alone and can't be solved anew. Train it again in the hard form, or train all of "
                "the concepts in one run of the soft form."
            )


def _concepts(records: Sequence[Mapping[str, Any]]) -> list[Concept]:
    """The concepts of all, in order, each once and with its own kind.

    Raises:
        SettingsError: two that contradict each other.
    """
    found: list[Concept] = []
    for concept in (concept for record in records for concept in _concepts_of(record)):
        same = [other for other in found if _share_a_name(other, concept)]
        if same and not same_text(same[0].alternative, concept.alternative):
            raise SettingsError(
                f"{concept.text!r} is erased twice with different ends: {_end(same[0])} in one "
                f"erasure, {_end(concept)} in another. Take it out of one of them with Take "
                "Concepts Out, or leave one away."
            )
        if same:
            names = [*same[0].also, *_names_beside(same[0], concept)]
            found[found.index(same[0])] = dataclasses.replace(same[0], also=tuple(names))
        else:
            found.append(concept)
    for concept in found:
        _refuse_an_erased_alternative(concept, found)
    return found


def _share_a_name(one: Concept, other: Concept) -> bool:
    return any(same_text(name, own) for name in one.names for own in other.names)


def _names_beside(one: Concept, other: Concept) -> list[str]:
    """The names of another concept that one doesn't have."""
    return [name for name in other.names if not any(same_text(name, own) for own in one.names)]


def _refuse_an_erased_alternative(concept: Concept, every: Iterable[Concept]) -> None:
    if any(same_text(concept.alternative, name) for other in every for name in other.names):
        raise SettingsError(
            f"{concept.text!r} is replaced by {concept.alternative!r} in one erasure, and "
            f"{concept.alternative!r} is erased in another. Train {concept.text!r} again with a "
            "replacement that stays, or take one of the two out with Take Concepts Out."
        )


def _end(concept: Concept) -> str:
    return f"replaced by {concept.alternative!r}" if concept.alternative else "replaced by nothing"


def _contradictions(
    records: Sequence[Mapping[str, Any]], settings: EraseSettings
) -> Iterator[tuple[str, str]]:
    """Prompts that one erasure keeps and another erases, each with the concept that it names.

    Who erases cats and keeps tigers, and then erases tigers as well, wants no tigers: what was said
    to hold the rest in place yields to what was asked for. Where its own erasure allows a kept
    prompt to name the concept, it stays. Negative prompts name concepts often, and only one that is
    nothing but a prompt of the concept goes.
    """
    erased = [(name, concept.text) for concept in settings.concepts for name in concept.names]
    erased += [
        (pair.erased, settings.concepts[pair.concept].text) for pair in prompt_pairs(settings)
    ]
    for which in ("keep", "negative_prompts"):
        for text in _texts(records, which):
            named = [concept for prompt, concept in erased if same_text(prompt, text)]
            if which == "keep" and not named:
                named = _erased_by_others(text, records)
            if named:
                yield text, named[0]


def _erased_by_others(text: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Concepts that a kept prompt names, but for those of an erasure that keeps it itself."""
    named: list[str] = []
    allowed: set[str] = set()
    for record in records:
        concepts = [
            c.text
            for c in _concepts_of(record)
            if those_naming([text], [name_of(n, c.kind) for n in c.names])
        ]
        named += concepts
        if any(same_text(text, own) for own in _texts([record], "keep")):
            allowed.update(concept.casefold() for concept in concepts)
    return [concept for concept in named if concept.casefold() not in allowed]


def _texts(records: Iterable[Mapping[str, Any]], which: str) -> list[str]:
    """The prompts of all that must stay, in order, each once."""
    found: list[str] = []
    for text in (text for record in records for text in _of(record, which, ())):
        if not any(same_text(text, other) for other in found):
            found.append(text)
    return found


def _concepts_of(record: Mapping[str, Any]) -> list[Concept]:
    """What an erasure erases, each with its own kind."""
    kind = _of(record, "kind", KINDS[0])
    return [
        Concept(
            one["text"],
            one.get("alternative") or "",
            one.get("kind") or kind,
            tuple(one.get("also", ())),
        )
        for one in record["concepts"]
    ]


def _of(record: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A setting that an erasure was made with; the default where the record doesn't say."""
    value = (record.get("settings") or {}).get(name)
    return default if value is None else value


def _name(record: Mapping[str, Any]) -> str:
    return ", ".join(repr(concept["text"]) for concept in record["concepts"])
