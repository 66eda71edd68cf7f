"""The example and the commands in docs/python.md, as they stand there."""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest
from concept_surgery.pipelines import Erasure, erasing
from concept_surgery.pipelines.cli import main

from tools.environment import ROOT

PAGE = (ROOT / "docs" / "python.md").read_text("utf-8")
QUICKER = {"captions": 8, "trajectories": 2, "sampling_steps": 3, "resolution": 64}


@pytest.fixture
def quickly(monkeypatch):
    """Presets that take seconds; the rest of a call is as it stands."""
    made = erasing.preset_settings
    monkeypatch.setattr(
        erasing,
        "preset_settings",
        lambda *given, **named: dataclasses.replace(
            made(*given, **named), templates=("a photo of {}",), **QUICKER
        ),
    )


def test_the_example_and_the_commands_run(_sd1, quickly, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _sd1.save_pretrained("my-model")
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(example, "docs/python.md", "exec"), {"__name__": "example"})
    assert "Verdict:" in capsys.readouterr().out
    for name in ("without_cat.png", "no_cat.safetensors", "my-model-without-cat"):
        assert (tmp_path / name).exists()
    kept = Erasure.load("no_cat.safetensors")
    assert kept.record["settings"]["keep"] == ["a photo of a tiger"]
    (tmp_path / "no_cat.safetensors").unlink()
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "concept-surgery" and main(arguments) == 0, line
    assert Erasure.load("no_cat.safetensors").identity == kept.identity
    assert (tmp_path / "my-model-merged" / "model_index.json").exists()
