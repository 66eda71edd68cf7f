"""Random widget values, as the host converts them and as links deliver them."""

from __future__ import annotations

import math
import random

import pytest
import torch
from concept_surgery.erase_core import Erasure, SettingsError, erase
from concept_surgery.erase_core.artefact.report import report_text
from concept_surgery.erase_core.settings.prompts import prompt_pairs
from concept_surgery.nodes.settings import ErasureSettings
from concept_surgery.nodes.train import TrainErasure, settings_from_widgets

from ..core.toy import ToyDenoiser

COMBINATIONS = 500
RUNS = 20
# Refusals of a run whose settings are in order, each in words of its own.
REFUSED = "SubspaceError LayerRuleError PredictionError TrainingError GradientError".split()

TEXTS = ["", "cat", "cat => dog", "cat -> dog\npizza", "None", "# no", "=>", "a, b; c", "(cat:1.3)"]
TEXTS += [
    "embedding:nothing",
    "<img src=x>",
    "\u202ecat",
    "🐱 => 🐶",
    "cat\r\ndog\rowl",
    "{}",
    "{a}",
]
TEXTS += ["a photo of {}", "{} at sea => the sea", "a photo of a cat", "x" * 6000, "\n" * 600]
FROM_LINKS = [None, 5, 1.5, True, ["cat"], {"a": 1}, b"cat", math.nan, torch.ones(2)]
NUMBERS = [-1, 0, 1, 2, 3, 8, 16, 64, 256, 10_000, 10**9, -5, 2**64 - 1]
FLOATS = [-1.0, 0.0, 1e-6, 0.003, 0.5, 1.0, 10.0, 1e4, 1e9, math.nan, math.inf, -0.5]


def inputs_of_node() -> dict[str, tuple]:
    """Every widget of the nodes by name: its type and what the host says about it."""
    given = {}
    for node in (TrainErasure, ErasureSettings):
        types = node.INPUT_TYPES()
        given |= {**types.get("required", {}), **types["optional"]}
    wires = ("MODEL", "CLIP", "ERASE_SETTINGS")
    return {name: one for name, one in given.items() if one[0] not in wires}


def value_for(one: tuple, draw: random.Random):
    if draw.random() < 0.05:
        return draw.choice(FROM_LINKS)
    if one[0] == "COMBO" or isinstance(one[0], list):
        options = one[0] if isinstance(one[0], list) else one[1]["options"]
        return draw.choice([*options, *options, "quick", "AUTO"])
    return draw.choice({"STRING": TEXTS, "INT": NUMBERS, "FLOAT": FLOATS}[one[0]])


def test_every_combination_is_settings_or_a_refusal_of_one_input():
    widgets, draw, accepted = inputs_of_node(), random.Random(0), 0
    for _ in range(COMBINATIONS):
        # Each changes some values of a graph that works.
        changed = draw.sample(sorted(widgets), draw.randint(1, 4))
        values = {"erase": "owl => hawk"}
        values |= {name: value_for(widgets[name], draw) for name in changed}
        try:
            settings = settings_from_widgets(values)
            prompt_pairs(settings)
            accepted += 1
        except SettingsError as error:
            name = {"concepts": "erase", "seed": "training_seed"}.get(error.setting, error.setting)
            assert name in widgets and len(str(error)) < 600
    assert 0.2 * COMBINATIONS < accepted < 0.8 * COMBINATIONS


@pytest.mark.parametrize("seed", range(RUNS))
def test_what_is_accepted_runs_or_is_refused_in_words(seed):
    draw = random.Random(seed)
    lines = draw.sample(["cat => dog", "pizza", "red car => blue bike", "castle", "owl"], 3)
    concepts = "\n".join(lines[: draw.choice([1, 1, 2, 3])])
    least = 2 * len(concepts.splitlines())
    values = {"erase": concepts, "steps": 2, "trajectories": least, "captions": 24}
    values["resolution"] = draw.choice([8, 16])
    others = {
        "preset": ["instant", "balanced", "thorough"],
        "kind": ["style", "person", "tags"],
        "keep": ["a tiger", "an old man\na red house\na tree"],
        "negative_prompts": ["blurry\nugly"],
        "templates": ["{}", "see {} there => see nothing\n{} too"],
        "form": ["soft"],
        "layers": ["value", "prompt-fed"],
        "steps": [0, 1, 4],
        "rank": [1, 256],
        "learning_rate": [1e-6, 10.0],
        "eta": [0.5, 10.0],
        "protection": [0.0, 1e-4, 1e4],
        "drift_weight": [0.0, 1e4],
        "null_score": ["student", "detached"],
        "stop_below": [0.0, 0.5, 1.0],
        "batch": [1, 64],
        "trajectories": [least + 1, 4 * least],
        "captions": [8, 9, 60],
        "training_seed": [2**64 - 1],
        "model_type": ["distilled"],
    }
    for name in draw.sample(sorted(others), 5):
        values[name] = draw.choice(others[name])
    try:
        settings = settings_from_widgets(values)
        last = erase(settings, ToyDenoiser(settings.layers))
    except SettingsError as error:
        assert error.setting
    except Exception as error:
        assert type(error).__name__ in REFUSED and "nan" not in str(error)
    else:
        assert isinstance(last, Erasure) and report_text(last.record)
