"""The adapter in docs/architecture.md, as it stands there."""

import re
from pathlib import Path

import pytest
from concept_surgery.erase_core import Erasure

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
LONGEST = 60


@pytest.mark.skipif(not PAGE.exists(), reason="there are no documents beside the tests")
def test_a_stranger_can_write_an_adapter(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
    assert example.count("\n") <= LONGEST
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "adapter"}
    exec(compile(example, str(PAGE), "exec"), names)
    erasure, report = names["erasure"], capsys.readouterr().out
    assert report.startswith("Verdict: good") and "nothing is exact" not in report
    assert erasure.record["form"] == "hard" and erasure.record["measures"]["null_drift"] <= 1e-5
    (kept,) = erasure.record["measures"]["kept"]
    assert kept["exact"] and kept["drift"] <= 1e-5
    assert erasure.record["concepts"][0]["moved"] >= 0.9
    assert Erasure.load(tmp_path / "no_cat.safetensors").identity == erasure.identity
