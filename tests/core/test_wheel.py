"""What ``pip install .`` gives: the engine as the package concept_surgery, without any host."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tools.environment import ROOT

CORE = ROOT / "tests" / "core"
# What is run of the core's tests; all of them with WHEEL_TESTS=1, which takes two minutes more.
SOME = {"test_erasure", "test_formats", "test_guidance", "test_record"}
ALL = os.environ.get("WHEEL_TESTS") == "1"


def needs_the_checkout(path: Path) -> bool:
    """Whether tests are about more than the engine: its benchmarks, tools or archive."""
    if path.stem == "test_tags":
        return True
    tree = ast.parse(path.read_text("utf-8"))
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    return any(name.split(".")[0] in ("benchmarks", "tools") for name in names)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The Python of a new environment with the wheel, and of the rest what the wheel needs."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env")
    python = folder / "env" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    shutil.unpack_archive(wheel, site, "zip")
    # torch and pytest are large: they are taken from where this runs.
    (site / "shared.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return python


def test_it_is_imported_where_there_is_no_host(installed, tmp_path):
    script = (
        "import sys, importlib.util as u, concept_surgery as c;"
        "assert 'site-packages' in c.__file__, c.__file__;"
        "assert c.erase and c.preset_settings and c.Denoiser and c.Erasure;"
        "assert not [m for m in ('comfy', 'nodes', 'modules', 'folder_paths') if u.find_spec(m)];"
        "assert u.find_spec('concept_surgery.nodes') is None"
    )
    subprocess.run([str(installed), "-c", script], cwd=tmp_path, check=True)


def test_the_benchmarks_methods_need_no_host_either(installed, tmp_path):
    script = (
        f"import sys; sys.path.append({str(ROOT)!r}); import benchmarks.erasure.methods as m;"
        "assert len(m.METHODS) > 10 and 'comfy' not in sys.modules"
    )
    subprocess.run([str(installed), "-c", script], cwd=tmp_path, check=True)


@pytest.mark.skipif(
    not (ALL or os.environ.get("LONG_TESTS") == "1"),
    reason="LONG_TESTS=1 or WHEEL_TESTS=1",
)
def test_the_cores_tests_pass_on_it(installed, tmp_path):
    folder = tmp_path / "tests" / "core"
    shutil.copytree(CORE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in folder.glob("test_*.py"):
        if needs_the_checkout(path) or not (ALL or path.stem in SOME):
            path.unlink()
    assert len(list(folder.glob("test_*.py"))) == len(SOME) or ALL
    command = [str(installed), "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:xdist"]
    run = subprocess.run(
        [*command, "tests/core"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
