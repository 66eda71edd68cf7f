"""The texts of a run as token embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .alignment import align_tokens
from .closed_form import TokenEdit
from .denoiser import Denoiser
from .prompts import PromptPair, prompt_pairs
from .settings import EraseSettings
from .states import EncodedPair


@dataclass(frozen=True)
class EncodedPrompts:
    """Token embeddings (tokens, width) of every prompt that a run names.

    Attributes:
        pairs: the prompt pairs of all concepts.
        edits: for each concept, its tokens and what must take their place.
        null: the null prompt.
        negatives: the negative prompts.
        keep: the keep prompts with their texts, most important first.
    """

    pairs: list[EncodedPair]
    edits: list[TokenEdit]
    null: Tensor
    negatives: list[Tensor]
    keep: list[tuple[str, Tensor]]

    def tensors(self) -> list[Tensor]:
        """All embeddings, in a fixed order."""
        pairs = [rows for pair in self.pairs for rows in (pair.erased, pair.alternative)]
        return [*pairs, self.null, *self.negatives, *(rows for _, rows in self.keep)]


def encode_prompts(settings: EraseSettings, denoiser: Denoiser) -> EncodedPrompts:
    """Encode the prompts of a run, each text once, as the host will when it samples.

    Raises:
        SettingsError: prompts that contradict each other.
    """
    pairs = prompt_pairs(settings)
    texts = dict.fromkeys(text for pair in pairs for text in (pair.erased, pair.alternative))
    rows = dict(zip(texts, denoiser.encode(list(texts)), strict=True))
    ids = dict(zip(texts, denoiser.token_ids(list(texts)), strict=True))
    return EncodedPrompts(
        pairs=[EncodedPair(rows[p.erased], rows[p.alternative], p.concept) for p in pairs],
        edits=[
            _edit([pair for pair in pairs if pair.concept == concept], rows, ids)
            for concept in range(len(settings.concepts))
        ],
        null=denoiser.encode([""])[0],
        negatives=denoiser.encode(settings.negative_prompts),
        keep=list(zip(settings.keep, denoiser.encode(settings.keep), strict=True)),
    )


def _edit(
    pairs: Sequence[PromptPair], rows: dict[str, Tensor], ids: dict[str, list[int]]
) -> TokenEdit:
    sources = [rows[pair.erased] for pair in pairs]
    targets = [
        rows[pair.alternative][align_tokens(ids[pair.erased], ids[pair.alternative])]
        for pair in pairs
    ]
    return TokenEdit(torch.cat(sources), torch.cat(targets))
