"""One host and one tiny checkpoint for all tests in this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.checkpoint import build_checkpoint
from tools.environment import BUILD, ROOT
from tools.host import ComfyHost

PROBE_PACK = ROOT / "tools" / "probe_pack"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The shrunken SD1.5 with four cross-attentions."""
    return build_checkpoint(BUILD / "checkpoints" / "one-level.safetensors")


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyHost]:
    """A running host with that checkpoint, the checkout and the probe pack."""
    host = ComfyHost(
        tmp_path_factory.mktemp("host"),
        checkpoints=[checkpoint],
        log=BUILD / "logs" / f"host-tests-{os.environ.get('PYTEST_XDIST_WORKER', 'all')}.log",
    )
    host.extra(PROBE_PACK)
    with host:
        yield host
