"""The checkout as the package ``concept_surgery``, and the host's modules where there is a host.

Tests of the core need none.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `tools`; use_host() puts the host's folder in front of it
from tools.environment import HOST  # noqa: E402
from tools.pack import load_pack, use_host  # noqa: E402

if HOST.is_dir():
    use_host()
load_pack()

# Files of few tests that take long. Two processes share the work best if these come first; by
# itself the runner begins with the files that have most tests.
LONGEST = ("test_inprocess", "test_graph", "test_sdxl", "test_quality", "test_crashes")
LONGEST += ("test_results", "test_apply", "test_families", "test_generic", "test_quantised")
LONGEST += ("test_join", "test_quality_icons", "test_templates", "test_suggest", "test_memory")


def pytest_collection_modifyitems(items: list) -> None:
    """The longest files first, in an order that every process finds alike."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
