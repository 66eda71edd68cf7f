"""Which layers of a host's network read the prompt alone, and what they read of a prompt."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations, groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..model.denoiser import Denoiser
from ..model.prompt import POOLED, TOKENS, Encoded, Read
from ..model.readers import (
    FIRST,
    FoundReaders,
    ReaderGroup,
    Work,
    chosen_readers,
    find_readers,
    read_inputs,
)
from ..settings.layers import FIRST_READERS, MEASURED_RULES
from .subspace import extend_basis, remove_span

# Sides of the latents that the network is tried on: some divide by zero on the smallest.
SIDES = (8, 64)
# Prompts of which two are as long as each other in any text encoder.
_PROBES = tuple(f"a photo of a {word}" for word in ("cat", "dog", "car", "tree", "ship", "house"))
_LEVELS = 6  # of the schedule that noise levels are taken from
MASK = "attention_mask"
AT_ONCE = 16  # prompts that are read in one forward
MATRIX = 2  # dimensions of one
# Keys and values are edited where the null prompt leaves at least this share of what tells two
# words: negative and keep prompts need room, too.
LEAST_ROOM = 0.5
# What was found by predictions, by architecture, for as long as the process lives.
_found: dict[str, list[ReaderGroup]] = {}

Run = Callable[[Tensor, Tensor, Sequence[Encoded]], Any]


class NoReadersError(ValueError):
    """No layer reads the prompt alone, or what stands in for the text encoder is another's."""


@dataclass(frozen=True)
class _Way:
    """A way on which prompts enter.

    Attributes:
        name: see :class:`erase_core.method.ways.WayIn`.
        group: the layers that read it.
        as_encoded: whether they read what the text encoder gives, bit for bit.
    """

    name: str
    group: ReaderGroup
    as_encoded: bool


class PromptReaders:
    """What reads prompts in one network, and what of them.

    Args:
        network: the one that is run.
        keys: paths in it of the matrices that can be edited, by their LoRA names.
        run: predicts at a latent (n, c, h, w) and noise levels (n,), for n prompts.
        encode: gives prompts as the text encoder does.
        latents: for a side, two latents with their noise levels.
        first_only: see :func:`erase_core.model.readers.chosen_readers`.

    Attributes:
        cost: predictions made until now, in shares of one at :attr:`size`.

    Raises:
        NoReadersError: there are none.
    """

    def __init__(
        self,
        network: nn.Module,
        keys: Mapping[str, str],
        run: Run,
        encode: Callable[[Sequence[str]], list[Encoded]],
        latents: Callable[[int], Sequence[tuple[Tensor, Tensor]]],
        pixels: int,
        first_only: bool = False,
    ) -> None:
        self._layers = {
            path: module
            for path, module in network.named_modules()
            if getattr(getattr(module, "weight", None), "ndim", 0) == MATRIX
        }
        self._names = {path: name for name, path in keys.items()}
        self._run, self._pixels, self.cost = run, pixels, 0.0
        self._probes, (self._null,) = _as_long(encode(_PROBES)), encode([""])
        self._side, self._latents = self._first_side(latents)
        self._ways = self._chosen(first_only)

    @property
    def ways(self) -> dict[str, list[str]]:
        """LoRA names of the matrices that are edited, by way, that of the tokens first."""
        return {
            way.name: [self._names[path] for path in way.group.layers if path in self._names]
            for way in self._ways
        }

    @property
    def needs_no_network(self) -> bool:
        """Whether all that is read is what the text encoder gives."""
        return all(way.as_encoded for way in self._ways)

    def let_go(self) -> None:
        """Keep no layer of the network, where it isn't needed any more."""
        _ = self.takes_pooled, self.found, self._heeds_masks  # which are found by it
        self._layers = {}

    @property
    def cost_of_reading(self) -> float:
        """Of one prompt, in predictions; 0 where the network isn't needed for it."""
        return 0.0 if self.needs_no_network else self._share_of_reading

    @cached_property
    def takes_pooled(self) -> bool:
        """Whether any layer reads the pooled vector of the text encoder."""
        firsts = {group.first: self._layers[group.first] for group in self._groups()}
        found = read_inputs(firsts, self._predicting(self._probes[:1]))
        self.cost += self._share_of_small
        return any(_reads_pooled(self._probes[0], value.cpu()) for value in found.values())

    def read(self, prompts: Sequence[Encoded]) -> None:
        """Fill in what the network reads of prompts where that isn't what was encoded."""
        new = [p for p in {id(p): p for p in prompts}.values() if not self._is_read(p)]
        for _, alike in groupby(sorted(new, key=shapes_of), shapes_of):
            group = list(alike)
            step = AT_ONCE if self.needs_no_network or self._batches else 1
            for start in range(0, len(group), step):
                self._read_together(group[start : start + step])

    def _is_read(self, prompt: Encoded) -> bool:
        return all(
            way.name in prompt.read or (way.as_encoded and self._counted(prompt).all())
            for way in self._ways
        )

    def _read_together(self, prompts: Sequence[Encoded]) -> None:
        inputs = self._inputs(prompts)
        for way in self._ways:
            if way.as_encoded:
                parts = [prompt.rows(way.name) for prompt in prompts]
            else:
                value = inputs[way.group.first].float().cpu()
                parts = list(value.reshape(len(prompts), -1, value.shape[-1]))
            for prompt, rows in zip(prompts, parts, strict=True):
                prompt.read[way.name] = self._read_of(prompt, rows, way.as_encoded)

    def _read_of(self, prompt: Encoded, rows: Tensor, as_encoded: bool) -> Read:
        """What is read of a prompt, without what the network doesn't see."""
        counted = self._counted(prompt)
        places = _places(len(rows), len(counted))
        ids = None if as_encoded else _own_ids(prompt, len(rows))
        if ids is not None or len(rows) == 1 or not len(counted):
            return Read(rows.clone(), places, ids)
        kept = counted[places]
        return Read(rows[kept].clone(), places[kept])

    def _inputs(self, prompts: Sequence[Encoded]) -> dict[str, Tensor]:
        """What the first layer of each way is given, of ways that need the network."""
        firsts = [way.group.first for way in self._ways if not way.as_encoded]
        if not firsts:
            return {}
        length = sum(len(prompt.tokens) for prompt in prompts) / len(self._probes[0].tokens)
        self.cost += self._share_of_reading * length
        return read_inputs({path: self._layers[path] for path in firsts}, self._predicting(prompts))

    def _counted(self, prompt: Encoded) -> Tensor:
        """Which of a prompt's rows the network sees, (tokens,)."""
        mask = prompt.extras.get(MASK)
        every = torch.ones(len(prompt.tokens), dtype=torch.bool)
        if mask is None or mask.numel() != len(every) or not self._heeds_masks:
            return every
        return mask.flatten().bool()

    @cached_property
    def _heeds_masks(self) -> bool:
        """Whether the rows that a mask leaves out change nothing."""
        prompt = self._probes[0]
        mask = prompt.extras.get(MASK)
        if mask is None or mask.numel() != len(prompt.tokens) or mask.all():
            return False
        noise = torch.randn(prompt.tokens.shape, generator=torch.Generator().manual_seed(0))
        hidden = torch.where(mask.flatten().bool()[:, None], prompt.tokens, noise)
        other = Encoded(hidden, prompt.pooled, prompt.extras)
        before, after = (self._predicting([one])() for one in (prompt, other))
        self.cost += 2 * self._share_of_small
        return bool((after - before).abs().max() <= 1e-6 * before.abs().max())

    @cached_property
    def _batches(self) -> bool:
        """Whether prompts in one forward are read as each by itself."""
        firsts = {w.group.first: self._layers[w.group.first] for w in self._ways}
        both = read_inputs(firsts, self._predicting(self._probes))
        for place, prompt in enumerate(self._probes):
            for path, alone in read_inputs(firsts, self._predicting([prompt])).items():
                alone = alone.reshape(-1, alone.shape[-1])
                rows = both[path].reshape(-1, alone.shape[-1])
                own = rows[place * len(alone) : (place + 1) * len(alone)]
                if len(rows) != len(self._probes) * len(alone):
                    return False
                if not torch.allclose(own, alone, 1e-2, 1e-2):
                    return False
        return True

    def _predicting(self, prompts: Sequence[Encoded], latent: int = FIRST) -> Callable[[], Any]:
        """Predicts for the prompts on one latent."""
        x, sigma = self._latents[latent]
        return lambda: self._no_grad(x, sigma, prompts)

    @torch.no_grad()
    def _no_grad(self, x: Tensor, sigma: Tensor, prompts: Sequence[Encoded]) -> Any:
        count = len(prompts)
        return self._run(x.repeat(count, 1, 1, 1), sigma.repeat(count), prompts)

    def _first_side(
        self, latents: Callable[[int], Sequence[tuple[Tensor, Tensor]]]
    ) -> tuple[int, Sequence[tuple[Tensor, Tensor]]]:
        """The smallest latents that the network runs on, and what a prediction at its size costs.

        Raises:
            NoReadersError: it runs on none.
        """
        work = Work(self._layers)
        for side in SIDES:
            self._latents = latents(side)
            try:
                small = work.of(self._predicting(self._probes[:1]))
            except ZeroDivisionError:
                continue
            except RuntimeError as error:  # what the host's layers say of another width
                if "shape" not in str(error) and "size" not in str(error):
                    raise
                raise NoReadersError(
                    "the connected CLIP gives it other numbers than it reads "
                    f"({str(error).splitlines()[0]}). Connect the CLIP that belongs to the model"
                ) from error
            found, self._latents = self._latents, latents(2 * side)
            larger = work.of(self._predicting(self._probes[:1]))
            each = (larger - small) / (3 * side * side)  # for a pixel of the latent
            self._whole = small + each * max(0, self._pixels - side * side)
            self._share_of_small = small / self._whole
            self.cost += (small + larger) / self._whole
            return side, found
        raise NoReadersError("it runs on no latent of a usual size")

    def _groups(self) -> list[ReaderGroup]:
        """All groups of layers that read the prompt alone, found once for an architecture."""
        key = self._architecture()
        if key not in _found:

            def predict(latent: int, prompt: int) -> None:
                self.cost += self._share_of_small
                self._predicting([self._probes[prompt]], latent)()

            _found[key] = find_readers(self._layers, predict)
        return _found[key]

    def _architecture(self) -> str:
        """A name for the network's layers and for what it is given of a prompt."""
        digest = hashlib.sha256()
        for path, layer in self._layers.items():
            digest.update(
                f"{path} {type(layer).__name__} {layer.get_parameter('weight').shape}".encode()
            )
        digest.update(repr(shapes_of(self._probes[0])).encode())
        return digest.hexdigest()

    @cached_property
    def found(self) -> list[FoundReaders]:
        """Every group of readers, for the record."""
        ways = {way.group: way.name for way in self._ways}
        return [
            FoundReaders(
                group.first,
                len(group.layers),
                self._layers[group.first].get_parameter("weight").shape[1],
                ways.get(group, ""),
                "" if group in ways else self._why_not(group),
            )
            for group in self._groups()
        ]

    def _why_not(self, group: ReaderGroup) -> str:
        """Why a group stays as it is, in words."""
        if not any(path in self._names for path in group.layers):
            return "the host has no name for it"
        if group.first in self._without_room:
            return "the null prompt leaves no room in them"
        others = [self._groups()[place].first for place in group.behind]
        return f"behind {', '.join(others)}" if others else "what it feeds is edited"

    def _chosen(self, first_only: bool) -> list[_Way]:
        """The ways that are edited.

        Raises:
            NoReadersError: none.
        """
        self._without_room: set[str] = set()
        groups = [
            group
            for group in chosen_readers(self._groups(), first_only, self._has_room)
            if any(path in self._names for path in group.layers)
        ]
        if not groups:
            raise NoReadersError("none of its layers reads the prompt and nothing else")
        firsts = {group.first: self._layers[group.first] for group in groups}
        work = Work(self._layers)
        inputs: list[dict[str, Tensor]] = []
        for probe in self._probes:
            done = work.of(partial(self._note, inputs, firsts, probe))
        self._share_of_reading = done / self._whole
        self.cost += len(self._probes) * self._share_of_reading
        rows = {group: inputs[0][group.first].numel() for group in groups}
        ranked = sorted(
            groups,
            key=lambda g: (g.spread, rows[g] > inputs[0][g.first].shape[-1], len(g.layers)),
            reverse=True,
        )
        return list(self._named(ranked, [{p: v.cpu() for p, v in one.items()} for one in inputs]))

    def _note(
        self, found: list[dict[str, Tensor]], layers: Mapping[str, nn.Module], prompt: Encoded
    ) -> None:
        found.append(read_inputs(layers, self._predicting([prompt])))

    def _has_room(self, group: ReaderGroup) -> bool:
        """Whether the null prompt leaves room on what a group reads, for what tells two words."""
        rows = []
        for prompt in (self._null, *self._probes):
            found = read_inputs({"": self._layers[group.first]}, self._predicting([prompt]))[""]
            found = found.reshape(-1, found.shape[-1]).double().cpu()
            counted = self._counted(prompt)
            rows.append(found[counted[_places(len(found), len(counted))]])
        self.cost += len(rows) * self._share_of_small
        null, *(first, second) = rows
        change = first - second
        left = remove_span(change, extend_basis(null[:0].T, null))
        enough = float(left.square().sum() / change.square().sum()) >= LEAST_ROOM
        if not enough:
            self._without_room.add(group.first)
        return enough

    def _named(
        self, groups: Sequence[ReaderGroup], inputs: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[_Way]:
        """The ways by what enters on them: the first is the tokens'."""
        for place, group in enumerate(groups):
            seen = [
                (probe, one[group.first]) for probe, one in zip(self._probes, inputs, strict=True)
            ]
            pooled = all(_reads_pooled(probe, value) for probe, value in seen)
            tokens = all(_reads_tokens(probe, value) for probe, value in seen)
            if place == 0:
                yield _Way(TOKENS, group, tokens)
            elif pooled:
                yield _Way(POOLED, group, True)
            else:
                yield _Way(group.first, group, False)


class ReadingDenoiser(Denoiser):
    """A denoiser that finds out what reads prompts, where its layer rule doesn't name it."""

    _rule: str = ""
    _latent_pixels: int = 8  # of a picture, to one of a latent

    @property
    def _measured(self) -> bool:
        return self._rule in MEASURED_RULES

    @abstractmethod
    def _find_readers(self) -> PromptReaders:
        """What reads prompts, by predictions."""

    @cached_property
    def _prompt_readers(self) -> PromptReaders:
        return self._find_readers()

    def _readers_in(
        self,
        network: nn.Module,
        keys: Mapping[str, str],
        run: Run,
        encode: Callable[[Sequence[str]], list[Encoded]],
        pixels: int,
    ) -> PromptReaders:
        """See :class:`PromptReaders`; by this denoiser's rule, on latents that it makes."""
        first_only = self._rule == FIRST_READERS
        return PromptReaders(network, keys, run, encode, self._small_latents, pixels, first_only)

    def _small_latents(self, side: int) -> list[tuple[Tensor, Tensor]]:
        """Two latents (1, *shape) of one seed, each at a noise level of its own, (1,)."""
        shape = self.latent_shape(side * self._latent_pixels)
        random = torch.Generator().manual_seed(0)
        levels = self.sigmas(_LEVELS).to(self.device)[[1, 3]]
        noises = [torch.randn(1, *shape, generator=random).to(self.device) for _ in levels]
        return [(self.noisy_latent(n, s), s[None]) for n, s in zip(noises, levels, strict=True)]

    @cached_property
    def ways(self) -> Mapping[str, Sequence[str]]:
        """See :class:`Denoiser`."""
        return self._prompt_readers.ways if self._measured else super().ways

    def read(self, prompts: Sequence[Encoded]) -> None:
        """See :class:`Denoiser`."""
        if self._measured:
            self._prompt_readers.read(prompts)

    @property
    def found_readers(self) -> Sequence[FoundReaders]:  # type: ignore[override]
        """See :class:`Denoiser`."""
        return self._prompt_readers.found if self._measured else ()

    @property
    def reading_cost(self) -> float:  # type: ignore[override]
        """See :class:`Denoiser`."""
        return self._prompt_readers.cost_of_reading if self._measured else 0.0

    @property
    def own_cost(self) -> float:  # type: ignore[override]
        """See :class:`Denoiser`."""
        readers = vars(self).get("_prompt_readers")
        return 0.0 if readers is None else readers.cost


def _as_long(prompts: Sequence[Encoded]) -> list[Encoded]:
    """Two of the prompts of which the encoder gives as much."""
    for pair in combinations(prompts, 2):
        if shapes_of(pair[0]) == shapes_of(pair[1]):
            return list(pair)
    return list(prompts[:2])


def shapes_of(prompt: Encoded) -> tuple[Any, ...]:
    """What prompts of one forward have in common."""
    pooled = None if prompt.pooled is None else len(prompt.pooled)
    extras = [
        (name, tuple(value.shape), int(value.sum()) if name == MASK else 0)
        if isinstance(value, Tensor)
        else (name, (), 0)
        for name, value in sorted(prompt.extras.items())
    ]
    return (tuple(prompt.tokens.shape), pooled or 0, *extras)


def _own_ids(prompt: Encoded, rows: int) -> tuple[int, ...] | None:
    """Ids that the network looks up itself, one for each row that it makes of them; None if none.

    It fills the rows up to a number of its own; so are they.
    """
    for name, value in sorted(prompt.extras.items()):
        if name == MASK or not isinstance(value, Tensor) or value.is_floating_point():
            continue
        if 0 < value.numel() <= rows:
            ids = [int(one) for one in value.flatten().tolist()]
            return (*ids, *[0] * (rows - len(ids)))
    return None


def _places(rows: int, tokens: int) -> Tensor:
    """For each row that a layer reads its token; a token may have several side by side."""
    if not tokens:
        return torch.zeros(rows, dtype=torch.long)
    each = rows // tokens if rows % tokens == 0 else 1
    return (torch.arange(rows) // max(1, each)).clamp(max=tokens - 1)


def _reads_tokens(prompt: Encoded, value: Tensor) -> bool:
    """Whether a layer's input is the token embeddings, but for rows of zeros."""
    own = _filled(prompt.tokens.to(value.dtype))
    rows = _filled(value.reshape(-1, value.shape[-1]))
    return own.shape == rows.shape and torch.equal(own, rows)


def _reads_pooled(prompt: Encoded, value: Tensor) -> bool:
    """Whether a layer's input begins with the pooled vector."""
    if prompt.pooled is None or value.numel() != value.shape[-1]:
        return False
    own = prompt.pooled.to(value.dtype)
    return torch.equal(own, value.flatten()[: len(own)])


def _filled(rows: Tensor) -> Tensor:
    return rows[rows.abs().amax(1) > 0]
