"""The documents: short enough, no dead links, nothing that the code has and they don't name."""

import re

import pytest

from tools.environment import ROOT
from tools.published import published_files

PAGES = ["README.md", "AGENTS.md", "CONTRIBUTING.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
LONGEST_LINE, LONGEST_README = 110, 120
# Whose picture and whose pages on development are in the repository alone.
REPOSITORY_ONLY = ("benchmarks/", "CONTRIBUTING.md")
# Set by the tools or by the tests themselves.
NOT_FOR_PEOPLE = {"PYTHON", "PYTEST_XDIST_WORKER"}


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def links(text: str) -> list[str]:
    """Targets within the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?m)^\[[\w-]+\]: (\S+)", text)
    return [target for target in found if "://" not in target]


def anchors(text: str) -> set[str]:
    """What headings are linked by: lower case, without punctuation, hyphens for spaces."""
    heads = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", head.casefold()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    here = (ROOT / name).parent
    for target in links(read(name)):
        path, _, anchor = target.partition("#")
        file = (here / path) if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text("utf-8")), target


def test_what_the_readme_links_to_is_published_with_it():
    published = published_files(ROOT)
    for target in links(read("README.md")):
        path = target.partition("#")[0]
        there = any(name == path or name.startswith(f"{path.rstrip('/')}/") for name in published)
        assert there or path.startswith(REPOSITORY_ONLY), target


@pytest.mark.parametrize("name", PAGES)
def test_lines_are_not_too_long(name):
    assert not [line for line in read(name).split("\n") if len(line) > LONGEST_LINE]


def test_the_readme_is_short():
    assert read("README.md").count("\n") <= LONGEST_README


def test_the_architecture_names_every_room():
    rooms = [path.name for path in (ROOT / "erase_core").iterdir() if path.is_dir()]
    text = read("docs/architecture.md")
    assert all(f"`{room}/`" in text for room in rooms if not room.startswith("_"))


def test_every_variable_that_the_tests_read_is_described():
    names = r"environ(?:\.get\(|\[)\s*\"([A-Z_]+)\""
    sources = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    read_there = {name for path in sources for name in re.findall(names, path.read_text("utf-8"))}
    text = read("CONTRIBUTING.md")
    assert {name for name in read_there - NOT_FOR_PEOPLE if name not in text} == set()
