"""The report a person reads, from an erasure's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..settings.families import by_name
from .cautions import guidance_change
from .formats import concept_list
from .record import GUIDANCE, NO_HELP, NOT_NEEDED, PREDICTION
from .verdict import GONE_FROM, grade, keep_room, moved, verdict

WORDS_SHOWN = 8
# What became of the training, where it wasn't run to its end.
_TRAINING = {
    NOT_NEEDED: ("Not trained: the closed form moves the guidance far enough on held-out states.",),
    NO_HELP: (
        "Not trained further: a few steps brought nothing on held-out states, so the closed form "
        "stays.",
    ),
}


def report_text(record: Mapping[str, Any], notes: list[str] | None = None) -> str:
    """Plain text: what was erased, how far, what stayed, what it cost.

    Args:
        record: the record of an erasure.
        notes: more lines, for example what the host could not take into account.
    """
    lines = [_verdict(record), *_headline(record), *record["warnings"], *_movement(record)]
    lines += [*_pooled(record), *_each_concept(record), *_staying(record), *_map(record)]
    lines += [*_readers(record), *_cost(record), *note_lines(record), *(notes or [])]
    return "\n".join(lines)


def _verdict(record: Mapping[str, Any]) -> str:
    """The first line: whether this can be used."""
    good = "good. " if grade(record) == "good" else ""
    return f"Verdict: {good}{' '.join(verdict(record))}"


def _headline(record: Mapping[str, Any]) -> list[str]:
    base = record["base"].get("name") or record["family"]
    lines = [f"Erased {concept_list(record)}, on {base}."]
    if record.get("taken_out"):
        lines.append(
            f"Taken out again: {', '.join(record['taken_out'])}. Figures that are not of one "
            "concept were measured with everything in."
        )
    if record.get("pooled_left_out"):
        lines.append(
            "The pooled vector stays as it was: its part was left out of the file. The other "
            "figures were measured with it."
        )
    return lines


def _movement(record: Mapping[str, Any]) -> list[str]:
    frozen = record["measures"]["moved_held_out"]
    if frozen is None:
        least = min(map(moved, record["concepts"]))
        return [
            f"Keys and values moved {least:.0%} of the way. Nothing was sampled, so how far the "
            "pictures go is not known; the preset 'balanced' measures it."
        ]
    sampled = record["measures"]["moved_sampled"]
    return [
        f"Guidance moved {frozen['overall']:.0%} of the way on held-out states "
        f"(high noise {frozen['high']:.0%}, middle {frozen['middle']:.0%}, "
        f"low {frozen['low']:.0%}), {sampled['overall']:.0%} on the edited model's own.",
        f"Change of the erased prompts: {_share(frozen['erased_change'])} of the prediction.",
    ]


def _pooled(record: Mapping[str, Any]) -> list[str]:
    """What comes past keys and values, on models with a pooled vector."""
    pooled = record["measures"]["pooled"]
    if pooled is None:
        return []
    if pooled.get("left") is not None:
        return [
            f"The pooled vector alone brings {_share(pooled['leak'])} of the concept back to a "
            f"prompt of its replacement on the untouched model, {_share(pooled['left'])} after "
            "the erasure."
        ]
    return [
        f"The pooled vector goes past what was trained: alone it brings {_share(pooled['leak'])} "
        "of the concept back to a prompt of its replacement."
    ]


def _each_concept(record: Mapping[str, Any]) -> list[str]:
    """With several concepts: what is left to each."""
    if len(record["concepts"]) < 2:
        return []
    lines = []
    for concept in record["concepts"]:
        lines.append(
            f"  {concept['text']}: moved {moved(concept):.0%}, "
            f"{concept['share_left']:.0%} of its edit was left beside the exact prompts."
        )
    return lines


def _staying(record: Mapping[str, Any]) -> list[str]:
    measures, hard = record["measures"], record["form"] == "hard"
    of = "" if measures["drift_of"] == PREDICTION else " of keys and values"
    held = "exact" if hard else "held by a penalty"
    lines = [
        f"Null prompt: {held}, drift{of} {_share(measures['null_drift'])}; zeroed out: "
        f"{_share(measures['zeroed_drift'])}."
    ]
    lines += [
        f"Negative prompt {entry['text']!r}: {held}, drift{of} {_share(entry['drift'])}."
        for entry in measures["negative_prompts"]
    ]
    for entry in measures["kept"]:
        kind = "exact" if entry["exact"] else "approximate"
        lines.append(f"Kept {entry['text']!r}: {kind}, drift{of} {_share(entry['drift'])}.")
    lines += [*_why_not_exact(record), _unnamed(record)]
    if hard:
        left = record["subspace"]["share_left"]
        lines.append(f"Share of the edit left beside the exact prompts: {left:.0%}.")
    return lines


def _why_not_exact(record: Mapping[str, Any]) -> list[str]:
    """In the hard form, why keep prompts are approximate, and what would make them exact."""
    # The share is not among what a record must have.
    kept = [one for one in record["measures"]["kept"] if not one["exact"] and "share_left" in one]
    if record["form"] != "hard" or not kept:
        return []
    advice = "use fewer words in it"
    if record["measures"]["kept"][0] is not kept[0]:
        advice += ", or move it further up"
    if record["settings"]["negative_prompts"]:
        advice += ", or take a negative prompt away, which comes first"
    least = f"at least {keep_room(record):.0%} must be left to the concept"
    return [
        f"{one['text']!r} isn't exact because beside it only {one['share_left']:.0%} of the edit "
        f"would be left ({least}). To make it exact, {advice}."
        for one in kept
    ]


def _unnamed(record: Mapping[str, Any]) -> str:
    measures, others = record["measures"], record.get("others")
    drift, count = _share(measures["unnamed_drift"]), len(measures["unnamed"])
    what = measures.get("unnamed_of", measures["drift_of"])
    if what == GUIDANCE and others:
        guidance = _share(guidance_change(measures) or 0.0)
        return (
            f"Words nobody named change by {drift}: their guidance by {guidance} on average of "
            f"{count}, their keys and values by {_share(others['change'])}."
        )
    if what == GUIDANCE:
        return f"Words nobody named: their guidance changes by {drift} on average of {count}."
    of = "" if what == PREDICTION else " of keys and values"
    return f"Prompts nobody named: drift{of} {drift} on average of {count}."


def _map(record: Mapping[str, Any]) -> list[str]:
    """What else changes, word by word; records of older versions don't say."""
    others = record.get("others")
    if not others:
        return []
    rows = (
        ("of those that nothing protected", others["words"][:WORDS_SHOWN]),
        ("nearest to what is erased", others["nearest"]),
        ("most changed of those protected", others["most_changed"]),
    )
    lines = [f"  {title}: {_changes(entries)}" for title, entries in rows if entries]
    return ["What else changes, by keys and values:", *lines] if lines else []


def _changes(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{one['text']} {one['drift']:.0%}" for one in entries)


def _readers(record: Mapping[str, Any]) -> list[str]:
    """The layers that read the prompt alone, where they were found by predictions."""
    rows = record.get("readers")
    if not rows:
        return []
    what = "exact" if record["form"] == "hard" else "edited"
    lines = [
        f"  {row['name']}: {row['matrices']} of width {row['width']}, "
        + (what if row["edited"] else f"left as it is ({row['why']})")
        for row in rows
    ]
    return ["Layers that read the prompt alone, found by predictions:", *lines]


def _cost(record: Mapping[str, Any]) -> list[str]:
    return [
        f"{record['steps_done']} steps, {record['forward_equivalents']} forward-equivalents, "
        f"{record['seconds']:.0f} s; {record['matrices']} matrices, rank {record['rank']}, "
        f"protection {record['protection']:g}.",
        *_memory(record.get("memory")),
    ]


def _memory(memory: Mapping[str, Any] | None) -> list[str]:
    """How training went through the device's memory; records of older versions don't say."""
    if not memory:
        return []
    needed, whole, free = (_gigabytes(memory[n]) for n in ("needed", "needed_whole", "free"))
    line = f"Memory beside the weights: a training step needs about {needed} of {free} free"
    chosen = []
    if needed != whole:
        chosen.append(f"as a whole it would need {whole}")
    if memory["ran_out"]:
        chosen.append("memory ran out on the way")
    if not chosen:
        return [line + "."]
    how = f"trained {memory['at_once']} at a time"
    if memory["checkpointing"]:
        how += " with gradient checkpointing, which costs a third more"
    return [f"{line}; {' and '.join(chosen)}, so it {how}."]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def note_lines(record: Mapping[str, Any]) -> list[str]:
    """What else a person should know of a run."""
    family, settings = by_name(record["family"]), record["settings"]
    # A model of another kind whose readers a host of its own names may well be trained.
    told = family.readers_known or record["form"] == "soft" or record.get("readers")
    lines = list(family.notes) if told else []
    lines += _TRAINING.get(record.get("training", ""), ())
    if record["converged"]:
        lines.append(
            f"Ended after {record['steps_done']} of {settings['steps']} steps, because the rest "
            f"on held-out states stayed below {settings['stop_below']:.0%}."
        )
    elif record["ended_by"]:
        lines.append(
            f"Ended after {record['steps_done']} of {settings['steps']} steps, and kept what was "
            f"learned until then. {record['ended_by']}"
        )
    elif record["stopped_early"]:
        lines.append(
            f"Stopped early, after {record['steps_done']} steps of {settings['steps']}, and kept "
            "what was learned until then."
        )
    if settings["eta"] > 0:
        lines.append(
            f"eta is {settings['eta']:g}: naming the concept in a negative prompt now "
            "draws it. Leave it out of your negative prompts."
        )
    if settings["guidance_scale"] == 1:
        lines.append(
            "Made for a model that samples at guidance 1: the null prompt and negative prompts "
            "aren't used there, so put what must not change under 'keep'."
        )
    figures = [c["moved"] for c in record["concepts"] if c["moved"] is not None]
    if figures and not min(figures) >= GONE_FROM:
        lines.append(
            f"The guidance moved less than {GONE_FROM:.0%} of the way: traces may remain. Try the "
            "preset 'thorough', fewer keep prompts or a lower protection."
        )
    return lines


def _share(value: float) -> str:
    return f"{value:.1e}" if value < 1e-3 else f"{value:.1%}"
