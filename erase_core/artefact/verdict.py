"""What became of an erasure, in the words of who asked for it: the first thing that is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..method.protection import HARM, RUIN
from ..method.subspace import KEEP_FLOOR
from ..settings.texts import folded
from .cautions import harm_grade
from .record import GUIDANCE, KEYS_AND_VALUES, STOPPED

# What became of a concept, the worst first. Of a ruined model the figures don't tell: what it draws
# in place of anything is no longer a picture.
UNTOLD, THERE, TRACES, GONE = "can't be told", "not gone", "traces may remain", "gone"
OUTCOMES = (UNTOLD, THERE, TRACES, GONE)
# It must move this share of the way to be gone, and this share to have left no more than traces: at
# .42 to .67 the emoji model still drew it in 31 of 32 pictures (benchmarks/unnamed/agreement.py).
GONE_FROM, TRACES_FROM = 0.8, 0.7
# What is called exact moves no more than this, relative to itself.
EXACT = 1e-5
# Kept prompts: up to the first share they shift a little, up to the second they shift.
LITTLE, SHIFT = 0.02, 0.2
# Below this room other words changed by tenths on one of two models; nobody is told to go there.
LEAST_ROOM = 0.1
# Words that change by less than this aren't named one by one.
WORTH_NAMING = 0.01
MOST_NAMED, MOST_KEPT = 3, 6
LONGEST_NAME = 60  # characters of a prompt in a sentence

Say = Callable[[str], str]

# What no text shows: control characters, halves of a surrogate pair, what turns the direction.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What reads as a name among other words.
_NAME = re.compile(r"\w[\w' -]*")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MORE = "\N{HORIZONTAL ELLIPSIS}"


@dataclass(frozen=True)
class Kept:
    """What became of a keep prompt.

    Attributes:
        exact: whether it is, by construction and by measurement.
        drift: how far it moved, relative to itself.
        reason: why it isn't exact and what would make it so; "" where it is.
    """

    text: str
    exact: bool
    drift: float
    reason: str


def verdict(record: Mapping[str, Any], say: Say | None = None) -> list[str]:
    """Sentences, the worst first: what is gone, what stays, what else changes.

    Args:
        record: the record of an erasure, of any version.
        say: makes texts of prompts and files fit for where they are shown; by default they are
            on one line each and have nothing in them that can't be printed.
    """
    say = say or plain
    lines = [*_others_harmed(record), *_concepts(record, say)]
    if grade(record) == "not gone":  # then that comes first
        lines = [*_concepts(record, say), *_others_harmed(record)]
    lines += [*_taken_out(record, say), *_stopped(record), *_kept(record, say)]
    lines += _others(record, say)
    if record["measures"]["moved_held_out"] is None:
        lines.append(
            "No picture was sampled: this is judged by the words alone. The preset 'balanced' "
            "looks at pictures, too."
        )
    return lines


def harm(record: Mapping[str, Any]) -> str:
    """ "ruin", "harm" or "": how much of what nobody named changes.

    Older versions looked at no words. What they say of prompts is held against the same limits.
    """
    measures, others = record["measures"], record.get("others")
    found = harm_grade(measures, others)
    if found or others or measures.get("unnamed_of") == GUIDANCE:
        return found
    drift = measures["unnamed_drift"]
    return "" if drift <= HARM else "harm" if drift <= RUIN else "ruin"


def grade(record: Mapping[str, Any]) -> str:
    """The worst that is to be said of it: "ruin", "not gone", "harm", "traces" or "good"."""
    changed, worst = harm(record), worst_outcome(record)
    if changed == "ruin":
        return changed
    if worst == THERE:
        return "not gone"
    return changed or ("traces" if worst == TRACES else "good")


def worst_outcome(record: Mapping[str, Any]) -> str:
    """Of the concept of which the most is left."""
    return min((outcome(record, one) for one in record["concepts"]), key=OUTCOMES.index)


def outcome(record: Mapping[str, Any], concept: Mapping[str, Any]) -> str:
    """What became of a concept, one of :data:`OUTCOMES`. A figure that is no number is none.

    A style that nothing replaces leaves traces however far the figures go: of three such styles of
    the emoji model one picture in eight still showed them, and the figures were those of others.
    """
    if harm(record) == "ruin":
        return UNTOLD
    share = moved(concept)
    if share >= GONE_FROM:
        return TRACES if removed_style(record, concept) else GONE
    return TRACES if share >= TRACES_FROM else THERE


def removed_style(record: Mapping[str, Any], concept: Mapping[str, Any]) -> bool:
    """Whether a concept is a style that nothing takes the place of."""
    kind = concept.get("kind") or record["settings"].get("kind")
    return kind == "style" and not concept["alternative"]


def moved(concept: Mapping[str, Any]) -> float:
    """How far a concept went: on predictions where they were made, else on keys and values."""
    return concept["keys_and_values_moved"] if concept["moved"] is None else concept["moved"]


def kept_prompts(record: Mapping[str, Any]) -> list[Kept]:
    """What became of each keep prompt, in the user's order."""
    found, before = [], False
    for entry in record["measures"]["kept"]:
        exact = entry["exact"] and entry["drift"] <= EXACT
        reason = "" if exact else _reason(record, entry, before)
        found.append(Kept(entry["text"], exact, entry["drift"], reason))
        before = before or entry["exact"]
    return found


def changed_words(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What else changes, the most changed first: of what was looked at, each once."""
    others = record.get("others")
    groups = [others[name] for name in ("nearest", "most_changed", "words")] if others else []
    named = {folded(name) for concept in record["concepts"] for name in names_of(concept)}
    named |= {folded(entry["text"]) for entry in record["measures"]["kept"]}
    words: dict[str, Mapping[str, Any]] = {}
    for entry in [one for group in groups for one in group] or record["measures"]["unnamed"]:
        if folded(entry["text"]) not in named:
            words.setdefault(folded(entry["text"]), entry)
    return sorted(words.values(), key=lambda one: -_sortable(one["drift"]))


def names_of(concept: Mapping[str, Any]) -> list[str]:
    """All names of a concept, the one it was typed by first."""
    return [concept["text"], *concept.get("also", ())]


def percent(value: float) -> str:
    """A share as people write it, to the nearest percent or tenth of one."""
    if not math.isfinite(value):
        return "no figure"
    hundredths = 100 * value
    if abs(hundredths) >= 9.95:
        return f"{hundredths:.0f} %"
    if abs(hundredths) >= 0.05:
        return f"{hundredths:.1f}".removesuffix(".0") + " %"
    return "0 %" if value == 0 else "under 0.1 %"


def way_gone(share: float) -> str:
    """How far something went, rounded down: nothing is called whole that isn't."""
    if not math.isfinite(share):
        return "no figure"
    return f"{math.floor(100 * min(1.0, max(0.0, share)) + 1e-9)} %"


def plain(text: str) -> str:
    """A text on one line, with nothing in it that can't be printed or turns what follows."""
    return _UNPRINTABLE.sub(_REPLACEMENT, " ".join(text.split()))


def short(text: str) -> str:
    """A text as a sentence has room for it, in quotation marks where it could be mistaken."""
    line = " ".join(text.split())
    if len(line) > LONGEST_NAME:
        line = line[: LONGEST_NAME - 1].rstrip() + _MORE
    return line if _NAME.fullmatch(line) else f"\u201c{line}\u201d"


def listed(names: Sequence[str], most: int) -> str:
    """Names in a sentence: "a, b and 3 more"."""
    shown, more = names[:most], len(names) - most
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


def _others_harmed(record: Mapping[str, Any]) -> list[str]:
    found = harm(record)
    if found == "ruin":
        return ["DON'T USE IT. The model is ruined for much that nobody named."]
    return ["WITH CARE. Much that nobody named changes, too."] if found else []


def _concepts(record: Mapping[str, Any], say: Say) -> list[str]:
    """A sentence for each concept; those of which most is left come first."""
    place = lambda concept: OUTCOMES.index(outcome(record, concept))  # noqa: E731
    return [_of_concept(record, concept, say) for concept in sorted(record["concepts"], key=place)]


def _of_concept(record: Mapping[str, Any], concept: Mapping[str, Any], say: Say) -> str:
    name = say(" or ".join(map(short, names_of(concept))))
    share, became = way_gone(moved(concept)), outcome(record, concept)
    if became == GONE:
        return f"{name} is gone ({share})."
    if became == UNTOLD:
        return f"Whether {name} is gone can't be told of a ruined model."
    if became == TRACES:
        line = f"TRACES MAY REMAIN: {name} is mostly gone ({share})."
        if removed_style(record, concept):
            line += " A style seldom goes whole unless another takes its place: name one."
        return line
    return f"NOT GONE: {name} is still drawn (it went {share} of the way)."


def _taken_out(record: Mapping[str, Any], say: Say) -> list[str]:
    names = record.get("taken_out") or []
    if not names:
        return []
    verb = "is" if len(names) == 1 else "are"
    return [f"{listed([say(short(name)) for name in names], MOST_KEPT)} {verb} drawn again."]


def _stopped(record: Mapping[str, Any]) -> list[str]:
    if record.get("training") != STOPPED and not record["stopped_early"]:
        return []
    if record["converged"]:  # of its own accord, since enough was learned
        return []
    done, steps = record["steps_done"], record["settings"]["steps"]
    return [f"Stopped after {done} of {steps} steps: what was learned until then is kept."]


def _kept(record: Mapping[str, Any], say: Say) -> list[str]:
    """What is exact in one sentence, and one for each reason why something isn't."""
    kept = kept_prompts(record)
    exact = [say(short(one.text)) for one in kept if one.exact]
    lines = [f"Kept exactly: {listed(exact, MOST_KEPT)}."] if exact else []
    groups: dict[tuple[str, str], list[Kept]] = {}
    for one in kept:
        if not one.exact:
            groups.setdefault((_shifts(one.drift), one.reason), []).append(one)
    for (how, reason), group in groups.items():
        names = listed([say(short(one.text)) for one in group], MOST_NAMED)
        worst = max((one.drift for one in group), key=_sortable)
        verb, _, rest = how.partition(" ")
        verb = verb if len(group) > 1 else verb + "s"
        figure = percent(worst) if len(group) == 1 else f"at most {percent(worst)}"
        lines.append(f"{names} {f'{verb} {rest}'.strip()} ({figure}): {reason}.")
    return lines


def _shifts(drift: float) -> str:
    if drift <= LITTLE:
        return "shift a little"
    return "shift" if drift <= SHIFT else "change a lot"


def _reason(record: Mapping[str, Any], entry: Mapping[str, Any], before: bool) -> str:
    """Why a keep prompt isn't exact, and what would make it so.

    What is promised was tried on the prompts themselves, but for records of older versions. Fewer
    words seldom do: most encoders fill their window, and a prompt takes all of it. On two of them
    one word left 0 to 3 hundredths more room than a sentence, a replacement 14 to 30.

    Args:
        before: whether a keep prompt before it is exact.
    """
    if record["form"] != "hard":
        return "in the soft form nothing is kept exactly, choose the hard form"
    if entry["exact"]:
        return "it was to stay exactly as it is and doesn't, train again in a higher precision"
    room = keep_room(record)
    old = "share_without_negatives" not in entry
    if _fits(room, entry.get("share_without_negatives"), old and _negatives(record) > 0):
        one = _negatives(record) == 1
        them = "prompt takes its room, shorten it" if one else "prompts take its room, shorten them"
        return f"your negative {them} or leave {'it' if one else 'them'} out"
    if _fits(room, entry.get("share_first"), old and before):
        return "the prompts kept before it take its room, move it to the top"
    removed = [concept for concept in record["concepts"] if not concept["alternative"]]
    if removed:
        return "it would leave too little room to erase in, name what is drawn instead"
    if LEAST_ROOM <= entry.get("share_left", 0.0) < room:
        # Rounded down, so that it is enough.
        enough = math.floor(100 * entry["share_left"]) / 100
        return (
            "it would leave too little room to erase in, set 'Room beside kept prompts' to "
            f"{enough:g} to keep it exactly and other words less well"
        )
    return "it would leave too little room to erase in, fewer words help a little"


def _negatives(record: Mapping[str, Any]) -> int:
    return len(record["settings"]["negative_prompts"])


def keep_room(record: Mapping[str, Any]) -> float:
    """The least share of an edit that exact keep prompts had to leave."""
    return record["settings"].get("keep_room") or KEEP_FLOOR


def _fits(room: float, share: float | None, otherwise: bool) -> bool:
    """Whether a share is enough for a keep prompt; where it isn't known, what is likely."""
    return otherwise if share is None else share >= room


def _others(record: Mapping[str, Any], say: Say) -> list[str]:
    words = changed_words(record)
    if not words:
        return []
    naming = [one for one in words if not one["drift"] < WORTH_NAMING][:MOST_NAMED]
    if not naming:
        return [f"Nothing else that was looked at changes by more than {percent(WORTH_NAMING)}."]
    named = ", ".join(f"{say(short(one['text']))} {percent(one['drift'])}" for one in naming)
    # Older versions tried a few prompts, and looked at no neighbours.
    what = "What else changes most" if record.get("others") else "Most changed of what was tried"
    return [f"{what}: {named}."]


def of_words(record: Mapping[str, Any]) -> bool:
    """Whether how far prompts drift was judged by the words alone."""
    return record["measures"]["drift_of"] == KEYS_AND_VALUES


def _sortable(value: float) -> float:
    """What is no number counts as the worst."""
    return value if value == value else math.inf
