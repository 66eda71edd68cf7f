"""Whether two checkouts give the same erasures, to the last bit: for who moves code.

``python -m benchmarks.same_results save FILE`` makes erasures on toys, on both small models that
draw and on shrunken models of other families, and writes their values' hashes and their records;
``python -m benchmarks.same_results compare FILE OTHER`` says where two such files differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tests  # isort: skip - this checkout's, before the host's folder is in front of it
from tools.pack import load_pack, use_host

use_host()
load_pack()

import torch  # noqa: E402
from concept_surgery.erase_core import Denoiser, EraseSettings, erase, preset_settings  # noqa: E402

# When, how long, and how much memory was free, is of the machine.
OF_THE_MACHINE = ("created", "seconds", "version", "memory")
Keep = Callable[[str, EraseSettings, Denoiser], None]
TOY = {"resolution": 32, "captions": 40}
TRAINED = {**TOY, "trajectories": 8, "sampling_steps": 4, "steps": 20}


def toys(keep: Keep) -> None:
    """Every way through a run, on toys: seconds."""
    from tests.core.test_pooled import LabelToy
    from tests.core.toy import ToyDenoiser

    asked: dict[str, dict[str, Any]] = {
        "hard": {"keep": ("a tree", "a boat"), "negative_prompts": ("blurry",), **TRAINED},
        "as it is": {"concepts": "cat => dog\nlemon", **TOY},
        "trial": {"keep": tuple(f"thing {n}" for n in range(8)), **TOY},
        "soft": {"form": "soft", "keep": ("a tree",), **TRAINED},
        "stop": {"eta": 0.5, "stop_below": 0.5, **TRAINED},
        "from nothing": {"warm_start": False, **TRAINED},
        "worse": {"learning_rate": 10.0, **TRAINED},
    }
    for name, values in asked.items():
        settings = preset_settings("balanced", **{"concepts": "cat => dog", **values})
        keep(f"toy, {name}", settings, ToyDenoiser())
        keep(f"pooled toy, {name}", settings, LabelToy())


def icons(keep: Keep) -> None:
    """The second small model."""
    from benchmarks.icons.model import IconsModel

    model = IconsModel()
    for concepts in ("cheese", "taxi => fire truck\nwhale"):
        for preset, more in (("instant", {}), ("balanced", {"resolution": 128})):
            settings = preset_settings(preset, concepts=concepts, captions=64, **more)
            with model.denoiser() as denoiser:
                keep(f"icons, {preset}, {settings.concepts[0]}", settings, denoiser)


def emoji(keep: Keep) -> None:
    """The first small model, in the host."""
    from benchmarks.erasure.painter import Painter
    from benchmarks.erasure.run import checkpoint, leave_out_empty_layers

    with tempfile.TemporaryDirectory() as folder:
        painter = Painter(checkpoint(), 4, fast=False, folder=Path(folder))
        leave_out_empty_layers(painter.clip)
        asked: dict[str, dict[str, Any]] = {
            "removed": {"concepts": "pizza", "keep": ("a photo of an apple",)},
            "trained": {"concepts": "cat => rabbit\nbanana", "steps": 6},
            "soft": {"form": "soft", "steps": 4, "trajectories": 4},
        }
        for name, values in asked.items():
            given = {"concepts": "cat => dog", "captions": 64, "resolution": 64, **values}
            with painter.denoiser("key-value") as denoiser:
                keep(f"emoji, {name}", preset_settings("balanced", **given), denoiser)


def families(keep: Keep) -> None:
    """Shrunken models of other families, with random weights, in the host."""
    from concept_surgery.nodes.families import trainable_family
    from concept_surgery.nodes.host import ComfyDenoiser

    from tests.host.encoder import RememberingClip
    from tests.host.small import built_model, load_family
    from tests.host.test_families import QUICK

    for name in ("sd2", "sdxl", "sd3", "flux", "auraflow", "lumina"):
        model, clip = (load_family if name in ("sd2", "sdxl") else built_model)(name)
        family = trainable_family(model).defaults
        given = {**QUICK, "steps": 6}
        settings = preset_settings("balanced", family=family, **given)
        remembering = RememberingClip(clip)
        with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
            size, layers = settings.resolution, settings.layers
            with ComfyDenoiser(model, remembering, "", 6, size, layers) as denoiser:
                keep(name, settings, denoiser)


def save(path: Path) -> None:
    """Make all erasures, and write what they are."""
    found: dict[str, Any] = {}

    def keep(name: str, settings: EraseSettings, denoiser: Denoiser) -> None:
        began = time.perf_counter()
        erasure = erase(settings, denoiser)
        values = hashlib.sha256()
        for matrix in sorted(erasure.factors):
            for tensor in (erasure.factors[matrix], erasure.bases[matrix]):
                values.update(tensor.contiguous().numpy().tobytes())
        record = {k: v for k, v in erasure.record.items() if k not in OF_THE_MACHINE}
        found[name] = {"values": values.hexdigest(), "record": record}
        path.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)

    assert tests.__file__ is not None
    for make in (toys, icons, emoji, families):
        make(keep)


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two JSON values differ, and by how much."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from differences(one.get(key), other.get(key), f"{place}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{place}[{number}]")
    elif one != other:
        yield f"{place}: {one!r} and {other!r}"


def compare(one: Path, other: Path) -> int:
    """Say where two files differ; how many erasures do."""
    first, second = (json.loads(path.read_text("utf-8")) for path in (one, other))
    different = 0
    for name in sorted({*first, *second}):
        found = list(differences(first.get(name), second.get(name)))
        different += bool(found)
        print(f"{name}: {'the same' if not found else f'{len(found)} differences'}", *found[:5])
    return different


def main() -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("save", "compare"))
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    if options.command == "save":
        save(options.files[0])
        return 0
    return min(1, compare(*options.files[:2]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
