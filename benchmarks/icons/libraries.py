"""The classes of diffusers and transformers that the model is made of.

While the host can be imported there is a stand-in for torchvision, which holds only what the host
asks for. Importing diffusers asks for more, unless there is no torchvision at all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import import_utils

from tools.environment import STUBS

# What transformers asks once and remembers.
_ASKED = ("is_torchvision_available", "is_torchvision_v2_available", "is_torchaudio_available")


@contextmanager
def _without_stand_ins() -> Iterator[None]:
    """Inside, the stand-ins can't be found; transformers looks again whether there is the real."""
    path, hidden = list(sys.path), {}
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(STUBS):
            hidden[name] = sys.modules.pop(name)
    sys.path[:] = [folder for folder in path if folder != str(STUBS)]
    for name in _ASKED:
        getattr(getattr(import_utils, name, None), "cache_clear", lambda: None)()
    try:
        yield
    finally:
        sys.path[:] = path
        sys.modules.update(hidden)


with _without_stand_ins():
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import T5Config, T5EncoderModel

__all__ = ["T5Config", "T5EncoderModel", "UNet2DConditionModel"]
