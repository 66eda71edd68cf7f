"""How the hosts load the extension, and what they are told."""

from __future__ import annotations

import configparser
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.environment import ROOT
from tools.published import faults

from .conftest import HERE

LOADER = """
import sys, time, runpy
sys.path[:0] = {folders!r}
import modules.scripts, modules.script_callbacks, gradio, torch, safetensors  # the host has them
before = list(sys.path)
sys.path = [{scripts!r}, *sys.path]  # trap 1
begun = time.process_time()
module = runpy.run_path({script!r})
seconds = time.process_time() - begun
assert sys.path == [{scripts!r}, *before], sys.path
sys.path = before
from modules import scripts, script_callbacks
found = [v for v in module.values() if isinstance(v, type) and issubclass(v, scripts.Script)]
assert [one.__name__ for one in found] == ["ConceptSurgeryScript"], found
assert set(script_callbacks.registered) == {{"ui_tabs", "app_started"}}
ours = [n for n in sys.modules if n.split(".")[0] in ("nodes", "tools", "tests", "webui", "web")]
assert not ours, ours
# Later, when sys.path is as it was, everything else can still be imported.
begun = time.process_time()
((tab, title, where),) = [t for f in script_callbacks.registered["ui_tabs"] for t in f()]
assert (title, where) == ("Concept Surgery", "concept_surgery")
print(seconds + time.process_time() - begun)
"""


def loaded(tmp_path: Path, python: str = sys.executable) -> float:
    """Seconds of a processor for the extension at the host's start: its script, and its tab."""
    folders = [str(HERE / "a1111"), str(HERE / "common")]
    if python == sys.executable:
        folders.append(str(HERE / "gradio_fake"))
    code = LOADER.format(
        folders=folders,
        scripts=str(ROOT / "scripts"),
        script=str(ROOT / "scripts" / "concept_surgery.py"),
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_the_hosts_load_it_quickly_and_nothing_clashes(tmp_path):
    assert loaded(tmp_path) < 0.3


def test_the_install_script_installs_nothing_and_speaks_of_each_host(tmp_path):
    source = (ROOT / "install.py").read_text("utf-8")
    assert "pip" not in source and "subprocess" not in source
    assert all(host in source for host in ("ComfyUI", "Automatic1111", "Forge"))
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "install.py")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stdout and time.perf_counter() - begun < 5


def test_the_description_is_what_hosts_read():
    config = configparser.ConfigParser()
    config.read(ROOT / "metadata.ini")
    assert config.get("Extension", "Name") == "concept-surgery"


@pytest.mark.parametrize(
    "path", [p for f in ("webui", "scripts") for p in sorted((ROOT / f).rglob("*.py"))], ids=str
)
def test_nothing_forbidden_is_in_it(path):
    assert not faults(path.name, path.read_bytes())
