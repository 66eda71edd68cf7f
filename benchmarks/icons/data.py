"""The pictures: four open icon sets, brought to one size, each finished in its style's way.

The sets come from the npm registry, fetched by the first model's :func:`package`. What training
reads is one file, ``build/icons/pictures.npz``.
"""

from __future__ import annotations

import base64
import io
import json
import random
import subprocess
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.emoji import data as first
from benchmarks.emoji.data import LARGEST, MASTER, NOMINAL, SHIFT, SIZE, SMALLEST, package
from benchmarks.emoji.data import contact_sheet as contact_sheet
from benchmarks.emoji.data import empty_page as empty_page
from benchmarks.icons.words import STYLE_NAMES, THINGS
from tools.environment import BUILD

FOLDER = BUILD / "icons"
PICTURES = FOLDER / "pictures.npz"
first.PACKAGES.update(
    {
        "pixel": "@iconify-json/emojione@1.2.3",
        "midnight": "@iconify-json/noto-v1@1.2.5",
        "stencil": "@iconify-json/emojione-monotone@1.2.1",
        "sticker": "@iconify-json/fluent-emoji-flat@1.2.6",
    }
)

PIXELS = 16  # pixels of a side that are left in style "pixel"
DARK_BLUE, WHITE = (26, 32, 92), (255, 255, 255)
TEAL = "#0a7a78"  # what stencils are cut out of
RIM, RIM_COLOUR = 9, (255, 92, 150)  # of a sticker, in pixels of a picture as kept


def load_pictures() -> np.ndarray:
    """All pictures as kept, uint8 (things, styles, 128, 128, 4), transparent around."""
    if not PICTURES.exists():
        columns = [
            [np.asarray(_finished(style, page)) for page in _drawn(style)] for style in STYLE_NAMES
        ]
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = PICTURES.with_suffix(".part.npz")
        np.savez_compressed(unfinished, pictures=np.array(columns).swapaxes(0, 1))
        unfinished.replace(PICTURES)
    return np.load(PICTURES)["pictures"]


def render(
    master: np.ndarray, style: str, side: int = NOMINAL, right: int = 0, down: int = 0
) -> np.ndarray:
    """One picture on its page, uint8 (64, 64, 3), its longest side ``side`` pixels."""
    small = Image.fromarray(master, "RGBA").resize((side, side), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", (SIZE, SIZE), DARK_BLUE if style == "midnight" else WHITE)
    margin = SIZE - side
    corner = [min(max(margin // 2 + shift, 0), margin) for shift in (right, down)]
    page.alpha_composite(small, tuple(corner))
    if style == "pixel":  # last, so that its squares lie on one grid
        few = page.resize((PIXELS, PIXELS), Image.Resampling.BOX)
        page = few.resize((SIZE, SIZE), Image.Resampling.NEAREST)
    return np.asarray(page.convert("RGB"))


def training_pictures(variants: int, seed: int) -> np.ndarray:
    """uint8 (things, styles, variants, 64, 64, 3), their sizes and places varied."""
    masters, draw = load_pictures(), random.Random(seed)
    pages = np.empty((*masters.shape[:2], variants, SIZE, SIZE, 3), dtype=np.uint8)
    for row, column, variant in np.ndindex(pages.shape[:3]):
        side, *shift = draw.randint(SMALLEST, LARGEST), *(draw.randint(-SHIFT, SHIFT) for _ in "xy")
        pages[row, column, variant] = render(
            masters[row, column], STYLE_NAMES[column], side, *shift
        )
    return pages


def _finished(style: str, picture: Image.Image) -> Image.Image:
    """A picture cut to what is drawn, RGBA 128 x 128; a sticker gets its rim."""
    picture = first._fit(picture)
    if style != "sticker":
        return picture
    room = RIM + 3
    page = Image.new("RGBA", (MASTER + 2 * room,) * 2, (255, 255, 255, 0))
    page.paste(picture, (room, room))
    shape = page.getchannel("A").point(lambda value: 255 if value > 60 else 0)
    wide = shape.filter(ImageFilter.MaxFilter(2 * RIM + 1)).filter(ImageFilter.GaussianBlur(1))
    under = Image.new("RGBA", page.size, RIM_COLOUR)
    under.putalpha(wide)
    return first._fit(Image.alpha_composite(under, page))


def _drawn(style: str) -> list[Image.Image]:
    """The scalable drawings of all things in a set, rasterised outside Python."""
    icons = json.loads((package(style) / "icons.json").read_text(encoding="utf-8"))
    pages = [_page(icons, name) for name in THINGS.values()]
    tool = first.SOURCES / "tool"
    if not (tool / "node_modules" / "@resvg").exists():
        call = ["npm", "install", "--silent", "--no-save", "--prefix", str(tool)]
        subprocess.check_call([*call, first._RASTERISER])
    call = ["node", "-e", first._RASTERISE]
    answer = subprocess.check_output(call, cwd=tool, input=json.dumps(pages).encode())
    return [Image.open(io.BytesIO(base64.b64decode(page))) for page in json.loads(answer)]


def _page(icons: dict, name: str) -> str:
    icon = icons["icons"][icons.get("aliases", {}).get(name, {}).get("parent", name)]
    size = [icon.get(side, icons[side]) for side in ("width", "height")]
    left, top = (icon.get(side, 0) for side in ("left", "top"))
    box = f'viewBox="{left} {top} {size[0]} {size[1]}" color="{TEAL}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{icon["body"]}</svg>'


def sheet(pages: Sequence[np.ndarray], columns: int, name: str, zoom: int = 1) -> None:
    """Write pictures uint8 (64, 64, 3) in rows of ``columns``."""
    contact_sheet(np.stack(pages), columns, FOLDER / name, zoom)


if __name__ == "__main__":
    everything = load_pictures()
    shown = [
        render(master, style)
        for row in everything
        for style, master in zip(STYLE_NAMES, row, strict=True)
    ]
    sheet(shown, 4 * 5, "pictures.png")
    print(f"{len(THINGS)} things in {len(STYLE_NAMES)} styles: {FOLDER / 'pictures.png'}")
