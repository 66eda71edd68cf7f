"""The host that WEBUI_FOLDER and WEBUI_KIND name, with the emoji model; see docs/webui_hosts.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import models
from .comfy_side import ComfySide, run_comfy
from .webui_host import KINDS, WebuiHost

FOLDER = os.environ.get("WEBUI_FOLDER", "")
KIND = os.environ.get("WEBUI_KIND", "")
ARGUMENTS = tuple(os.environ.get("WEBUI_ARGUMENTS", "").split())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a host there is nothing to test."""
    here = Path(__file__).parent
    missing = not FOLDER or KIND not in KINDS
    reason = f"set WEBUI_FOLDER to a host and WEBUI_KIND to one of {', '.join(KINDS)}"
    for item in items:
        if missing and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def new_host(work: Path, **how: object) -> WebuiHost:
    """The host with the extension and the models in a folder of its own; not yet started.

    The variable WEBUI_ARGUMENTS has more of its command line.
    """
    how["arguments"] = (*ARGUMENTS, *how.get("arguments", ()))  # type: ignore[misc]
    host = WebuiHost(Path(FOLDER).absolute(), KIND, work, **how)  # type: ignore[arg-type]
    models.install(host)
    return host


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebuiHost]:
    """One host with API and page for all tests that leave it as it was.

    The variable WEBUI_WORK names a folder for its data: what is read of ordinary language stays.
    """
    kept = os.environ.get("WEBUI_WORK")
    work = Path(kept).absolute() if kept else tmp_path_factory.mktemp("webui")
    with new_host(work) as started:
        started.draw("a photo of a cat")  # Forge has no model before the first picture
        yield started


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> ComfySide:
    """The same erasure trained in ComfyUI, and its pictures.

    The variable WEBUI_COMFY names a folder that keeps them, for the next host.
    """
    kept = os.environ.get("WEBUI_COMFY")
    return run_comfy(Path(kept).absolute() if kept else tmp_path_factory.mktemp("comfy"))
