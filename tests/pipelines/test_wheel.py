"""What ``pip install concept-surgery[diffusers]`` gives: the example and commands, offline."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from concept_surgery.pipelines import Erasure

from tools.environment import ROOT
from tools.published import python_faults

PAGE = (ROOT / "docs" / "python.md").read_text("utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda p: p.stem)
def test_nothing_in_it_is_forbidden(path):
    """By the rules of published code, which this is not in the registry's archive for."""
    assert list(python_faults(path.read_text("utf-8"))) == []


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    """The folder of programs of an environment with the wheel and what its extra asks for.

    What is large is there already, and pip says whether it is what was asked for.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=True)
    place = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    python = str(place / "python")
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    manage = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*manage, "uninstall", "-q", "-y", "setuptools"], check=True)  # an old one
    asked = ["install", "-q", "--no-index", f"{wheel}[diffusers]"]
    subprocess.run([*manage, *asked], check=True)
    return place


@pytest.mark.skipif(os.environ.get("WHEEL_TESTS") != "1", reason="WHEEL_TESTS=1 runs it")
def test_the_example_and_each_command_run_there(scripts, _sd1, tmp_path):
    _sd1.save_pretrained(tmp_path / "my-model")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment["PATH"] = f"{scripts}{os.pathsep}{environment['PATH']}"
    environment.pop("PYTHONPATH", None)

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(scripts / command[0]), *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {done.stderr[-3000:]}"
        return done.stdout

    assert "site-packages" in run("python", "-c", "import concept_surgery as c; print(c.__file__)")
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "example.py").write_text(example, "utf-8")
    assert "Verdict:" in run("python", "example.py")
    (tmp_path / "no_cat.safetensors").rename(tmp_path / "kept.safetensors")
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    for line in commands.splitlines():
        run(*shlex.split(line))
    one, other = (Erasure.load(tmp_path / f"{name}.safetensors") for name in ("kept", "no_cat"))
    assert one.identity == other.identity
    assert (tmp_path / "my-model-merged" / "model_index.json").exists()
