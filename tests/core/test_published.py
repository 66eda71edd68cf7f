"""What the registry would publish: no forbidden means, no host in the science, metadata."""

import ast
import fnmatch
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
IGNORED = (ROOT / ".comfyignore").read_text().split()
PUBLISHED = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not any(fnmatch.fnmatch(path.relative_to(ROOT).parts[0], rule) for rule in IGNORED)
)
FORBIDDEN_MODULES = {"subprocess", "pickle", "socket", "urllib", "requests", "ctypes", "http"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
HOST_MODULES = {
    "comfy",
    "comfy_api",
    "comfy_extras",
    "folder_paths",
    "server",
    "nodes",
    "execution",
}


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_the_list_of_published_files_is_the_pack():
    tops = {path.relative_to(ROOT).parts[0] for path in PUBLISHED}
    assert tops == {"__init__.py", "install.py", "nodes", "erase_core"}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_forbidden_means(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert not imports(tree) & FORBIDDEN_MODULES
    called = {
        n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and hasattr(n.func, "id")
    }
    assert not called & FORBIDDEN_CALLS
    if "erase_core" in path.parts:
        assert not imports(tree) & HOST_MODULES
        assert "cuda" not in path.read_text("utf-8")


def test_registry_metadata_and_floors():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["name"] == "concept-surgery"
    assert project["tool"]["comfy"]["DisplayName"] == "Concept Surgery"
    assert project["tool"]["comfy"]["PublisherId"]
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert requirements == project["project"]["dependencies"]
    assert all(">=" in line and "==" not in line for line in requirements)
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


def test_version_is_one():
    from concept_surgery.erase_core.engine import VERSION

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["version"] == VERSION
