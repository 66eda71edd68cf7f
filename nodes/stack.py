"""Which erasures a model carries, and what stays exact beside all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..erase_core import Erasure
from ..erase_core.settings import same_text

ATTACHMENT = "concept_surgery_applied"
MERGE, EXACT = "merge", "exact"
EXACT_FORM = "hard"


@dataclass(frozen=True)
class Applied:
    """What is remembered of an erasure on a model.

    Attributes:
        identity: hash of its values.
        concept: what it erases.
        form: form of the training; only the hard one holds prompts exactly.
        exact: texts of the negative and kept prompts that it holds exactly.
        mode: "merge" or "exact", how it was applied.
        parts: hash of the values of each of its concepts, by text.
    """

    identity: str
    concept: str
    form: str
    exact: tuple[str, ...]
    mode: str
    parts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, erasure: Erasure, mode: str) -> Applied:
        """What to remember of an erasure that is applied in a mode."""
        record = erasure.record
        form = record["form"]
        texts = [
            *record["settings"]["negative_prompts"],
            *(entry["text"] for entry in record["measures"]["kept"] if entry["exact"]),
        ]
        exact = tuple(dict.fromkeys(text.strip() for text in texts)) if form == EXACT_FORM else ()
        return cls(erasure.identity, erasure.concept, form, exact, mode, erasure.parts)


def applied_to(model) -> tuple[Applied, ...]:
    """The erasures on a model, in the order in which they were applied."""
    return model.get_attachment(ATTACHMENT) or ()


def twice_text(applied: Sequence[Applied], erasure: Erasure) -> str:
    """Why an erasure can't go on a model that has it, or a part of it; "" if it can."""
    for one in applied:
        if one.identity == erasure.identity:
            return (
                f"The erasure of {erasure.concept!r} is already on this model. Applying it twice "
                "would push the model past where it was trained to go: connect the MODEL of the "
                "loader, or raise the strength of the first one."
            )
        known = set(one.parts.values())
        shared = [repr(text) for text, values in erasure.parts.items() if values in known]
        if shared:
            return (
                f"The erasure of {erasure.concept!r} has {', '.join(shared)} in common with that "
                f"of {one.concept!r}, which is already on this model: they are of one training. "
                "Applying that twice would push the model past where it was trained to go: leave "
                "one of the two out, or take the common concepts out of one."
            )
    return ""


def overlap_warnings(applied: Sequence[Applied], erasure: Erasure) -> list[str]:
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


def stack_text(applied: Sequence[Applied], weights: str = "float32") -> str:
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
