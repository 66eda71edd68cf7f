"""One run: pictures of the concept and of the harshest ten things, and keys and values."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from concept_surgery.erase_core.method.reading import plain_captions
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.settings.prompts import with_article
from torch import Tensor

from benchmarks.unnamed.cases import Case
from benchmarks.unnamed.worlds import PLAIN, WORK, World, asked

PROTOCOL_VERSION = 1  # another one for each change of what is asked or how it is judged
ERASED, HARSHEST, EACH, REST = 16, 10, 3, 24
ERASED_OF_TEN = 6  # pictures of each of ten concepts
GUIDED, STOPS = 60, (3, 6)  # things whose guidance is measured, and after which steps


def key_value_changes(matrices: Mapping[str, Tensor], edit: LowRankEdit, rows: Tensor) -> Tensor:
    """``|C dW^T| / |C W^T|`` of whole prompts (n, tokens, width), the mean over the matrices, (n,).

    The figure of the issue of protection, by another way than the engine's own.
    """
    shares = []
    for name, matrix in matrices.items():
        before = (rows @ matrix.float().cpu().T).flatten(1).norm(dim=1)
        if name in edit.factors:
            change = (rows @ edit.bases[name].float().cpu()) @ edit.factors[name].float().cpu().T
            shares.append(change.flatten(1).norm(dim=1) / before)
        else:
            shares.append(torch.zeros(len(rows)))
    return torch.stack(shares).mean(0)


def unnamed_things(world: World, case: Case) -> list[str]:
    """Things that the case names nowhere, not even as a part of a name."""
    return _without(world.things, case)


def _without(names: Sequence[str], case: Case) -> list[str]:
    spoken = set(re.findall("[a-z]+", case.text))
    return [name for name in names if not spoken & set(name.split())]


def outside_words(world: World, case: Case) -> list[str]:
    """Things that no caption names."""
    captions = set(re.findall("[a-z]+", " ".join(plain_captions()).lower()))
    names = unnamed_things(world, case)
    return [n for n in names if not {*n.split(), *(f"{w}s" for w in n.split())} & captions]


class Untouched:
    """The untouched model's pictures, kept from one run to the next and shared by processes.

    Args:
        world: the model.
        folder: where they are kept; None for in memory alone.
    """

    def __init__(self, world: World, folder: Path | None = WORK) -> None:
        self._world = world
        self._kept: dict[tuple[str, int], tuple[np.ndarray, str, str]] = {}
        name = f"untouched-{PROTOCOL_VERSION}-{world.name}-{world.identity}-{world.drawing}"
        self._folder = None if folder is None else folder / name

    def __call__(self, texts: Sequence[str], seeds: Sequence[int]) -> list[tuple[Any, str, str]]:
        keys = list(zip(texts, seeds, strict=True))
        new = [key for key in dict.fromkeys(keys) if key not in self._kept and not self._read(key)]
        if new:
            drawn = self._world.draw([t for t, _ in new], [s for _, s in new])
            rows = zip(drawn.pages, drawn.things, drawn.styles, strict=True)
            for key, row in zip(new, rows, strict=True):
                self._kept[key] = row
                self._write(key)
        return [self._kept[key] for key in keys]

    def _path(self, key: tuple[str, int]) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.npz"

    def _read(self, key: tuple[str, int]) -> bool:
        if self._folder is None or not self._path(key).exists():
            return False
        with np.load(self._path(key)) as file:
            thing, style = file["labels"].tolist()
            self._kept[key] = file["page"], thing, style
        return True

    def _write(self, key: tuple[str, int]) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path, (page, thing, style) = self._path(key), self._kept[key]
        partial = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        np.savez(partial, page=page, labels=np.array([thing, style]))
        partial.replace(path)


def measure(world: World, case: Case, edit: LowRankEdit, untouched: Untouched) -> dict[str, Any]:
    """Everything about one edit."""
    found, harshest = _keys_and_values(world, case, edit)
    found |= _all_kept(world, case, harshest, edit, untouched)
    found |= _gone(world, case, edit, untouched)
    return found


def measure_ten(
    world: World, case: Case, edit: LowRankEdit, untouched: Untouched
) -> dict[str, Any]:
    """The same of several removals, each with how much of it is gone."""
    found, harshest = _keys_and_values(world, case, edit)
    found |= _all_kept(world, case, harshest, edit, untouched)
    each = {}
    for name in case.text.split("\n"):
        texts = [t for t, _ in asked(name, with_article(name), world.styles, ERASED_OF_TEN)]
        shown = [row[1] == name for row in untouched(texts, range(len(texts)))]
        drawn = world.draw(texts, range(len(texts)), edit)
        gone = [thing != name for thing, was in zip(drawn.things, shown, strict=True) if was]
        each[name] = _share(gone)
    return {**found, "gone": _share(list(each.values())), "gone_each": each, "replaced": None}


def measure_guidance(world: World, case: Case, edit: LowRankEdit) -> float:
    """``|g_th(c) - g*(c)| / |g*(c)|``, the mean over things that nobody named.

    One prompt for each, at states of the untouched model's own way under it.
    """
    texts = [PLAIN[0].format(o=name) for name in world.things]
    states = own_states(world)
    names = unnamed_things(world, case)[:GUIDED]
    places = [world.things.index(name) for name in names]
    texts, states = [texts[place] for place in places], states[:, places]
    before = world.guidance(texts, states, STOPS).flatten(2)
    after = world.guidance(texts, states, STOPS, edit).flatten(2)
    return float(((after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12)).mean())


def own_states(world: World, folder: Path = WORK) -> Tensor:
    """Latents (2, things, c, h, w) of the untouched model's own way, kept on disk."""
    name = f"states-{PROTOCOL_VERSION}-{world.name}-{world.identity}-{world.drawing}.npy"
    path = folder / name
    if path.exists():
        return torch.from_numpy(np.load(path))
    texts = [PLAIN[0].format(o=name) for name in world.things]
    states = world.states(texts, range(len(texts)), STOPS)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.npy")
    np.save(partial, states.numpy())
    partial.replace(path)
    return states


def things_asked(names: Sequence[str]) -> list[str]:
    """The prompts whose keys and values are looked at."""
    return [f"a photo of {with_article(name)}" for name in names]


def _keys_and_values(
    world: World, case: Case, edit: LowRankEdit
) -> tuple[dict[str, Any], list[str]]:
    """What becomes of keys and values, and the things whose change most."""
    matrices, others = world.matrices(), unnamed_things(world, case)
    rows = world.encode(things_asked(others))
    changes = key_value_changes(matrices, edit, rows)
    outside = set(outside_words(world, case))
    harshest = [others[i] for i in changes.topk(min(HARSHEST, len(others))).indices.tolist()]
    found = {
        "kv": float(changes.mean()),
        "kv_outside": float(changes[torch.tensor([name in outside for name in others])].mean()),
        "kv_null": float(key_value_changes(matrices, edit, world.encode([""]))[0]),
        "harshest": harshest,
    }
    return found, harshest


def _all_kept(
    world: World, case: Case, harshest: Sequence[str], edit: LowRankEdit, untouched: Untouched
) -> dict[str, Any]:
    styles = [style for style in world.styles if style not in case.text]
    questions = {
        "harshest": _questions(harshest, styles, EACH),
        "rest": _questions(_every(unnamed_things(world, case), REST), styles, 1),
    }
    found: dict[str, Any] = {}
    for name, group in questions.items():
        found |= _kept(world, name, group, edit, untouched)
    return found


def _share(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _every(items: Sequence[str], count: int) -> list[str]:
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


def _questions(
    names: Sequence[str], styles: Sequence[str], each: int
) -> list[tuple[str, str, str, int]]:
    """(text, thing, style, seed) of each picture."""
    found = []
    for place, name in enumerate(names):
        turn = place % 6 if each == 1 else 0
        texts = asked(name, with_article(name), styles, turn + each)[turn:]
        found += [
            (text, name, style, 1000 + 7 * place + n) for n, (text, style) in enumerate(texts)
        ]
    return found


def _kept(
    world: World,
    label: str,
    group: Sequence[tuple[str, str, str, int]],
    edit: LowRankEdit,
    untouched: Untouched,
) -> dict[str, Any]:
    """Share of the pictures right before that are right after."""
    texts, seeds = [one[0] for one in group], [one[3] for one in group]
    before, drawn = untouched(texts, seeds), world.draw(texts, seeds, edit)
    right_before = [
        _right(thing, style, b[1], b[2])
        for (_, thing, style, _), b in zip(group, before, strict=True)
    ]
    right_after = [
        _right(thing, style, *labels)
        for (_, thing, style, _), labels in zip(
            group, zip(drawn.things, drawn.styles, strict=True), strict=True
        )
    ]
    still = [a for a, b in zip(right_after, right_before, strict=True) if b]
    pages = np.stack([page for page, _, _ in before]) / 255.0
    change = float(np.sqrt(np.mean((pages - drawn.pages / 255.0) ** 2)))
    return {
        f"kept_{label}": _share(still),
        f"right_{label}": sum(right_after) / max(1, sum(right_before)),
        f"asked_{label}": len(still),
        f"change_{label}": change,
    }


def _right(thing: str, style: str, drawn: str, drawn_style: str) -> bool:
    return drawn == thing and style in ("", drawn_style)


def _gone(world: World, case: Case, edit: LowRankEdit, untouched: Untouched) -> dict[str, Any]:
    """What becomes of the concept, among what the untouched model draws of it."""
    concept, instead = case.parts
    if case.kind == "style":
        names = _every(unnamed_things(world, case), ERASED)
        texts = [
            asked(n, with_article(n), [concept], 2 * (i % 3) + 2)[-1][0]
            for i, n in enumerate(names)
        ]
    else:
        texts = [t for t, _ in asked(concept, with_article(concept), world.styles, ERASED)]
    seeds = list(range(len(texts)))
    drawn, place = world.draw(texts, seeds, edit), 2 if case.kind == "style" else 1
    labels = drawn.styles if case.kind == "style" else drawn.things
    shown = [row[place] == concept for row in untouched(texts, seeds)]
    gone = [label != concept for label, there in zip(labels, shown, strict=True) if there]
    there = [label == instead for label, was in zip(labels, shown, strict=True) if was]
    return {
        "gone": _share(gone),
        "asked_gone": len(gone),
        "replaced": _share(there) if instead in _names(world, case) else None,
        "drawn": labels[:8],
    }


def _names(world: World, case: Case) -> tuple[str, ...]:
    return world.styles if case.kind == "style" else world.things
