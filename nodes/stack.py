"""Which erasures a model carries, and what stays exact beside all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..erase_core import Erasure

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
    """

    identity: str
    concept: str
    form: str
    exact: tuple[str, ...]
    mode: str

    @classmethod
    def of(cls, erasure: Erasure, mode: str) -> Applied:
        """What to remember of an erasure that is applied in a mode."""
        record = erasure.record
        form = record.get("form", EXACT_FORM)  # files of before there was another
        texts = [
            *record["settings"].get("negative_prompts", ()),
            *(entry["text"] for entry in record["measures"].get("kept", ()) if entry["exact"]),
        ]
        exact = tuple(dict.fromkeys(text.strip() for text in texts)) if form == EXACT_FORM else ()
        return cls(erasure.identity, erasure.concept, form, exact, mode)


def applied_to(model) -> tuple[Applied, ...]:
    """The erasures on a model, in the order in which they were applied."""
    return model.get_attachment(ATTACHMENT) or ()


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
