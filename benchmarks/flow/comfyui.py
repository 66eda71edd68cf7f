"""The model in ComfyUI, through the host's own loaders.

The host's detection knows two widths of this class, Lumina 2's (2304) and Z-Image's (3840), and
takes all other sizes from the width; its loader of text encoders takes sizes as an option only.
So :func:`known_width` adds a third width to the detection while it lasts. All else is stock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.sd
import torch

from benchmarks.flow.network import CONFIG
from benchmarks.flow.text import CONFIG as TEXT_CONFIG


@contextmanager
def known_width() -> Iterator[None]:
    """Inside, the host's detection knows this model's width, and what goes with it."""
    stock = comfy.model_detection.detect_unet_config

    def detected(state_dict: Any, key_prefix: str, metadata: Any = None) -> dict[str, Any] | None:
        found = stock(state_dict, key_prefix, metadata=metadata)
        if found and found.get("image_model") == "lumina2" and found["dim"] == CONFIG["dim"]:
            counted = {name: found[name] for name in ("n_layers", "cap_feat_dim")}
            return {**found, **CONFIG, **counted}
        return found

    comfy.model_detection.detect_unet_config = detected
    try:
        yield
    finally:
        comfy.model_detection.detect_unet_config = stock


def load_model(path: Path) -> Any:
    """A MODEL from the transformer's file, as *Load Diffusion Model* gives it."""
    with known_width(), torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path))


def load_clip(path: Path, sizes: Mapping[str, int] | None = None) -> Any:
    """A CLIP from the text encoder's file, as *Load CLIP* gives it for Z-Image."""
    options = {"qwen3_4b_model_config": dict(sizes or TEXT_CONFIG)}
    with torch.inference_mode():
        return comfy.sd.load_clip([str(path)], model_options=options)
