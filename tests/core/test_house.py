"""The house of the engine: which way its arrows point, and that a function fits on a screen."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.environment import ROOT

CORE = ROOT / "erase_core"
# From the ground up. A room may import those below it; "files" is taken for the ground of all.
ROOMS = ["version", "files", "settings", "model", "method", "artefact", "run"]
LONGEST = 50  # lines of a function, its docstring included


def modules() -> list[Path]:
    return sorted(CORE.rglob("*.py"))


def rooms_imported(path: Path) -> Iterator[str]:
    """The rooms that a module of a room takes something from, but its own."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            assert node.module, f"{path}: a room is imported by what is taken from it"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", ROOMS[1:])
def test_a_room_imports_those_below_it_alone(room):
    paths = list((CORE / room).glob("*.py"))
    assert len(paths) > 2
    taken = {name for path in paths for name in rooms_imported(path)}
    assert taken <= set(ROOMS[: ROOMS.index(room)])
    if room == "files":
        assert not taken


def test_every_folder_of_the_core_is_a_room():
    folders = {path.name for path in CORE.iterdir() if any(path.glob("*.py"))}
    assert folders == set(ROOMS[1:])


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_no_function_is_longer_than_a_screen(path):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, kinds)
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_no_stage_is_a_generator_that_also_returns_a_value(path):
    """Who calls one would have to drive it; the meter tells how far a run is."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            own = [n for part in node.body for n in ast.walk(part)]
            yields = any(isinstance(n, ast.Yield | ast.YieldFrom) for n in own)
            returns = any(isinstance(n, ast.Return) and n.value is not None for n in own)
            nested = any(isinstance(n, ast.FunctionDef | ast.Lambda) for n in own)
            assert not (yields and returns) or nested, node.name
