"""The ways in: what of a prompt enters a network, by which matrices, and how it is edited there.

Tokens enter by the keys and values of a U-Net, or by the one matrix at the door of a transformer;
models such as SDXL read a pooled vector beside them. Each is a way in, and the same is done on all:
what must stay exact is orthogonal to R, ordinary language is protected by a ridge, and the start
is the closed form. The first way, that of the tokens, decides which keep prompts are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from ..model.low_rank import LowRankEdit
from ..model.prompt import TOKENS, Encoded
from ..settings.settings import EraseSettings
from .closed_form import ClosedForm, EditRegression, TokenTargets
from .encoded import EncodedPrompts
from .language import second_moment
from .subspace import ExactSet, KeptPrompt, exact_set, extend_basis

# Weight of the alternative's and the approximate keep prompts' own second moment beside that of
# ordinary language. They are few prompts among a thousand, but the user named them.
NAMED_PROMPT_WEIGHT = 1.0
# The same for what the soft form must hold without a construction.
SOFT_NULL_WEIGHT = 10.0
# With a smaller share of the way left beside what must stay, a way but the first is not edited.
LEAST_LEFT = 0.1


@dataclass(frozen=True)
class WayIn:
    """One way on which prompts enter, and what is asked of it.

    Attributes:
        name: what of a prompt enters: :data:`prompt.TOKENS`, :data:`prompt.POOLED`, or the name
            of the layer that reads it.
        matrices: W by name, (out, inputs). What enters comes first among the inputs.
        targets: for each concept, what enters and what it must become.
        exact: what R must not see.
        moment: M, second moment of what must stay, (size, size).
    """

    name: str
    matrices: Mapping[str, Tensor]
    targets: Sequence[TokenTargets]
    exact: ExactSet
    moment: Tensor

    @property
    def size(self) -> int:
        """Of a row that enters."""
        return len(self.moment)

    @cached_property
    def readers(self) -> Mapping[str, Tensor]:
        """The part of each matrix that reads what enters, (out, size)."""
        return {name: weight[:, : self.size] for name, weight in self.matrices.items()}

    @cached_property
    def regression(self) -> EditRegression:
        """Of what enters onto what it must become."""
        return EditRegression(self.targets, self.exact.basis, self.moment, self.readers)

    def edit(
        self, solution: ClosedForm, columns: Sequence[tuple[int, int]] | None = None
    ) -> LowRankEdit:
        """A closed form as an edit of the whole matrices, which share one R where they can.

        Args:
            columns: where each concept's columns shall begin and end, if not as in the solution.
                Those that are too many for the solution stay zero; where there are too few, the
                first are taken.
        """
        basis, mixing = solution.basis.float(), solution.mixing.float()
        if columns is not None and list(columns) != solution.columns:
            basis, mixing = (_moved(one, solution.columns, columns) for one in (basis, mixing))
        bases: dict[int, Tensor] = {}
        for weight in self.matrices.values():
            rest = weight.shape[1] - self.size
            bases.setdefault(rest, functional.pad(basis, (0, 0, 0, rest)) if rest else basis)
        return LowRankEdit(
            {name: bases[weight.shape[1] - self.size] for name, weight in self.matrices.items()},
            {name: w.float() @ mixing.to(w.device) for name, w in self.readers.items()},
        )


def _moved(
    matrix: Tensor, own: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]]
) -> Tensor:
    """A matrix with each concept's columns in another place, the first of them."""
    moved = torch.zeros(len(matrix), wanted[-1][1])
    for (start, end), (first, last) in zip(wanted, own, strict=True):
        count = min(end - start, last - first)
        moved[:, start : start + count] = matrix[:, first : first + count]
    return moved


def exact_prompts(settings: EraseSettings, prompts: EncodedPrompts) -> ExactSet:
    """What must stay exact on the way of the tokens; in the soft form nothing is.

    Raises:
        SubspaceError: see :func:`subspace.exact_set`.
    """
    if settings.form == "hard":
        changes = [targets.change for targets in prompts.targets]
        required = [prompt.rows(TOKENS) for prompt in prompts.required]
        keep = [(text, prompt.rows(TOKENS)) for text, prompt in prompts.keep]
        return exact_set(changes, required, keep, settings.keep_room)
    kept = [KeptPrompt(text, False, 1.0) for text, _ in prompts.keep]
    size = prompts.null.rows(TOKENS).shape[1]
    return ExactSet(_nothing(size), [1.0] * len(prompts.targets), kept)


def ways_in(
    settings: EraseSettings,
    prompts: EncodedPrompts,
    exact: ExactSet,
    matrices: Mapping[str, Mapping[str, Tensor]],
    language: Mapping[str, Tensor],
) -> list[WayIn]:
    """The ways on which something is edited, that of the tokens first.

    A way but the first stays as it is where what must stay leaves too little room on it.

    Args:
        exact: of the tokens.
        matrices: W by name, (out, inputs), by way.
        language: second moment of ordinary language, (size, size), by way.
    """
    found = []
    for way, own in matrices.items():
        held = exact if way == TOKENS else _held(settings, prompts, exact, way)
        if held is not None:
            moment = language[way] + _named_moment(settings, prompts, exact, way)
            found.append(WayIn(way, own, prompts.targets_on(way), held, moment))
    return found


def _held(
    settings: EraseSettings, prompts: EncodedPrompts, exact: ExactSet, way: str
) -> ExactSet | None:
    """The prompts that are exact, on another way; None where they leave too little room."""
    basis = _nothing(prompts.null.rows(way).shape[1])
    for prompt in _exact_ones(settings, prompts, exact):
        basis = extend_basis(basis, prompt.rows(way))
    shares = []
    for targets in prompts.targets_on(way):
        change, left = targets.change, targets.change - (targets.change @ basis) @ basis.T
        if not float(left.norm()) > LEAST_LEFT * float(change.norm()) > 0:
            return None
        shares.append(float(left.square().sum() / change.square().sum()))
    return replace(exact, basis=basis, shares_left=shares)


def _exact_ones(settings: EraseSettings, prompts: EncodedPrompts, exact: ExactSet) -> list[Encoded]:
    """The prompts that nothing may reach; none in the soft form."""
    if settings.form == "soft":
        return []
    kept = [prompt for (_, prompt), one in zip(prompts.keep, exact.kept, strict=True) if one.exact]
    return [*prompts.required, *kept]


def _named_moment(
    settings: EraseSettings, prompts: EncodedPrompts, exact: ExactSet, way: str
) -> Tensor:
    """Second moment of the prompts that were named but are not exact, each group at full weight."""
    pairs = prompts.pairs
    moment = NAMED_PROMPT_WEIGHT * second_moment(pair.alternative.rows(way) for pair in pairs)
    approximate = [
        prompt.rows(way)
        for (_, prompt), kept in zip(prompts.keep, exact.kept, strict=True)
        if not kept.exact
    ]
    if settings.form == "soft":
        held = [prompt.rows(way) for prompt in (prompts.null, *prompts.negatives)]
        return moment + SOFT_NULL_WEIGHT * second_moment([*held, *approximate])
    if approximate:
        moment = moment + NAMED_PROMPT_WEIGHT * second_moment(approximate)
    return moment


def _nothing(size: int) -> Tensor:
    return torch.zeros(size, 0, dtype=torch.float64)
