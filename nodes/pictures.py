"""A small picture for a file, written with the host's Pillow."""

from __future__ import annotations

import io
from typing import Any

from torch import Tensor

LONGEST_SIDE = 512  # pixels: lists show it far smaller


def small_png(images: Any, key: str, text: str) -> bytes:
    """The first of a batch of pictures as a small PNG with a text in it.

    Args:
        images: (n, height, width, channels) from 0 to 1, as the host hands IMAGE on.
        key: the name that the text has in the file.

    Raises:
        ValueError: no picture.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            "'picture' brought no picture. Connect an IMAGE, such as the sheet of Compare "
            "Erasure, or nothing."
        )
    first = images[0, ..., :3].detach().float().cpu().nan_to_num().clamp(0, 1)
    if first.shape[-1] < 3:  # grey
        first = first[..., :1].expand(-1, -1, 3)
    values = (first * 255).round().byte().contiguous().numpy()
    picture = Image.frombytes("RGB", (values.shape[1], values.shape[0]), values.tobytes())
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    info = PngInfo()
    info.add_text(key, text)
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=info, optimize=True)
    return file.getvalue()
