"""The texts of a run as the text encoder gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .alignment import align_tokens
from .closed_form import TokenEdit
from .denoiser import Denoiser, Encoded
from .prompts import PromptPair, prompt_pairs
from .settings import EraseSettings
from .states import EncodedPair


@dataclass(frozen=True)
class EncodedPrompts:
    """Every prompt that a run names.

    Attributes:
        pairs: the prompt pairs of all concepts.
        edits: for each concept, its tokens and what must take their place.
        null: the null prompt.
        negatives: the negative prompts.
        keep: the keep prompts with their texts, most important first.
        plain: plain captions that are held like keep prompts, where nothing else protects the
            prompts nobody named.
    """

    pairs: list[EncodedPair]
    edits: list[TokenEdit]
    null: Encoded
    negatives: list[Encoded]
    keep: list[tuple[str, Encoded]]
    plain: list[Encoded] = field(default_factory=list)

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
        SettingsError: prompts that contradict each other.
    """
    pairs = prompt_pairs(settings)
    texts = dict.fromkeys(text for pair in pairs for text in (pair.erased, pair.alternative))
    encoded = dict(zip(texts, denoiser.encode(list(texts)), strict=True))
    ids = dict(zip(texts, denoiser.token_ids(list(texts)), strict=True))
    return EncodedPrompts(
        pairs=[EncodedPair(encoded[p.erased], encoded[p.alternative], p.concept) for p in pairs],
        edits=[
            _edit([pair for pair in pairs if pair.concept == concept], encoded, ids)
            for concept in range(len(settings.concepts))
        ],
        null=denoiser.encode([""])[0],
        negatives=denoiser.encode(settings.negative_prompts),
        keep=list(zip(settings.keep, denoiser.encode(settings.keep), strict=True)),
    )


def _edit(
    pairs: Sequence[PromptPair], encoded: dict[str, Encoded], ids: dict[str, list[int]]
) -> TokenEdit:
    sources, targets = [], []
    for pair in pairs:
        erased, alternative = encoded[pair.erased].tokens, encoded[pair.alternative].tokens
        # An encoder that isn't there leaves ids without rows.
        own, other = ids[pair.erased][: len(erased)], ids[pair.alternative][: len(alternative)]
        sources.append(erased)
        targets.append(alternative[align_tokens(own, other)])
    return TokenEdit(torch.cat(sources), torch.cat(targets))
