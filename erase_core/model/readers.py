"""Which layers of a network read the prompt and nothing else, found by predictions, not by names.

A linear layer whose input has the same bits for two noisy pictures at two noise levels, and others
for another prompt, reads the prompt alone. An edit ``dW = B R^T`` of it with R orthogonal to what
it reads under a prompt leaves the network's output for that prompt where it was, whatever comes
after the layer, and whatever came before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# The pictures with their noise levels, and the prompts, that predictions are made of.
FIRST, SECOND = 0, 1
# How far a reader's output is moved to see what reads it, in shares of its size.
NUDGE = 0.5
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPREAD = 0x9E3779B1  # an odd number, so that no place of a tensor counts like its neighbours

Predict = Callable[[int, int], Any]


@dataclass(frozen=True)
class ReaderGroup:
    """Layers that read the same numbers of a prompt.

    Attributes:
        layers: their names, in the order of their calls.
        spread: whether layers that see the picture run between them: keys and values of many
            blocks, not a few maps at one door.
        behind: the groups, by their places in the list, whose output reaches what these read.
    """

    layers: tuple[str, ...]
    spread: bool
    behind: tuple[int, ...] = ()

    @property
    def first(self) -> str:
        """The layer that is called first; what it reads is what all of them do."""
        return self.layers[0]


@dataclass(frozen=True)
class FoundReaders:
    """A group of readers, for the record.

    Attributes:
        name: of the layer that is called first.
        matrices: how many layers there are.
        width: how many numbers they read.
        way: on which they are edited; "" where they stay as they are.
        why: they stay so, in words.
    """

    name: str
    matrices: int
    width: int
    way: str = ""
    why: str = ""


@dataclass
class _Seen:
    """What layers were given in one prediction.

    Attributes:
        order: their names, in the order of their calls.
        inputs: by name, the shape and a digest of every input.
    """

    order: list[str] = field(default_factory=list)
    inputs: dict[str, list[tuple[tuple[int, ...], Tensor]]] = field(default_factory=dict)

    def take(self, name: str, value: Tensor) -> None:
        """Note what a layer is given."""
        self.order.append(name)
        self.inputs.setdefault(name, []).append((tuple(value.shape), _digest(value)))

    def same(self, other: _Seen, name: str) -> bool:
        """Whether a layer was given the same bits in both."""
        return self.key(name) == other.key(name)

    def key(self, name: str) -> tuple[Any, ...]:
        """What a layer was given, as something to compare by."""
        return tuple((shape, tuple(bits.tolist())) for shape, bits in self.inputs.get(name, ()))


def find_readers(layers: Mapping[str, nn.Module], predict: Predict) -> list[ReaderGroup]:
    """The groups of layers that read the prompt alone, in the order of their calls.

    Three predictions, and one more for each group that no other feeds.

    Args:
        layers: all linear layers of the network by name, those that can't be edited, too.
        predict: runs the network on one of two noisy pictures (:data:`FIRST`, :data:`SECOND`) and
            one of two prompts, which must be as long as each other.
    """
    here = _watched(layers, lambda: predict(FIRST, FIRST))
    elsewhere = _watched(layers, lambda: predict(SECOND, FIRST))
    other = _watched(layers, lambda: predict(FIRST, SECOND))
    called = list(dict.fromkeys(here.order))
    reading = [n for n in called if here.same(elsewhere, n) and not here.same(other, n)]
    pictured = {n for n in called if not here.same(elsewhere, n)}
    grouped: dict[Any, list[str]] = {}
    for name in reading:
        if len(here.inputs[name]) == 1:  # a layer that is run twice has no one input
            grouped.setdefault((here.key(name), other.key(name)), []).append(name)
    groups = [ReaderGroup(tuple(g), _is_spread(g, here.order, pictured)) for g in grouped.values()]
    return _with_what_feeds_them(groups, layers, predict, here)


def _is_spread(group: Sequence[str], order: Sequence[str], pictured: set[str]) -> bool:
    """Whether a layer that sees the picture runs between the first and the last of a group."""
    between = order[order.index(group[0]) : order.index(group[-1])]
    return any(name in pictured for name in between)


def _with_what_feeds_them(
    groups: Sequence[ReaderGroup],
    layers: Mapping[str, nn.Module],
    predict: Predict,
    before: _Seen,
) -> list[ReaderGroup]:
    behind: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        if place in behind:
            continue  # what it feeds, the first of its stream feeds, too
        with ExitStack() as stack:
            for name in group.layers:
                stack.callback(layers[name].register_forward_hook(_nudged).remove)
            moved = _watched(layers, lambda: predict(FIRST, FIRST))
        for later in range(place + 1, len(groups)):
            if not before.same(moved, groups[later].first):
                behind.setdefault(later, []).append(place)
    return [
        ReaderGroup(group.layers, group.spread, tuple(behind.get(place, ())))
        for place, group in enumerate(groups)
    ]


def _nudged(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    size = output.detach().float().square().mean().sqrt().clamp(min=1e-6)
    return output + (NUDGE * size * noise.to(output.device)).to(output.dtype)


def chosen_readers(
    groups: Sequence[ReaderGroup],
    first_only: bool = False,
    has_room: Callable[[ReaderGroup], bool] = lambda group: True,
) -> list[ReaderGroup]:
    """The groups that are edited: of each stream the keys and values, else the first layers.

    Args:
        first_only: the first layers after the text encoder also where keys and values follow.
        has_room: whether what must stay leaves room on a group; without it the first layers of its
            stream are edited in its place.
    """
    chosen: list[int] = []
    for place, group in enumerate(groups):
        if group.behind:
            continue
        keys = [n for n, later in enumerate(groups) if later.spread and place in later.behind]
        keys = [] if first_only else [n for n in keys if has_room(groups[n])]
        chosen += [place] if group.spread else keys or [place]
    return [groups[place] for place in dict.fromkeys(chosen)]


class ReadAll(Exception):  # noqa: N818 - not an error
    """Everything that was wanted of a prediction has been seen; ends the network's forward."""


def read_inputs(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, Tensor]:
    """What layers are given in one forward, which ends where the last of them is called.

    Args:
        layers: by name.
        run: the forward.
    """
    found: dict[str, Tensor] = {}

    def take(name: str, value: Tensor) -> None:
        found.setdefault(name, value.detach().clone())
        if len(found) == len(layers):
            raise ReadAll

    try:
        with _watching(layers, take):
            run()
    except ReadAll:
        pass
    return found


def _watched(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> _Seen:
    seen = _Seen()
    with _watching(layers, seen.take):
        run()
    return seen


@contextmanager
def _watching(
    layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Inside, ``take`` is told what each layer is given; of other things than numbers nothing."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def told(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            value = inputs[0] if inputs else None
            if isinstance(value, Tensor) and value.is_floating_point():
                take(name, value)

        return told

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        yield


def _digest(value: Tensor) -> Tensor:
    """Two whole numbers that differ where tensors differ in a bit, all but surely."""
    value = value.detach().contiguous()
    bits = value.view(_INTEGERS[value.element_size()]).flatten().long()
    places = torch.arange(1, len(bits) + 1, device=bits.device) * _SPREAD
    return torch.stack([bits.sum(), (bits * places).sum()])


class Work:
    """Multiplications of linear layers, to weigh a forward that ends early against a whole one.

    Args:
        layers: all of the network's.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers

    def of(self, run: Callable[[], Any]) -> float:
        """How many there are while ``run`` runs."""
        done = 0.0

        def take(name: str, value: Tensor) -> None:
            nonlocal done
            done += value.numel() * self._layers[name].get_parameter("weight").shape[0]

        with _watching(self._layers, take):
            run()
        return done
