"""The texts of a run as the text encoder gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..model.denoiser import Denoiser
from ..model.prompt import TOKENS, Encoded
from ..settings.prompts import PromptPair, prompt_pairs, with_article
from ..settings.settings import EraseSettings
from .alignment import (
    align_tokens,
    content_length,
    first_at,
    kept_in_front,
    rows_at,
    word_span,
)
from .closed_form import TokenTargets
from .readable import check_named, check_phrases


@dataclass(frozen=True)
class EncodedPair:
    """A prompt with the concept and its alternative.

    ``concept`` is the place of the concept in the settings.
    """

    erased: Encoded
    alternative: Encoded
    concept: int = 0


@dataclass(frozen=True)
class EncodedPrompts:
    """Every prompt that a run names.

    Attributes:
        pairs: the prompt pairs of all concepts.
        null: the null prompt.
        zeroed: what some workflows use in its place.
        negatives: the negative prompts.
        keep: the keep prompts with their texts, most important first.
        plain: plain captions that are held like keep prompts, where nothing else protects the
            prompts nobody named.
        warnings: what a person should know about texts that the encoder doesn't read as meant.
    """

    pairs: list[EncodedPair]
    null: Encoded
    zeroed: Encoded
    negatives: list[Encoded]
    keep: list[tuple[str, Encoded]]
    plain: list[Encoded] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _asked: _AskedPrompts | None = None

    @property
    def required(self) -> list[Encoded]:
        """What must be exact in any case: every form of the null prompt, the negative prompts.

        A null prompt of zeros is read as zeros, which nothing reaches, but behind layers that
        aren't edited it may be read as something else.
        """
        zeroed = [self.zeroed] if self.zeroed.read else []
        return [self.null, *self.negatives, *zeroed]

    @property
    def targets(self) -> list[TokenTargets]:
        """For each concept, its tokens and what they must become."""
        return self.targets_on(TOKENS)

    def targets_on(self, way: str) -> list[TokenTargets]:
        """For each concept, what enters on a way and what it must become."""
        assert self._asked is not None
        return self._asked.targets(way, self.null)

    @property
    def subjects(self) -> list[Tensor]:
        """For each name of a concept in a plain phrase rows of its last token and of the prompt's
        end, (2, size)."""
        assert self._asked is not None
        return self._asked.subjects()

    def read_by(self, denoiser: Denoiser) -> None:
        """Have the network read all of them, where it reads something else than was encoded."""
        assert self._asked is not None
        denoiser.read([*self._asked.texts.encoded.values(), self.zeroed])

    @property
    def held(self) -> list[Encoded]:
        """What the soft form holds beside the null prompt."""
        return [*self.negatives, *(prompt for _, prompt in self.keep), *self.plain]

    def tensors(self) -> list[Tensor]:
        """All embeddings, in a fixed order."""
        prompts = [prompt for pair in self.pairs for prompt in (pair.erased, pair.alternative)]
        prompts += [self.null, *self.negatives, *(prompt for _, prompt in self.keep)]
        return [tensor for prompt in prompts for tensor in prompt.tensors()]


def encode_prompts(settings: EraseSettings, denoiser: Denoiser) -> EncodedPrompts:
    """Encode the prompts of a run, each text once, as the host will when it samples.

    Raises:
        SettingsError: prompts that contradict each other, or that can't be read, see
            :mod:`.readable`.
        SubspaceError: a text encoder that gives no finite numbers.
    """
    texts, pairs = _Texts(denoiser), prompt_pairs(settings)
    warnings = check_named(settings, texts)
    asked = [_Asked.of(pair, texts) for pair in pairs]
    names = [name for concept in settings.concepts for name in concept.names]
    plain = [f"a photo of {with_article(name)}" for name in names]
    texts.encode([*(text for one in asked for text in one.texts()), *plain])
    warnings += check_phrases(settings, pairs, texts)
    return EncodedPrompts(
        pairs=[
            EncodedPair(texts.encoded[one.erased], texts.encoded[one.alternative], one.concept)
            for one in asked
        ],
        null=texts.encoded[""],
        zeroed=texts.encoded[""].zeroed(),
        negatives=[texts.encoded[text] for text in settings.negative_prompts],
        keep=[(text, texts.encoded[text]) for text in settings.keep],
        warnings=warnings,
        _asked=_AskedPrompts(settings, texts, asked, plain),
    )


@dataclass(frozen=True)
class _AskedPrompts:
    """The texts of a run with the parts that they play.

    What the network reads of them may be known later than what the encoder gives, so what they
    must become is worked out when it is asked for.
    """

    settings: EraseSettings
    texts: _Texts
    asked: list[_Asked]
    plain: list[str]
    _targets: dict[str, list[TokenTargets]] = field(default_factory=dict)

    def targets(self, way: str, null: Encoded) -> list[TokenTargets]:
        """See :meth:`EncodedPrompts.targets_on`."""
        if way not in self._targets:
            of_one = _targets if way == TOKENS or len(null.rows(way)) > 1 else _whole_targets
            eta = self.settings.eta if of_one is _targets else 0.0
            self._targets[way] = [
                of_one([one for one in self.asked if one.concept == concept], self.texts, way, eta)
                for concept in range(len(self.settings.concepts))
            ]
        return self._targets[way]

    def subjects(self) -> list[Tensor]:
        """See :attr:`EncodedPrompts.subjects`."""
        return [self.texts.subject(text) for text in self.plain]


class _Texts:
    """Texts with their token ids and embeddings, each asked for once."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self.ids: dict[str, list[int]] = {}
        self.encoded: dict[str, Encoded] = {}

    def length(self, text: str) -> int:
        """How many tokens a text has before its end token."""
        return content_length(self._ids_of(text), self._ids_of(""))

    def _ids_of(self, text: str) -> list[int]:
        if text not in self.ids:
            (self.ids[text],) = self._denoiser.token_ids([text])
        return self.ids[text]

    def as_long_as(self, text: str, candidates: Sequence[str]) -> str:
        """The first candidate with the same number of tokens, or the nearest to it."""
        wanted = self.length(text)
        for candidate in candidates:
            if self.length(candidate) == wanted:
                return candidate
        return min(candidates, key=lambda candidate: abs(self.length(candidate) - wanted))

    def encode(self, texts: Sequence[str]) -> None:
        """Encode those that aren't yet."""
        new = list(dict.fromkeys(text for text in texts if text not in self.encoded))
        self.encoded.update(zip(new, self._denoiser.encode(new), strict=True))
        for text in new:
            self._ids_of(text)

    def rows(self, text: str, way: str = TOKENS) -> Tensor:
        """What enters of a text on a way, (rows, size)."""
        return self.encoded[text].rows(way)

    def subject(self, text: str) -> Tensor:
        """Rows of a text's last token and of its end, (2, width)."""
        rows, places = self.rows(text), self.encoded[text].places(TOKENS)
        own = self._own_ids(TOKENS, text, "")
        ids, null = own or (self._row_ids(text), self._row_ids(""))
        places = list(range(len(rows))) if own else places
        _, end = word_span(ids, null)
        return rows[[first_at(places, min(place, len(ids) - 1)) for place in (end - 1, end)]]

    def roles(self, text: str, other: str, way: str = TOKENS) -> list[int]:
        """For each row of a text that enters on a way, the row of the other that plays its part."""
        own_ids = self._own_ids(way, text, other, "")
        if own_ids:
            return align_tokens(*own_ids)
        roles = align_tokens(*(self._row_ids(one) for one in (text, other, "")))
        own, its = (self.encoded[one].places(way) for one in (text, other))
        return rows_at(own, its, roles)

    def _own_ids(self, way: str, *texts: str) -> list[list[int]]:
        """Ids of the rows that enter on a way, where they aren't the encoder's; else []."""
        found = [self.encoded[text].read.get(way) for text in texts]
        ids = [list(one.ids) for one in found if one and one.ids]
        return ids if len(ids) == len(texts) else []

    def _row_ids(self, text: str) -> list[int]:
        """The ids of the rows that the encoder gives: it may keep some tokens to itself."""
        ids, count = self._ids_of(text), len(self.encoded[text].tokens)
        start = min(self._head, max(0, len(ids) - count))
        return ids[start : start + count]

    @cached_property
    def _head(self) -> int:
        """How many tokens in front, such as those of a chat's template, have no row."""
        longest = max(self.encoded, key=lambda text: len(self._ids_of(text)))
        return kept_in_front(
            *((self._ids_of(text), self.encoded[text].tokens) for text in ("", longest))
        )


@dataclass(frozen=True)
class _Asked:
    """The texts of a pair, its neutral prompts chosen by their length."""

    erased: str
    alternative: str
    neutral: str
    neutral_alternative: str
    concept: int

    @classmethod
    def of(cls, pair: PromptPair, texts: _Texts) -> _Asked:
        neutral = texts.as_long_as(pair.erased, pair.neutral)
        alternative, neutral_alternative = pair.alternative or neutral, ""
        if pair.neutral_alternative:
            neutral_alternative = texts.as_long_as(alternative, pair.neutral_alternative)
        return cls(pair.erased, alternative, neutral, neutral_alternative, pair.concept)

    def texts(self) -> list[str]:
        every = (self.erased, self.alternative, self.neutral, self.neutral_alternative)
        return [text for text in every if text]


def _targets(asked: Sequence[_Asked], texts: _Texts, way: str, eta: float) -> TokenTargets:
    sources = [texts.rows(one.erased, way) for one in asked]
    targets = [_target(one, texts, way) for one in asked]
    source, target = torch.cat(sources), torch.cat(targets)
    # As for the guidance (``guidance.surgical_target``): beyond the alternative, away from the
    # concept.
    return TokenTargets(source, target + eta * (target - source))


def _whole_targets(asked: Sequence[_Asked], texts: _Texts, way: str, _eta: float) -> TokenTargets:
    """Of a way on which each prompt has one row: that of the alternative."""
    return TokenTargets(
        torch.cat([texts.rows(one.erased, way) for one in asked]),
        torch.cat([texts.rows(one.alternative, way) for one in asked]),
    )


def _target(one: _Asked, texts: _Texts, way: str) -> Tensor:
    """What the tokens of an erased prompt must become, (tokens, width).

    ``n_e + (a - n_a)``: what the alternative says, which is what sets it apart from a neutral word
    in its own place, said at the places of the erased prompt. Taken as they are, the tokens of an
    alternative of another length would ask every later token to become the one some places on:
    place, not concept, and that is what ruins words nobody named. Where both are equally long and
    have the same article, ``n_e = n_a`` and the target is the alternative itself.
    """

    def in_place(text: str) -> Tensor:
        return texts.rows(text, way)[texts.roles(one.erased, text, way)]

    alternative = in_place(one.alternative)
    if not one.neutral_alternative or one.neutral_alternative == one.neutral:
        return alternative
    place = in_place(one.neutral)
    roles = texts.roles(one.erased, one.alternative, way)
    own = texts.rows(one.neutral_alternative, way)[roles]
    return place + alternative - own
