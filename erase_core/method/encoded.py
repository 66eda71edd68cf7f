"""The texts of a run as the text encoder gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.denoiser import Denoiser
from ..model.prompt import Encoded
from ..settings.prompts import PromptPair, prompt_pairs, with_article
from ..settings.settings import EraseSettings
from .alignment import align_tokens, content_length, word_span
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
        targets: for each concept, its tokens and what they must become.
        null: the null prompt.
        negatives: the negative prompts.
        keep: the keep prompts with their texts, most important first.
        plain: plain captions that are held like keep prompts, where nothing else protects the
            prompts nobody named.
        subjects: for each name of a concept in a plain phrase the rows of its last token and of
            the prompt's end, (2, width).
        warnings: what a person should know about texts that the encoder doesn't read as meant.
    """

    pairs: list[EncodedPair]
    targets: list[TokenTargets]
    null: Encoded
    negatives: list[Encoded]
    keep: list[tuple[str, Encoded]]
    plain: list[Encoded] = field(default_factory=list)
    subjects: list[Tensor] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

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
        targets=[
            _targets([one for one in asked if one.concept == concept], texts, settings.eta)
            for concept in range(len(settings.concepts))
        ],
        null=texts.encoded[""],
        negatives=[texts.encoded[text] for text in settings.negative_prompts],
        keep=[(text, texts.encoded[text]) for text in settings.keep],
        subjects=[texts.subject(text) for text in plain],
        warnings=warnings,
    )


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

    def rows(self, text: str) -> Tensor:
        """Token embeddings of a text, (tokens, width)."""
        return self.encoded[text].tokens

    def subject(self, text: str) -> Tensor:
        """Rows of a text's last token and of its end, (2, width)."""
        rows = self.rows(text)
        _, end = word_span(self._ids_of(text), self._ids_of(""))
        return rows[[min(end - 1, len(rows) - 1), min(end, len(rows) - 1)]]

    def roles(self, text: str, other: str) -> list[int]:
        """For each row of a text, the row of the other that plays its part."""
        # A host may give tokens that its encoder keeps to itself.
        return align_tokens(*(self.ids[one][: len(self.rows(one))] for one in (text, other, "")))


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


def _targets(asked: Sequence[_Asked], texts: _Texts, eta: float) -> TokenTargets:
    sources = [texts.rows(one.erased) for one in asked]
    targets = [_target(one, texts) for one in asked]
    source, target = torch.cat(sources), torch.cat(targets)
    # As for the guidance (``guidance.surgical_target``): beyond the alternative, away from the
    # concept.
    return TokenTargets(source, target + eta * (target - source))


def _target(one: _Asked, texts: _Texts) -> Tensor:
    """What the tokens of an erased prompt must become, (tokens, width).

    ``n_e + (a - n_a)``: what the alternative says, which is what sets it apart from a neutral word
    in its own place, said at the places of the erased prompt. Taken as they are, the tokens of an
    alternative of another length would ask every later token to become the one some places on:
    place, not concept, and that is what ruins words nobody named. Where both are equally long and
    have the same article, ``n_e = n_a`` and the target is the alternative itself.
    """
    alternative = texts.rows(one.alternative)[texts.roles(one.erased, one.alternative)]
    if not one.neutral_alternative or one.neutral_alternative == one.neutral:
        return alternative
    place = texts.rows(one.neutral)[texts.roles(one.erased, one.neutral)]
    own = texts.rows(one.neutral_alternative)[texts.roles(one.erased, one.alternative)]
    return place + alternative - own
