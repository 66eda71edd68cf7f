"""One host, one tiny checkpoint and one quick erasure on it for all tests in this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import comfy.sd
import pytest
import torch
from concept_surgery.erase_core import Erasure
from concept_surgery.erase_core.artefact.language_store import LanguageStore

from tools.checkpoint import build_checkpoint
from tools.environment import BUILD, ROOT
from tools.host import ComfyHost, place

from .encoder import RememberingClip
from .tiny import train

PROBE_PACK = ROOT / "tools" / "probe_pack"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The shrunken SD1.5 with four cross-attentions."""
    return build_checkpoint(BUILD / "checkpoints" / "one-level.safetensors")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all processes of this run of the tests.

    The next run has another, so that nothing is left of how things were before a change.
    """
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def loaded(checkpoint: Path, shared_folder: Path):
    """MODEL and CLIP of that checkpoint."""
    with torch.inference_mode():  # as the host loads, inside its executor
        model, clip, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
    return model, RememberingClip(clip, shared_folder / "encoded")


@pytest.fixture(scope="session")
def language_folder(shared_folder: Path) -> Path:
    """What was read of ordinary language, which is most of a training as small as the tests'."""
    folder = shared_folder / "language"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def store(language_folder: Path) -> LanguageStore:
    """That as a store."""
    return LanguageStore(language_folder)


@pytest.fixture(scope="session")
def finished(loaded, store: LanguageStore) -> Erasure:
    """Cats turned into dogs."""
    return train(loaded, store, concepts="cat => dog", keep=("a photo of a tiger",))


@pytest.fixture(scope="session")
def server(
    checkpoint: Path, language_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyHost]:
    """A running host with that checkpoint, the checkout and the probe pack."""
    front_end = os.environ.get("COMFYUI_FRONT_END_FOLDER")
    host = ComfyHost(
        tmp_path_factory.mktemp("host"),
        checkpoints=[checkpoint],
        log=BUILD / "logs" / f"host-tests-{os.environ.get('PYTEST_XDIST_WORKER', 'all')}.log",
        arguments=("--front-end-root", front_end) if front_end else (),
    )
    host.extra(PROBE_PACK)
    place(language_folder, host.work / "user" / "concept_surgery" / "language")
    with host:
        yield host
