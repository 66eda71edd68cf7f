"""What a run will do, known before it does it: how many states, and what they cost at most."""

from __future__ import annotations

from ..method.protection import MOST_TRIES
from ..model.activations import PLAIN_GRADIENT
from ..settings.settings import EraseSettings

# States on which a protection is tried, and the early stop is decided: few, since they are only
# compared with each other.
TRIED_STATES = 12
HELD_OUT_SHARE = 5  # of the trajectories, one in so many is to check on
# Trajectories, for each concept, on which it is tried whether training helps.
TRIAL_TRAJECTORIES = 2
STOP_STATES = 6
STOP_EVERY = 10
# One image forward, to count what its backward needs; then forward and backward, and forward at
# both ends of a difference, where that leaves no doubt.
CHECKED_GRADIENT = 6
# What R adds where it trains too: a difference, forward and backward, and these once more where B
# starts from nothing.
CHECKED_BASES = 8
# What a finished edit is measured on, in states and prompts.
HELD_OUT_STATES = 18
SAMPLED_TRAJECTORIES = 2
SAMPLED_STEPS = 5
NULL_STATES = 2
UNNAMED_PROMPTS = 16
POOLED_STATES = 3
# From so many evaluations at the model's own size on, a person is told before they are made: more
# than half an hour at five a second. The largest preset plans 2,000 for a concept.
MANY_EVALUATIONS = 10_000
PICTURE_EVALUATIONS = 40  # of 20 steps, with guidance


def planned_cost(
    settings: EraseSettings, pooled: bool, plain: int = 0, with_gradient: int = PLAIN_GRADIENT
) -> dict[str, int]:
    """Forward-equivalents of a run by stage, at most.

    Args:
        pooled: whether the model takes pooled vectors.
        plain: how many plain captions are held like keep prompts, instead of a protection.
        with_gradient: of a prediction in training; checkpointing makes it more.
    """
    if not settings.samples:
        return {}
    training, held_out = trajectory_counts(settings)
    soft = settings.form == "soft"
    kept = len(settings.keep) + len(settings.negative_prompts) + plain if soft else 0
    concepts = len(settings.concepts)
    tried = 0 if plain else tried_states(settings)
    trial = settings.trial_steps if settings.steps and not plain else 0
    stops = settings.steps // STOP_EVERY if settings.stop_below else 0
    images = 1 + soft + bool(kept)
    checked = CHECKED_GRADIENT + soft * CHECKED_BASES
    compared = tried if settings.steps and not soft else 0
    return {
        "pool": (3 * (training + held_out) + 2 * kept) * settings.sampling_steps,
        "protection": tried * (MOST_TRIES if settings.protection is None else 1),
        "gradient": checked * images * (1 + bool(trial)) if settings.steps else 0,
        "trial": with_gradient * trial * settings.batch + tried if trial else 0,
        "training": with_gradient * settings.steps * settings.batch * images
        + stops * STOP_STATES * concepts
        + compared,
        "checks": planned_checks(settings, held_out, pooled),
    }


def planned_checks(settings: EraseSettings, held_out: int, pooled: bool) -> int:
    """Forward-equivalents of the checks.

    Args:
        held_out: how many trajectories are held out.
        pooled: whether the model takes pooled vectors.
    """
    prompts = len(settings.keep) + len(settings.negative_prompts) + UNNAMED_PROMPTS
    sampled = 4 if settings.form == "hard" else 5
    return (
        checked_states(settings, held_out * settings.sampling_steps)
        + sampled * SAMPLED_TRAJECTORIES * SAMPLED_STEPS
        + 2 * (NULL_STATES + 1)
        + 2 * prompts
        + 3 * POOLED_STATES * pooled
    )


def checked_states(settings: EraseSettings, available: int) -> int:
    """How many held-out states the movement is measured on: some for each concept."""
    return min(available, max(HELD_OUT_STATES, 6 * len(settings.concepts)))


def trajectory_counts(settings: EraseSettings) -> tuple[int, int]:
    """How many trajectories to train on and to check on; without training all are to check."""
    # Each concept is checked on at least one.
    count, concepts = settings.trajectories, len(settings.concepts)
    if not settings.steps:
        return 0, max(count, concepts)
    held_out = max(1, round(count / HELD_OUT_SHARE), concepts)
    return max(1, count - held_out), held_out


def tried_states(settings: EraseSettings) -> int:
    """How many held-out states a protection is tried on."""
    return max(TRIED_STATES, 3 * len(settings.concepts))


def cost_warning(settings: EraseSettings, planned: int, own_resolution: int) -> str:
    """What to say before a run that takes very long; "" where it doesn't.

    Args:
        planned: forward-equivalents of the run.
        own_resolution: side of the pictures that the model was made for, in pixels.
    """
    # A prediction costs as much as it has pixels, at least.
    evaluations = planned * (settings.resolution / own_resolution) ** 2
    if evaluations < MANY_EVALUATIONS:
        return ""
    return (
        f"This run may take as long as {evaluations / PICTURE_EVALUATIONS:,.0f} pictures of 20 "
        f"steps: {settings.steps} steps, {settings.trajectories} trajectories, "
        f"{settings.resolution} px, {len(settings.concepts)} concepts. If you didn't mean that, "
        "cancel it and lower them; -1 and 0 leave them to the preset."
    )
