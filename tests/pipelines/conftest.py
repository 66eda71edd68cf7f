"""Shrunken pipelines for all tests in this folder, offline and quiet."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.environment import STUBS

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
for package in ("diffusers", "transformers", "peft"):
    pytest.importorskip(package)


def _look_past_stubs() -> None:
    """See to it that transformers and diffusers don't take the host's stand-in for torchvision.

    Both look once, when they are first asked; the host's tests in this process go on with it.
    """
    import transformers.utils.import_utils as looked

    path = list(sys.path)
    stubs = {n: sys.modules.pop(n) for n in list(sys.modules) if n.startswith(_STUBBED)}
    sys.path[:] = [folder for folder in path if folder != str(STUBS)]
    try:
        for found in vars(looked).values():
            if callable(getattr(found, "cache_clear", None)):
                found.cache_clear()
        looked.is_torchvision_available()
        looked.is_torchvision_v2_available()
        looked.is_torchaudio_available()
        import diffusers.loaders.single_file_model
        import diffusers.pipelines.pipeline_utils  # noqa: F401
    finally:
        sys.path[:] = path
        sys.modules.update(stubs)


_STUBBED = ("torchvision", "torchaudio")
_look_past_stubs()

from concept_surgery.pipelines import Erasure, erase  # noqa: E402

from . import small  # noqa: E402

# What nothing that is asked about here depends on.
QUICK = {"captions": 8, "trajectories": 2, "sampling_steps": 3, "resolution": 64, "progress": False}
QUICK["templates"] = ("a photo of {}",)
at_length = pytest.mark.skipif(
    os.environ.get("PIPELINE_TESTS") != "1", reason="PIPELINE_TESTS=1 runs it, in minutes"
)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for tokenizers."""
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="session")
def _sd1(tokenizers: Path) -> Any:
    return small.sd1(tokenizers)


@pytest.fixture
def sd1(_sd1: Any) -> Iterator[Any]:
    """A shrunken SD1, which each test must leave as it was."""
    before = small.state_of(_sd1)
    yield _sd1
    assert small.state_of(_sd1) == before


@pytest.fixture(scope="session")
def finished(_sd1: Any) -> Erasure:
    """Cats turned into dogs, on it."""
    return erase(_sd1, "cat", "dog", preset="instant", **QUICK)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
