"""Which erasures a model carries, and what stays exact beside all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..method.collateral import WordChanges
from ..method.protection import HARM
from ..settings.texts import same_text
from .erasure import Erasure

MERGE, EXACT = "merge", "exact"
STRONGEST = 5.0  # strength, in either direction
EXACT_FORM = "hard"
WORST = 3


@dataclass(frozen=True)
class AppliedErasure:
    """What is remembered of an erasure on a model.

    Attributes:
        identity: hash of its values.
        concept: what it erases.
        form: form of the training; only the hard one holds prompts exactly.
        exact: texts of the negative and kept prompts that it holds exactly.
        mode: "merge" or "exact", how it was applied.
        parts: hash of the values of each of its concepts, by text.
        erasure: itself, which what several do together is computed from.
        strength: how strongly it was applied.
    """

    identity: str
    concept: str
    form: str
    exact: tuple[str, ...]
    mode: str
    parts: Mapping[str, str] = field(default_factory=dict)
    erasure: Erasure | None = field(default=None, repr=False, compare=False)
    strength: float = 1.0

    @classmethod
    def of(cls, erasure: Erasure, mode: str, strength: float) -> AppliedErasure:
        """What to remember of an erasure that is applied in a mode."""
        record = erasure.record
        form = record["form"]
        texts = [
            *record["settings"]["negative_prompts"],
            *(entry["text"] for entry in record["measures"]["kept"] if entry["exact"]),
        ]
        exact = tuple(dict.fromkeys(text.strip() for text in texts)) if form == EXACT_FORM else ()
        parts = erasure.parts
        return cls(erasure.identity, erasure.concept, form, exact, mode, parts, erasure, strength)


def applied_twice_problem(
    applied: Sequence[AppliedErasure],
    erasure: Erasure,
    loras: Mapping[str, Sequence[tuple[Tensor, Tensor]]] | None = None,
) -> str:
    """Why an erasure can't go on a model that has it, or a part of it; "" if it can.

    Args:
        applied: the erasures on the model.
        loras: what LoRAs change on it, see :meth:`Erasure.concepts_in`.
    """
    for one in applied:
        if one.identity == erasure.identity:
            return (
                f"The erasure of {erasure.concept!r} is already on this model. Applying it twice "
                "would push the model past where it was trained to go: connect the MODEL of the "
                "loader, or raise the strength of the first one."
            )
        shared = [repr(text) for text in _in_common(one, erasure)]
        if shared:
            return (
                f"The erasure of {erasure.concept!r} has {', '.join(shared)} in common with that "
                f"of {one.concept!r}, which is already on this model: they are of one training. "
                "Applying that twice would push the model past where it was trained to go: leave "
                "one of the two out, or take the common concepts out of one."
            )
    shared = [repr(text) for text in erasure.concepts_in(loras or {})]
    if shared:
        return (
            f"The erasure of {', '.join(shared)} is already on this model: a LoRA loader in front "
            "of this node has loaded it from its file. Applying it twice would push the model past "
            "where it was trained to go: take the LoRA loader or this node away."
        )
    return ""


def _in_common(one: AppliedErasure, erasure: Erasure) -> list[str]:
    """The concepts of an erasure that are of one training with what is applied, by values.

    Either may lack matrices that the other has, such as the one that reads a pooled vector.
    """
    known = set(one.parts.values())
    shared = [text for text, values in erasure.parts.items() if values in known]
    if shared or one.erasure is None:
        return shared
    both = one.erasure.factors.keys() & erasure.factors.keys()
    changes = {name: [(one.erasure.factors[name], one.erasure.bases[name])] for name in both}
    return erasure.concepts_in(changes)


def overlap_warnings(applied: Sequence[AppliedErasure], erasure: Erasure) -> list[str]:
    """What the model has already had erased by another training, in words."""
    warnings = []
    for one in applied:
        texts = [t for t in erasure.parts if any(same_text(t, other) for other in one.parts)]
        if texts:
            warnings.append(
                f"{', '.join(map(repr, texts))}: already erased on this model, by the erasure of "
                f"{one.concept!r} from another training. Both together push the model past where "
                "either was trained to go: take it out of one of them, or lower a strength."
            )
    return warnings


def left_behind_warnings(erasure: Erasure, takers: Sequence[str]) -> list[str]:
    """That an erasure beside the weights doesn't reach what nodes make of the weights.

    Args:
        takers: the nodes behind it that save or merge the weights, as a person finds them.
    """
    return [left_behind_text(f"the erasure of {erasure.concept!r}", takers)] if takers else []


def rounding_warnings(formats: Sequence[str]) -> list[str]:
    """That merging rounds weights of few bits again, whatever they are multiplied with.

    Args:
        formats: of the weights that an erasure changes, those of few bits.
    """
    if not formats:
        return []
    return [
        f"The weights that this erasure changes are kept in few bits ({', '.join(formats)}). "
        "Merged into them, it is rounded, and that changes every picture a little, those of the "
        "prompts that are to stay as well. Choose mode 'exact', which doesn't round."
    ]


def left_behind_text(what: str, takers: Sequence[str]) -> str:
    """The same of anything that is kept beside the weights."""
    return (
        f"Mode 'exact' keeps {what} beside the weights, and {', '.join(takers)} takes the weights "
        "alone: what is saved or merged there is without it. Choose mode 'merge'."
    )


def stack_text(applied: Sequence[AppliedErasure], weights: str = "float32") -> str:
    """What stays exact on a model with several erasures, in words; "" for fewer than two.

    Args:
        applied: the erasures on the model.
        weights: number format of the model's weights.
    """
    if len(applied) < 2:
        return ""
    lines = ["Erased on this model: " + ", ".join(repr(one.concept) for one in applied) + "."]
    soft = [repr(one.concept) for one in applied if one.form != EXACT_FORM]
    if soft:
        lines.append(
            "No prompt is exact, not even the null prompt: the hard form, which holds them, was "
            f"not used for {', '.join(soft)}."
        )
        return " ".join(lines)
    texts = dict.fromkeys(text for one in applied for text in one.exact)
    shared = [repr(text) for text in texts if all(text in one.exact for one in applied)]
    lines.append(f"Exact beside all of them: {', '.join(['the null prompt', *shared])}.")
    for text in texts:
        others = [repr(one.concept) for one in applied if text not in one.exact]
        if others:
            lines.append(f"{text!r} is not exact beside {', '.join(others)}.")
    if weights != "float32" and any(one.mode == MERGE for one in applied):
        lines.append(f"Merging adds the rounding of {weights} weights; mode 'exact' does not.")
    return " ".join(lines)


def harm_text(applied: Sequence[AppliedErasure], changes: WordChanges | None) -> list[str]:
    """That the erasures on a model are too much together, where they are known to be.

    Args:
        changes: of words that nobody named.
    """
    if changes is None or changes.mean <= HARM:
        return []
    advice = "Lower their strengths."
    if can_be_joined(applied):
        advice = "Solve them together with Join Erasures, or lower their strengths."
    return [
        f"These {len(applied)} erasures together change words that nobody named by "
        f"{changes.mean:.0%} (most: {', '.join(changes.worst(WORST))}). {advice}"
    ]


def together_text(applied: Sequence[AppliedErasure], changes: WordChanges | None) -> str:
    """What a person should know about erasures that were solved apart; "" where there is nothing.

    Args:
        changes: of words that nobody named; None where they aren't known.
    """
    if len(applied) < 2:
        return ""
    if changes is not None:
        return f"Words that nobody named change by {changes.mean:.0%} on average."
    if not can_be_joined(applied):
        return ""
    return (
        "They were trained apart, and what they change besides adds up: Join Erasures solves them "
        "together. Connect CLIP to be told how much it is, where that can be known."
    )


def can_be_joined(applied: Sequence[AppliedErasure]) -> bool:
    """Whether Join Erasures could help: all in the hard form, and not parts of one training."""
    records = [one.erasure.record for one in applied if one.erasure is not None]
    trainings = [(record["created"], record["settings"]) for record in records]
    apart = any(training != trainings[0] for training in trainings)
    return apart and all(one.form == EXACT_FORM for one in applied)
