"""The engine on a model as each kind of host holds it."""

from __future__ import annotations

import pytest
import torch
from concept_surgery.erase_core import preset_settings


def trained(fake, tiny, preset="balanced", **named):
    from concept_surgery.webui import training

    def choose(family):
        return preset_settings(preset, family=family.defaults, **{**tiny, **named})

    return training.train(choose)


def test_it_trains_and_the_model_is_as_it_was(fake, tiny):
    fake.load()
    before = fake.hashes()
    outcome = trained(fake, tiny)
    record = outcome.erasure.record
    assert record["family"] == "SD1.x" and record["form"] == "hard"
    assert record["steps_done"] == tiny["steps"]
    assert record["measures"]["null_drift"] < 1e-5
    assert record["base"]["name"] == "tiny.safetensors"
    assert fake.hashes() == before
    assert not fake.network.training
    hooks = [len(m._forward_hooks) for m in fake.network.modules()]
    assert sum(hooks) == 0
