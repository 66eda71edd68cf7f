"""What the extension costs a host that only has it lying there."""

from __future__ import annotations

import os
import subprocess

import numpy as np

from .conftest import new_host
from .webui_host import EXTENSION

START_SECONDS, FIRST_SECONDS = 0.3, 0.9  # of a processor
PROMPT = "a photo of a cat"


def test_a_copy_of_what_is_published_starts_quickly_and_changes_no_picture(tmp_path, host):
    with new_host(tmp_path / "without", extension=False, browser=False) as bare:
        untouched, weights = bare.draw(PROMPT), bare.weights()
        imported = set(bare.get("/probe/modules"))
    assert np.array_equal(host.draw(PROMPT), untouched)
    assert host.weights() == weights
    with new_host(tmp_path / "copied", copied=True) as copied:
        first = copied.get("/probe/costs")
        assert np.array_equal(copied.draw(PROMPT), untouched)
        brought = set(copied.get("/probe/modules")) - imported
        said = copied.text()
    with new_host(tmp_path / "copied", copied=True) as again:
        later = again.get("/probe/costs")
    for when, costs in (("first", first), ("later", later)):
        assert {"scripts", "callbacks_ui_tabs", "ui"} <= set(costs["processor"]), costs
        sums = {name: round(sum(parts.values()), 3) for name, parts in costs.items()}
        print(f"{when} start: {sums} s ({costs['processor']})")
    # Python compiles what is new at the first start.
    assert sum(later["processor"].values()) < START_SECONDS, later
    assert sum(first["processor"].values()) < FIRST_SECONDS, first
    assert "*** Error" not in said and "Traceback" not in said, said[-3000:]
    assert not brought & {"nodes", "tools", "tests", "erase_core", "webui", "pipelines"}, brought


def test_the_installer_installs_nothing(host):
    packages = {path for path in _site_packages(host.python)}
    environment = {**os.environ, "PYTHONPATH": str(host.folder), "WEBUI_LAUNCH_LIVE_OUTPUT": "1"}
    done = subprocess.run(
        [str(host.python), str(host.work / "extensions" / EXTENSION / "install.py")],
        cwd=host.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert set(_site_packages(host.python)) == packages


def _site_packages(python: os.PathLike[str]) -> list[str]:
    listed = subprocess.run(
        [
            str(python),
            "-c",
            "import os,sys;print([os.listdir(p) for p in sys.path if 'site-' in p])",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return sorted(listed.stdout.split(","))
