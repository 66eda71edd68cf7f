"""The tags that the pack ships: as people type them, and mixed all the way through."""

import fnmatch
import re
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
from concept_surgery import erase_core
from concept_surgery.erase_core.method.reading import evenly_spaced

ROOT = Path(__file__).resolve().parents[2]
FILE = "erase_core/data/tags.txt"
TAGS = resources.files(erase_core).joinpath("data/tags.txt").read_text("utf-8").splitlines()
# Models of the Pony kind know these with their underscores.
UNDERSCORED = re.compile(r"(score|source|rating)_\w+|\W_\W")


def test_each_line_is_a_tag_of_its_own():
    assert len(TAGS) >= 500
    assert len(set(TAGS)) == len(TAGS)
    for tag in TAGS:
        assert tag and tag == " ".join(tag.lower().split()), tag
        assert tag.isascii() and "," not in tag


def test_tags_are_written_as_in_prompts():
    assert [tag for tag in TAGS if "_" in tag and not UNDERSCORED.fullmatch(tag)] == []
    # The host takes bare brackets for weights.
    assert [tag for tag in TAGS if re.search(r"(?<!\\)[()]", tag)] == []
    assert {"1girl", "solo", "long hair", "masterpiece", "traditional media"} <= set(TAGS)


@pytest.mark.parametrize("count", [30, 60, 100, 200])
def test_a_part_of_them_is_a_mixture(count):
    # Tags of a kind end alike: hair, eyes, background. In order they would be side by side.
    all_ends, ends = (
        Counter(tag.split()[-1] for tag in part) for part in (TAGS, evenly_spaced(TAGS, count))
    )
    for end, number in ends.items():
        assert number <= 3 + 1.5 * all_ends[end] * count / len(TAGS), end


def test_they_are_published_as_the_captions_are():
    rules = (ROOT / ".comfyignore").read_text().split()
    parts = Path(FILE).parts
    assert (ROOT / FILE).is_file()
    assert not [rule for rule in rules for part in parts if fnmatch.fnmatch(part, rule)]
