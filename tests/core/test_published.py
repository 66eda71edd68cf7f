"""What the registry would publish: no forbidden means, no host in the science, metadata."""

import ast
import re
import subprocess
import sys
import zipfile

import pytest

from tools.environment import ROOT
from tools.published import (
    FIELDS,
    FORBIDDEN_DOCUMENT,
    FORBIDDEN_SCRIPT,
    PublishingError,
    faults,
    missing_fields,
    pack,
    published_files,
)

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "latent_preview",
    "server",
    "nodes",
    "execution",
}
# Brought by every host, which can't do without, and asked for in `nodes/` alone.
HOST_PACKAGES = {"PIL"}
# Whose addresses nobody has decided on yet; see `python -m tools publishable`.
UNKNOWN_YET = {"project.urls.Repository", "project.urls.Issues", "tool.comfy.Icon"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> zipfile.ZipFile:
    path = tmp_path_factory.mktemp("published") / "node.zip"
    pack(ROOT, path)
    with zipfile.ZipFile(path) as opened:
        yield opened


def python_files() -> list[str]:
    return [name for name in published_files(ROOT) if name.endswith(".py")]


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_the_list_of_published_files_is_the_pack(archive):
    names = archive.namelist()
    assert {name.split("/")[0] for name in names if name.endswith(".py")} == {
        "__init__.py",
        "install.py",
        "faces",
        "nodes",
        "erase_core",
    }
    whole = {"LICENSE", "README.md", "pyproject.toml", "requirements.txt", "web"}
    whole |= {
        "__init__.py",
        "install.py",
        "nodes",
        "faces",
        "erase_core",
        "example_workflows",
        "docs",
    }
    whole |= {"locales"}
    assert {name.split("/")[0] for name in names} == whole
    size = sum(item.compress_size for item in archive.infolist())
    assert size < 5 * 2**20, "the archive has grown beyond what a node pack needs"


def test_nothing_that_is_published_is_forbidden(archive):
    found = [fault for name in archive.namelist() for fault in faults(name, archive.read(name))]
    assert not found


@pytest.mark.parametrize("name", python_files())
def test_the_science_imports_no_host(name, archive):
    source = archive.read(name).decode("utf-8")
    if name.startswith("erase_core/"):
        assert not imports(ast.parse(source)) & (HOST_MODULES | HOST_PACKAGES)
        assert "cuda" not in source


def test_the_science_runs_from_the_archive_alone(archive, tmp_path):
    archive.extractall(tmp_path)
    script = (
        "import erase_core, sys; from erase_core.method import reading;"
        f"assert erase_core.__file__.startswith({str(tmp_path)!r});"
        "assert len(reading.plain_captions(20)) == 20; assert 'comfy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


FORBIDDEN_PYTHON = """
import subprocess
import pickle as quiet
from socket import create_connection
import urllib.request
from os import system
from os import *
import torch.hub
from torch import load
from torch.utils import cpp_extension
import importlib; importlib.import_module('os')
from importlib import import_module
from importlib import util; util.module_from_spec(spec)
import os; os.system('x')
import os as o; o.popen('x')
import os; run = os.execv
import os; os.spawnl(0, 'x')
import os; os.fork()
import os; getattr(os, 'system')('x')
import os; getattr(os, 'sys' + 'tem')('x')
import os; vars(os)['system']('x')
import os; os.__dict__['system']('x')
import sys; sys.modules['os'].system('x')
import sys; sys.modules.get('os')
import operator; operator.attrgetter('system')
import torch; torch.load('x')
import torch as t; t.load('x')
import torch; unpickle = torch.load
import torch; torch.jit.load('x')
import torch; torch.ops.load_library('x')
import torch; torch.hub.load('x', 'y')
import numpy as np; np.load('x', allow_pickle=True)
import comfy.utils; comfy.utils.load_torch_file('x')
import ctypes
import multiprocessing
import asyncio
import base64
import builtins
eval('x')
run = eval
exec('x')
compile('x', 'y', 'exec')
__import__('os')
__builtins__['eval']
globals()['x']
thing.system('x')
getattr(thing, 'popen')('x')
().__class__.__base__.__subclasses__()
(lambda: 0).__globals__
def f():
    if x:
        import requests
class Bomb:
    def f(self):
        return super().__reduce__()
"""
INNOCENT_PYTHON = """
import re; re.compile('x')
import torch; torch.compiler.set_stance('x')
model.eval(); state.load_state_dict(x); thing.load('x')
import torch; getattr(torch.compiler, 'set_stance', None)
name = 'a'; getattr(thing, name)
import sys; 'torch._dynamo' in sys.modules
from importlib import resources; resources.files('x')
from importlib.util import find_spec
import os; os.replace('a', 'b')
vars(thing).pop('x')
from . import pickle_free
from safetensors.torch import load_file
"""
FORBIDDEN_JAVASCRIPT = {
    "eval": ["eval('x')", "const run = eval"],
    "Function from text": ["new Function('x')()", "f.constructor('x')()"],
    "a timer from text": ["setTimeout('x()', 1)", "setInterval(`x()`, 1)"],
    "text as HTML": [
        "element.innerHTML = text",
        "element.outerHTML += text",
        "element.insertAdjacentHTML('beforeend', text)",
        "document.write(text)",
        "frame.srcdoc = text",
    ],
    "a property by a name in text": ["window['ev' + 'al']('x')", "globalThis[name]()"],
    "a foreign host": [
        "fetch('https://elsewhere.example/')",
        "image.src = `//elsewhere.example/${text}`",
        "new URL('wss://elsewhere.example')",
        "link.href = 'javascript:x()'",
    ],
    "a connection": [
        "fetch(address)",
        "new WebSocket(address)",
        "new XMLHttpRequest()",
        "navigator.sendBeacon(address)",
    ],
    "a script from elsewhere": ["await import(address)", "document.createElement('script')"],
}
INNOCENT_JAVASCRIPT = """
// See https://docs.comfy.org for what a widget is; evaluation is fine.
import { app } from "../../scripts/app.js"
element.textContent = text
setTimeout(() => draw(), 1)
await api.fetchApi("/concept_surgery/report")
await fetch("/concept_surgery/report")
document.createElement("canvas")
"""
FORBIDDEN_PAGES = {
    "HTML": ["<script>x()</script>", "<img src=x onerror=x()>", "</div>", "<!-- -->"],
    "a link that is a script": ["[t](javascript:x)", "[t]( data:text/html,x)"],
    "a picture from elsewhere": ["![p](https://elsewhere.example/p.png)", "![p](//e.example/p)"],
}


def samples(text: str) -> list[str]:
    """Statements of a text, each from a line that isn't indented on."""
    parts: list[str] = []
    for line in text.strip().splitlines():
        if line.startswith(" "):
            parts[-1] += f"\n{line}"
        else:
            parts.append(line)
    return parts


@pytest.mark.parametrize("source", samples(FORBIDDEN_PYTHON))
def test_forbidden_python_is_found(source):
    assert faults("nodes/x.py", source.encode())


@pytest.mark.parametrize("source", samples(INNOCENT_PYTHON))
def test_innocent_python_is_not(source):
    assert not faults("nodes/x.py", source.encode())


@pytest.mark.parametrize(
    ("name", "what", "source"),
    [
        *(("web/x.js", what, s) for what, found in FORBIDDEN_JAVASCRIPT.items() for s in found),
        *(("web/docs/x.md", what, s) for what, found in FORBIDDEN_PAGES.items() for s in found),
    ],
)
def test_forbidden_script_and_documents_are_found(name, what, source):
    assert any(
        fault.startswith(f"{name}:2: {what}") for fault in faults(name, b"\n" + source.encode())
    )


def test_every_pattern_has_a_sample():
    assert set(FORBIDDEN_JAVASCRIPT) == set(FORBIDDEN_SCRIPT)
    assert set(FORBIDDEN_PAGES) == set(FORBIDDEN_DOCUMENT)


def test_innocent_script_and_other_files_are_let_through():
    assert not faults("web/x.js", INNOCENT_JAVASCRIPT.encode())
    assert not faults("web/docs/x.md", b"# T\n\n![p](picture.jpg) [t](https://e.example) 1 < 2")
    assert (
        faults("nodes/x.so", b"")
        and faults("weights.safetensors", b"")
        and not faults("LICENSE", b"")
    )


@pytest.fixture
def clone(tmp_path):
    """A small checkout with a bit of everything."""
    for name in (
        "a.py",
        "tests/t.py",
        "web/w.js",
        "local.txt",
        "made/data.json",
        "deep/tests/t.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (tmp_path / ".comfyignore").write_text("tests\n.*\n")
    (tmp_path / ".gitignore").write_text("made/\n")
    (tmp_path / "pyproject.toml").write_text('[tool.comfy]\nincludes = ["made", "/tests/t.py"]\n')
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)
    tracked = ["a.py", "tests", "web", "deep", ".comfyignore", ".gitignore", "pyproject.toml"]
    subprocess.run(["git", "add", *tracked], cwd=tmp_path, check=True)
    return tmp_path


def test_the_archive_is_what_the_registrys_client_packs(clone):
    """Tracked files without those ignored, at any depth, and what is included all the same."""
    wanted = ["a.py", "made/data.json", "pyproject.toml", "tests/t.py", "web/w.js"]
    assert published_files(clone) == wanted
    pack(clone, clone / "node.zip")
    with zipfile.ZipFile(clone / "node.zip") as packed:
        assert packed.namelist() == wanted


def test_without_git_it_says_so(tmp_path):
    (tmp_path / "pyproject.toml").write_text("")
    with pytest.raises(PublishingError, match="in a clone"):
        published_files(tmp_path)


COMPLETE = {
    "project": {
        "name": "n",
        "version": "1.0.0",
        "description": "d",
        "readme": "README.md",
        "license": {"file": "LICENSE"},
        "requires-python": ">=3.10",
        "dependencies": ["torch>=2.1"],
        "classifiers": ["Operating System :: OS Independent"],
        "urls": {"Repository": "https://code.host.org/n", "Issues": "https://code.host.org/n/i"},
    },
    "tool": {
        "comfy": {
            "PublisherId": "p",
            "DisplayName": "N",
            "Icon": "https://code.host.org/n/icon.png",
            "requires-comfyui": ">=0.3.75",
        }
    },
}


def without(project, key: str, value=None):
    """A copy in which one key is another value, or missing."""
    head, _, rest = key.partition(".")
    inner = without(project[head], rest, value) if rest else value
    return {k: v for k, v in {**project, head: inner}.items() if v is not None}


def test_what_is_missing_to_publish_is_named():
    assert not missing_fields(COMPLETE)
    assert set(missing_fields({})) == set(FIELDS)
    for key in FIELDS:
        assert missing_fields(without(COMPLETE, key)) == [key]
        assert missing_fields(without(COMPLETE, key, "")) == [key]


@pytest.mark.parametrize(
    "address", ["http://code.host.org/n", "https://example.org/n", "<this>", "https://n", " "]
)
def test_an_address_is_no_placeholder(address):
    key = "project.urls.Repository"
    assert missing_fields(without(COMPLETE, key, address)) == [key]


def test_nothing_else_is_missing_here():
    assert set(missing_fields(PROJECT)) <= UNKNOWN_YET


def test_publishable_refuses_and_names_what_is_missing():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tools.__main__ import _publishable as p; raise SystemExit(p())",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    missing = missing_fields(PROJECT)
    assert done.returncode == (1 if missing else 0), done.stderr
    assert all(f"pyproject.toml lacks {key}\n" in done.stdout for key in missing)


def test_registry_metadata_and_floors():
    assert PROJECT["project"]["name"] == "concept-surgery"
    assert PROJECT["tool"]["comfy"]["DisplayName"] == "Concept Surgery"
    assert PROJECT["tool"]["comfy"]["PublisherId"]
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert requirements == PROJECT["project"]["dependencies"]
    assert all(">=" in line and "==" not in line for line in requirements)
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


def test_what_is_declared_is_what_is_imported(archive):
    """Beside what the host is and brings, and numpy, which tensors turn into to be hashed."""
    trees = {name: ast.parse(archive.read(name)) for name in python_files()}
    used = set().union(*map(imports, trees.values())) - set(sys.stdlib_module_names) - HOST_MODULES
    used -= HOST_PACKAGES
    to_numpy = any(".numpy()" in archive.read(name).decode() for name in trees)
    declared = {line.split(">=")[0] for line in PROJECT["project"]["dependencies"]}
    assert declared == used | ({"numpy"} if to_numpy else set())
    checked = next(
        ast.literal_eval(node.value)
        for node in ast.walk(trees["install.py"])
        if isinstance(node, ast.Assign) and node.targets[0].id == "NEEDED"
    )
    assert set(checked) == declared


def test_one_oldest_python_everywhere():
    from tools.environment import OLDEST_PYTHON

    oldest = ".".join(map(str, OLDEST_PYTHON))
    assert PROJECT["project"]["requires-python"] == f">={oldest}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    readme = (ROOT / "README.md").read_text("utf-8")
    assert set(re.findall(r"Python (\d\.\d+)", readme)) == {oldest}


def test_version_is_one():
    from concept_surgery.erase_core.version import VERSION

    assert PROJECT["project"]["version"] == VERSION
