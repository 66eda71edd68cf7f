"""What is compared: this project's engine, and its peers with the settings that they publish."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from concept_surgery.erase_core import erase, preset_settings
from concept_surgery.erase_core.method.alignment import word_span
from concept_surgery.erase_core.method.reading import evenly_spaced, plain_captions
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.settings.prompts import prompt_pairs
from concept_surgery.erase_core.settings.settings import EraseSettings
from concept_surgery.erase_core.settings.texts import Concept
from torch import Tensor

from benchmarks.engine import ENGINE
from benchmarks.erasure.cases import Case as PeersCase
from benchmarks.erasure.methods import cure, oce, rece, speed, uce
from benchmarks.unnamed.cases import Case
from benchmarks.unnamed.worlds import WORK, World

RESOLUTION, SEED = 64, 0
Trained = tuple[LowRankEdit, dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """One method with its settings.

    Attributes:
        name: for tables.
        train: world, its denoiser, case and settings to an edit and what it says of itself.
        settings: plain JSON values.
        engine: version of the engine that decides the result; "" for peers.
    """

    name: str
    train: Callable[[World, Any, Case, Mapping[str, Any]], Trained]
    settings: Mapping[str, Any] = field(default_factory=dict)
    engine: str = ""


@cache
def _language() -> Any:
    from concept_surgery.erase_core.artefact.language_store import LanguageStore

    return LanguageStore(WORK / "language")


def _ours(world: World, denoiser: Any, case: Case, settings: Mapping[str, Any]) -> Trained:
    """The engine, as the node runs it."""
    wanted = preset_settings(
        concepts=case.text, kind=case.kind, seed=SEED, resolution=RESOLUTION, **settings
    )
    last = erase(wanted, denoiser, _language())
    return last.edit(), noted(last.record)


def _one_by_one(world: World, denoiser: Any, case: Case, settings: Mapping[str, Any]) -> Trained:
    """Each concept in a run of its own, and all edits applied together."""
    edits, notes = [], []
    for name in case.text.split("\n"):
        edit, said = _ours(world, denoiser, Case(name, case.kind), settings)
        edits.append(edit)
        notes.append(said["protection"])
    return together(edits), {"protections": notes}


def together(edits: Sequence[LowRankEdit]) -> LowRankEdit:
    """The sum of edits as one: their columns side by side."""
    names = dict.fromkeys(name for edit in edits for name in edit.factors)
    bases, factors = {}, {}
    for name in names:
        parts = [edit for edit in edits if name in edit.factors]
        bases[name] = torch.cat([edit.bases[name] for edit in parts], 1)
        factors[name] = torch.cat([edit.factors[name] for edit in parts], 1)
    return LowRankEdit(bases, factors)


def noted(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a result keeps of the engine's own report."""
    measures, others = record["measures"], record.get("others") or {}
    moved = measures.get("moved_held_out")
    return {
        "others_change": others.get("change"),
        "unnamed_drift": measures.get("unnamed_drift"),
        "unnamed_of": measures.get("unnamed_of"),
        "protection": record.get("protection"),
        "moved": moved and moved["overall"],
        "keys_and_values_moved": [c.get("keys_and_values_moved") for c in record["concepts"]],
        "training": record.get("training"),
        "warnings": len(record.get("warnings", ())),
    }


class PeersDenoiser:
    """A denoiser whose padding looks as CLIP's does, which is how the peers find the last word.

    They take the token before the first of the equal ones that close a prompt. Where padding is
    another token than the end, that would be the end.
    """

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids, with all that comes after the words turned into the end token."""
        null, *rows = self._denoiser.token_ids(["", *prompts])
        return [_closed(list(ids), word_span(ids, null)) for ids in rows]


def _closed(ids: list[int], span: tuple[int, int]) -> list[int]:
    begin, end = span
    if end <= begin or end >= len(ids):
        return ids  # no words: what stands first, or before the end, stands for the prompt
    return ids[:end] + [ids[end]] * (len(ids) - end)


class BareCase(PeersCase):
    """An erasure for the peers as they publish it, without keep prompts.

    UCE and RECE solve nothing without a prompt to preserve: theirs is the empty one.
    """

    keep = ("",)


class PhrasedCase(BareCase):
    """The same with every training prompt of ours as a concept; see :meth:`of`."""

    @classmethod
    def of(cls, case: Case, denoiser: Any) -> PhrasedCase:
        """What a case becomes: what ours puts in a prompt's place is what takes its place here."""
        made = cls(case.text, case.kind)
        pairs = prompt_pairs(EraseSettings(concepts=case.text, kind=case.kind))
        vars(made)["concepts"] = tuple(
            Concept(pair.erased, pair.alternative or _as_long(denoiser, pair)) for pair in pairs
        )
        return made


def _as_long(denoiser: Any, pair: Any) -> str:
    """The neutral prompt of as many tokens as the erased one."""
    null, erased, *rows = denoiser.token_ids(["", pair.erased, *pair.neutral])
    length = word_span(erased, null)[1]
    apart = [abs(word_span(ids, null)[1] - length) for ids in rows]
    return pair.neutral[apart.index(min(apart))]


def _peer(train: Callable[..., Any], phrased: bool) -> Callable[..., Trained]:
    def run(world: World, denoiser: Any, case: Case, settings: Mapping[str, Any]) -> Trained:
        given = PeersDenoiser(denoiser)
        asked = PhrasedCase.of(case, denoiser) if phrased else BareCase(case.text, case.kind)
        moment, words = caption_moment(world, given), retained(given, case)
        with (
            patch.object(oce, "language_moment", lambda *_: moment),
            patch.object(speed, "words_to_retain", lambda _: words),
        ):
            return train(given, asked, SEED, settings).edit, {}

    return run


def retained(denoiser: Any, case: Case) -> list[str]:
    """Of :func:`words_to_retain` those that the case doesn't name."""
    spoken = set(re.findall("[a-z]+", case.text))
    return [word for word in words_to_retain(denoiser) if word not in spoken]


def words_to_retain(denoiser: Any) -> list[str]:
    """As many words of the plain captions as SPEED takes, all of them known to the encoder."""
    known = set(denoiser.vocabulary())
    words = {w for line in plain_captions() for w in re.findall("[a-z]{3,}", line.lower())}
    return evenly_spaced(sorted(words & known), speed.WORDS)


def caption_moment(world: World, denoiser: Any, folder: Path = WORK) -> Tensor:
    """The second moment of the captions' tokens (width, width), kept on disk."""
    path = folder / f"captions-{world.name}-{world.identity}.npy"
    if not path.exists():
        moment = oce.language_moment(_Batched(denoiser), plain_captions())
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.{os.getpid()}.npy")
        np.save(partial, moment.numpy())
        partial.replace(path)
    return torch.from_numpy(np.load(path))


class _Batched(PeersDenoiser):
    """Encodes many prompts at once; the rounding differs, a mean over a thousand doesn't."""

    def encode(self, prompts: Sequence[str]) -> Any:
        return self._denoiser.encode(prompts, together=True)


OCE_TOLD = {**oce.PUBLISHED, "phrasings": False}  # its own five make way for all of ours
INSTANT = Method("ours/instant", _ours, {"preset": "instant"}, ENGINE)
BALANCED = Method("ours/balanced", _ours, {"preset": "balanced"}, ENGINE)
ONE_BY_ONE = Method("ours/instant, one by one", _one_by_one, {"preset": "instant"}, ENGINE)
OURS = (INSTANT, BALANCED)
TOLD = (
    Method("speed-phrased", _peer(speed.train, True), speed.PUBLISHED),
    Method("uce-phrased", _peer(uce.train, True), uce.PUBLISHED),
    Method("oce-phrased", _peer(oce.train, True), OCE_TOLD),
)
BARE = (
    Method("oce", _peer(oce.train, False), oce.PUBLISHED),
    Method("cure", _peer(cure.train, False), {**cure.PUBLISHED, "retained": "none"}),
    Method("rece", _peer(rece.train, False), rece.PUBLISHED),
)
PEERS = (*TOLD, *BARE)
BROKEN = tuple(
    Method(f"broken: {name}", _ours, settings, ENGINE)
    for name, settings in {
        "instant, protection 0": {"preset": "instant", "protection": 0.0},
        "balanced, protection 0": {"preset": "balanced", "protection": 0.0},
        "balanced, rate 10": {"preset": "balanced", "learning_rate": 10.0, "steps": 20},
    }.items()
)
METHODS = {method.name: method for method in (*OURS, *PEERS)}
