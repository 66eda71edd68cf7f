"""The pictures: four open emoji sets, brought to one size on white, two of them finished.

The sets come from the npm registry and stay under ``build/emoji/npm``; what training reads is one
file, ``finished_pictures.npz``.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from benchmarks.emoji.words import OBJECT_NAMES, OBJECTS, STYLE_NAMES, SYNONYMS
from tools.environment import BUILD

FOLDER = BUILD / "emoji"
SOURCES = FOLDER / "npm"
PICTURES = FOLDER / "finished_pictures.npz"
OTHERS = FOLDER / "finished_others.npz"

SIZE = 64  # pixels of a finished picture
MASTER = 128  # pixels of the longest side of a picture as kept
NOMINAL = 52  # pixels of the longest side in a finished picture without augmentation
SMALLEST, LARGEST, SHIFT = 48, 56, 2  # pixels: what augmentation varies
# Widths, places and blur in pixels of a picture as kept.
CONTOUR, CONTOUR_COLOUR = 7, (38, 28, 60)
SHADOW_PLACE, SHADOW_BLUR, SHADOW_COLOUR = (12, 14), 6, (130, 130, 150)

PACKAGES = {
    "cartoon": "emoji-datasource-google@16.0.0",
    "flat": "emoji-datasource-twitter@16.0.0",
    "clay": "@lobehub/fluent-emoji-3d@1.1.0",
    "ink": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "keywords": "emojilib@4.0.3",
    "groups": "unicode-emoji-json@0.9.0",
}
# Emoji that show a thing; faces, people, flags and signs are none.
_THINGS = ("Animals & Nature", "Food & Drink", "Activities", "Travel & Places", "Objects")
_RASTERISER = "@resvg/resvg-js@2.6.2"
_RASTERISE = """
const {Resvg} = require('@resvg/resvg-js');
const pages = JSON.parse(require('fs').readFileSync(0, 'utf8'));
const drawn = pages.map(svg => new Resvg(svg, {fitTo: {mode: 'width', value: 256}})
  .render().asPng().toString('base64'));
process.stdout.write(JSON.stringify(drawn));
"""


def package(name: str) -> Path:
    """The unpacked npm package for a style or for ``keywords`` and ``groups``."""
    wanted = PACKAGES[name]
    folder = SOURCES / wanted.replace("@", "").replace("/", "-")
    if not folder.exists():
        SOURCES.mkdir(parents=True, exist_ok=True)
        call = ["npm", "pack", "--silent", wanted]
        archive = subprocess.check_output(call, cwd=SOURCES, text=True).split()[-1]
        unfinished = folder.with_name(f".{folder.name}")
        with tarfile.open(SOURCES / archive) as packed:
            packed.extractall(unfinished, filter="data")
        unfinished.rename(folder)
    return folder / "package"


def load_pictures() -> np.ndarray:
    """All pictures as kept, uint8 (objects, styles, 128, 128, 4), transparent around."""
    if not PICTURES.exists():
        masters = [[np.asarray(page) for page in row] for row in _rows(list(OBJECTS.values()))]
        unfinished = PICTURES.with_suffix(".part.npz")
        np.savez_compressed(unfinished, pictures=np.array(masters))
        unfinished.replace(PICTURES)
    return np.load(PICTURES)["pictures"]


def other_names() -> dict[str, str]:
    """Name -> code point of every emoji that shows a thing and none of the objects.

    A name that contains an object's ("polar bear", "trolleybus") is out: it could show the model
    a pair of object and style that it has to compose by itself.
    """
    entries = json.loads((package("cartoon") / "emoji.json").read_text(encoding="utf-8"))
    taken = (*OBJECTS, *SYNONYMS)
    found = {}
    for entry in entries:
        code, name = entry["unified"].lower().removesuffix("-fe0f"), entry["name"].lower()
        single = "-" not in code and entry["category"] in _THINGS
        if single and code not in OBJECTS.values() and not any(word in name for word in taken):
            found[re.sub("[^a-z ]", " ", name).strip()] = code
    return found


def load_others() -> tuple[list[str], np.ndarray]:
    """Names and pictures uint8 (others, styles, 128, 128, 4) of what all four sets hold."""
    if not OTHERS.exists():
        wanted = other_names()
        rows = zip(wanted, _rows(list(wanted.values())), strict=True)
        whole = {name: row for name, row in rows if all(row)}
        masters = [[np.asarray(page) for page in row] for row in whole.values()]
        unfinished = OTHERS.with_suffix(".part.npz")
        np.savez_compressed(unfinished, names=list(whole), pictures=np.array(masters))
        unfinished.replace(OTHERS)
    kept = np.load(OTHERS)
    return kept["names"].tolist(), kept["pictures"]


def render(master: np.ndarray, side: int = NOMINAL, right: int = 0, down: int = 0) -> np.ndarray:
    """One picture on white, uint8 (64, 64, 3), its longest side ``side`` pixels."""
    small = Image.fromarray(master, "RGBA").resize((side, side), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", (SIZE, SIZE), "white")
    page.alpha_composite(small, _corner(side, right, down))
    return np.asarray(page.convert("RGB"))


def empty_page() -> np.ndarray:
    """The page with nothing on it, uint8 (64, 64, 3)."""
    return np.full((SIZE, SIZE, 3), 255, dtype=np.uint8)


def render_varied(master: np.ndarray, draw: random.Random) -> np.ndarray:
    """One picture with its size and place varied."""
    shift = [draw.randint(-SHIFT, SHIFT) for _ in range(2)]
    return render(master, draw.randint(SMALLEST, LARGEST), *shift)


def training_pictures(variants: int, seed: int, masters: np.ndarray | None = None) -> np.ndarray:
    """uint8 (objects, styles, variants, 64, 64, 3), of the objects or of other pictures."""
    masters = load_pictures() if masters is None else masters
    draw = random.Random(seed)
    shape = (*masters.shape[:2], variants, SIZE, SIZE, 3)
    pages = np.empty(shape, dtype=np.uint8)
    for place in np.ndindex(shape[:3]):
        pages[place] = render_varied(masters[place[:2]], draw)
    return pages


def _corner(side: int, right: int, down: int) -> tuple[int, int]:
    margin = SIZE - side
    return tuple(min(max(margin // 2 + shift, 0), margin) for shift in (right, down))


def _rows(codes: Sequence[str]) -> list[tuple[Image.Image | None, ...]]:
    """For each code point its finished picture in each style; None where a set has none."""
    columns = [
        [picture and finish(style, picture) for picture in _READERS[style](codes)]
        for style in STYLE_NAMES
    ]
    return list(zip(*columns, strict=True))


def finish(style: str, picture: Image.Image) -> Image.Image:
    """A picture as its style shows it, RGBA 128 x 128: cartoons get a contour, clay a shadow.

    As in UnlearnCanvas (Zhang et al. 2024) a style is then something that is done to any thing. The
    sets by themselves are too near each other at 64 pixels: a judge named the set of two in three
    things that it had never seen.
    """
    picture = _fit(picture)
    if style not in _UNDER:
        return picture
    reach, colour = _UNDER[style]
    page = Image.new("RGBA", (MASTER + 2 * _ROOM,) * 2, (255, 255, 255, 0))
    page.paste(picture, (_ROOM, _ROOM))
    under = Image.new("RGBA", page.size, colour)
    under.putalpha(reach(page.getchannel("A")))
    return _fit(Image.alpha_composite(under, page))


def _contour(shape: Image.Image) -> Image.Image:
    """What a line around a shape covers, the shape included."""
    return shape.filter(ImageFilter.MaxFilter(2 * CONTOUR + 1)).filter(ImageFilter.GaussianBlur(1))


def _shadow(shape: Image.Image) -> Image.Image:
    """What the shadow of a shape covers."""
    moved = ImageChops.offset(shape, *SHADOW_PLACE)
    return moved.filter(ImageFilter.GaussianBlur(SHADOW_BLUR))


_UNDER = {"cartoon": (_contour, CONTOUR_COLOUR), "clay": (_shadow, SHADOW_COLOUR)}
_ROOM = CONTOUR + max(SHADOW_PLACE) + 2 * SHADOW_BLUR


def _fit(picture: Image.Image) -> Image.Image:
    """Cut to what is drawn, then scale and centre on a transparent square."""
    picture = picture.convert("RGBA")
    opaque = picture.getchannel("A").point(lambda value: 255 if value > 24 else 0)
    picture = picture.crop(opaque.getbbox())
    factor = MASTER / max(picture.size)
    size = tuple(max(1, round(side * factor)) for side in picture.size)
    square = Image.new("RGBA", (MASTER, MASTER), (255, 255, 255, 0))
    corner = tuple((MASTER - side) // 2 for side in size)
    square.paste(picture.resize(size, Image.Resampling.LANCZOS), corner)
    return square


def _from_files(
    style: str, folder: str, ending: str, codes: Sequence[str]
) -> list[Image.Image | None]:
    """One file for each code point, some with a variation selector in their name."""
    found = []
    for code in codes:
        names = [package(style) / folder / f"{code}{tail}{ending}" for tail in ("", "-fe0f")]
        path = next((name for name in names if name.exists()), None)
        found.append(Image.open(path) if path else None)
    return found


def _from_drawings(style: str, codes: Sequence[str]) -> list[Image.Image | None]:
    """Scalable drawings in black, rasterised outside Python."""
    root = package(style)
    icons = json.loads((root / "icons.json").read_text(encoding="utf-8"))
    named = json.loads((root / "chars.json").read_text(encoding="utf-8"))
    width, height = icons["width"], icons["height"]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" color="black">'
    names = [named.get(code) or named.get(f"{code}-fe0f") for code in codes]
    pages = [f"{head}{icons['icons'][name]['body']}</svg>" for name in names if name]
    tool = SOURCES / "tool"
    if not (tool / "node_modules" / "@resvg").exists():
        call = ["npm", "install", "--silent", "--no-save", "--prefix", str(tool), _RASTERISER]
        subprocess.check_call(call)
    call = ["node", "-e", _RASTERISE]
    answer = subprocess.check_output(call, cwd=tool, input=json.dumps(pages).encode())
    drawn = iter(json.loads(answer))
    return [
        Image.open(io.BytesIO(base64.b64decode(next(drawn)))) if name else None for name in names
    ]


_READERS: dict[str, Callable[[Sequence[str]], list[Image.Image | None]]] = {
    "cartoon": partial(_from_files, "cartoon", "img/google/64", ".png"),
    "flat": partial(_from_files, "flat", "img/twitter/64", ".png"),
    "clay": partial(_from_files, "clay", "assets", ".webp"),
    "ink": partial(_from_drawings, "ink"),
}


def contact_sheet(pages: np.ndarray, columns: int, path: Path, zoom: int = 1) -> None:
    """Write pictures uint8 (count, 64, 64, 3) in rows of ``columns``."""
    rows = -(-len(pages) // columns)
    sheet = np.full((rows * SIZE, columns * SIZE, 3), 255, dtype=np.uint8)
    for number, page in enumerate(pages):
        y, x = divmod(number, columns)
        sheet[y * SIZE : (y + 1) * SIZE, x * SIZE : (x + 1) * SIZE] = page
    picture = Image.fromarray(sheet)
    picture.resize((picture.width * zoom, picture.height * zoom), 0).save(path)


if __name__ == "__main__":
    everything = load_pictures()
    sheet = np.stack([render(master) for master in everything.reshape(-1, MASTER, MASTER, 4)])
    contact_sheet(sheet, 4 * 5, FOLDER / "pictures.png")
    print(f"{len(OBJECT_NAMES)} objects in {len(STYLE_NAMES)} styles: {FOLDER / 'pictures.png'}")
