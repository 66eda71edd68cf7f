"""Peers that are told what ours is told.

Published, each peer learns from the bare word and, where nothing takes its place, towards the empty
prompt. Here each phrasing of the kind's templates is a concept of its own, and the same phrasing
with the alternative, or with a neutral word, takes its place: what of our result is the templates'?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from concept_surgery.erase_core.model.denoiser import Denoiser
from concept_surgery.erase_core.settings.prompts import prompt_pairs
from concept_surgery.erase_core.settings.settings import EraseSettings
from concept_surgery.erase_core.settings.texts import Concept

from benchmarks.erasure.cases import Case
from benchmarks.erasure.methods import ileco, speed, uce
from benchmarks.erasure.methods.base import Method, Outcome

# What of the engine decides a result: which prompts it pairs.
PAIRING = ("../../../erase_core/settings/prompts.py", "../../../erase_core/settings/settings.py")


class PhrasedCase(Case):
    """The same erasure and keep prompts, with every training prompt of ours as a concept."""

    @classmethod
    def of(cls, case: Case) -> PhrasedCase:
        """What a case becomes."""
        return cls(case.text, case.kind, case.keeps)

    @cached_property
    def concepts(self) -> tuple[Concept, ...]:
        """A prompt with the concept, and the prompt that ours puts in its place."""
        pairs = prompt_pairs(EraseSettings(concepts=self.text, kind=self.kind))
        return tuple(Concept(pair.erased, pair.alternative or pair.neutral[0]) for pair in pairs)


def phrased(method: Method) -> Method:
    """A peer that is given a :class:`PhrasedCase`."""

    def train(denoiser: Denoiser, case: Case, seed: int, settings: Mapping[str, Any]) -> Outcome:
        return method.train(denoiser, PhrasedCase.of(case), seed, settings)

    name, files = f"{method.name}-phrased", (*method.files, "phrased.py", *PAIRING)
    return dataclasses.replace(method, name=name, train=train, files=files)


PHRASED = tuple(phrased(method) for method in (uce.UCE, speed.SPEED, ileco.ILECO))
