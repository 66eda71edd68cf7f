"""Are concepts gone from pictures that are there already? ``python -m benchmarks.purification``

On both small models, for erasures by *instant*, real pictures are purified with the settings of the
node, in fewer steps: some that show the concept alone, some with something else beside it, on a
page twice as wide, and some without it. The judge looks at each half by itself. What is done is
kept in ``build/unnamed/purification``, so that a run that was stopped goes on. Writes
``results/purification.json``, and for each model a picture with what was above what came of it.
Settings were chosen on the emoji, with other erasures; nothing is chosen on the icons.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.pack import load_pack, use_host

use_host()
load_pack()

from concept_surgery.erase_core import Erasure, erase, preset_settings  # noqa: E402
from concept_surgery.erase_core.artefact.language_store import LanguageStore  # noqa: E402
from concept_surgery.erase_core.method.inversion import (  # noqa: E402
    MOST_GUESSES,
    REMEMBERED,
    RIDGE,
    TOLERANCE,
    inverted,
    psnr,
    sampled,
)
from concept_surgery.erase_core.run.purify import (  # noqa: E402
    Purified,
    purify,
    reconstructed,
    schedule,
)
from concept_surgery.erase_core.settings.prompts import with_article  # noqa: E402
from concept_surgery.erase_core.settings.purification import Purification  # noqa: E402
from concept_surgery.erase_core.version import VERSION  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.erasure.results import RESULTS  # noqa: E402
from benchmarks.unnamed.worlds import WORK, identity, open_world  # noqa: E402

SIDE, STEPS = 64, 10
PARTS = WORK / "purification"
CASES = {
    "emoji": ("dog", "truck => boat", "ink => flat"),
    "icons": ("shark => dolphin", "elephant", "pixel => sticker"),
}
# What stands beside a concept, and by itself where there is none; named by no erasure here.
OTHERS = {
    "emoji": ("house", "whale", "guitar", "cherry"),
    "icons": ("castle", "ghost", "camera", "trumpet"),
}
ALONE, BESIDE, WITHOUT, STYLED = 5, 4, 2, 4  # pictures of each kind for an erasure
SHOWN = 16  # pictures on a sheet


class Pictures:
    """A model's real pictures, their latents and what a judge says of them."""

    def __init__(self, name: str) -> None:
        self.name, self.world = name, open_world(name)

    def page(self, thing: str, style: str, seed: int) -> np.ndarray:
        """A real picture of a thing, varied in size and place, uint8 (1, 64, 64, 3)."""
        from benchmarks.emoji import data as emoji
        from benchmarks.icons import data as icons

        row, column = self.world.things.index(thing), self.world.styles.index(style)
        draw = random.Random(f"{seed} {thing} {style}")
        if self.name == "emoji":
            return emoji.render_varied(emoji.load_pictures()[row, column], draw)[None]
        side = draw.randint(icons.SMALLEST, icons.LARGEST)
        shifts = [draw.randint(-icons.SHIFT, icons.SHIFT) for _ in "xy"]
        return icons.render(icons.load_pictures()[row, column], style, side, *shifts)[None]

    def latent(self, page: np.ndarray) -> torch.Tensor:
        """Of a picture uint8 (1, h, w, 3), in the model's scale."""
        if self.name == "emoji":
            return self.world._painter.encoded(page)
        return self.world._model._network.patches.encoded(page)

    def pixels(self, latent: torch.Tensor) -> np.ndarray:
        """The way back."""
        if self.name == "emoji":
            return self.world._painter.pages(latent)
        return self.world._model._network.patches.pages(latent)

    def judged(self, pages: np.ndarray) -> list[tuple[str, str]]:
        """Thing and style of each half of a picture uint8 (1, 64, n * 64, 3)."""
        from benchmarks.unnamed import emoji_world, icons_world

        classify = (emoji_world if self.name == "emoji" else icons_world).classify
        halves = np.concatenate(np.split(pages, pages.shape[2] // SIDE, axis=2))
        return list(zip(*classify(self.world._judge, halves), strict=True))


def asked_of(pictures: Pictures, case: str) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Pages for an erasure, and what stands on each from left to right."""
    concept, styles = case.partition(" =>")[0], pictures.world.styles
    others = OTHERS[pictures.name]
    if concept in styles:
        for number, thing in enumerate(others[:STYLED]):
            yield pictures.page(thing, concept, number), [thing]
        return
    for number in range(ALONE):
        yield pictures.page(concept, styles[number % len(styles)], number), [concept]
    # On one paper: the icons' midnight is dark all over.
    styles = [style for style in styles if style != "midnight"]
    for number in range(BESIDE):
        pair = [concept, others[number % len(others)]][:: -1 if number % 2 else 1]
        kinds = [styles[(number + place) % len(styles)] for place in range(2)]
        halves = [pictures.page(t, s, number) for t, s in zip(pair, kinds, strict=True)]
        yield np.concatenate(halves, axis=2), pair
    for number in range(WITHOUT):
        yield pictures.page(others[number], styles[number], 9), [others[number]]


def erased(pictures: Pictures, denoiser: Any, case: str) -> Erasure:
    """The erasure of a case by *instant*, as the node makes it."""
    kind = "style" if case.partition(" =>")[0] in pictures.world.styles else "object"
    settings = preset_settings("instant", concepts=case, kind=kind, seed=0, resolution=SIDE)
    return erase(settings, denoiser, LanguageStore(WORK / "language"))


def measure(
    pictures: Pictures, denoiser: Any, case: str, asked: Purification
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """What became of each picture, and all of them before and after."""
    concept, erasure = case.partition(" =>")[0], None
    style = concept in pictures.world.styles
    lines, shown = [], []
    for number, (page, things) in enumerate(asked_of(pictures, case)):
        kept = PARTS / f"{pictures.name}-{part_of(pictures, case, asked)}-{number}.npz"
        if not kept.exists():
            erasure = erasure or erased(pictures, denoiser, case)
            prompt = f"a picture of {with_article(things[0])} in {concept} style" if style else ""
            own = dataclasses.replace(asked, prompt=prompt)
            line, both = purified(pictures, denoiser, erasure, concept, page, things, own)
            PARTS.mkdir(parents=True, exist_ok=True)
            beside = kept.with_suffix(f".{os.getpid()}.npz")
            np.savez(beside, line=json.dumps({"case": case, **line}), both=both)
            beside.rename(kept)
        with np.load(kept) as part:
            lines.append(json.loads(str(part["line"])))
            shown.append(part["both"])
    return lines, shown


def part_of(pictures: Pictures, case: str, asked: Purification) -> str:
    """What the part results of a case depend on, as 12 hex digits."""
    solver = (MOST_GUESSES, REMEMBERED, RIDGE, TOLERANCE)
    told = [VERSION, identity(pictures.name), case, dataclasses.asdict(asked), solver]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def purified(
    pictures: Pictures,
    denoiser: Any,
    erasure: Erasure,
    concept: str,
    page: np.ndarray,
    things: Sequence[str],
    asked: Purification,
) -> tuple[dict[str, Any], np.ndarray]:
    """What became of one picture, and the picture above what came of it."""
    style, latent, began = concept in pictures.world.styles, pictures.latent(page), time.monotonic()
    found = purify(latent, asked, erasure, denoiser)
    seconds = time.monotonic() - began
    before, after = (pictures.pixels(one) for one in (latent, found.latent))
    judged = pictures.judged(after)
    pairs = zip(things, [name for name, _ in judged], strict=True)
    line = {
        "things": things,
        "style": style,
        "prompt": asked.prompt,
        "concerned": style or concept in things,
        "gone": all(concept not in pair for pair in judged),
        "kept": [thing == name for thing, name in pairs if thing != concept],
        "judged": [list(pair) for pair in judged],
        "redrawn": round(float(found.mask.mean()), 3),
        "untouched": not bool(found.mask.any()),
        "psnr": round(_psnr(pictures, found), 1),
        "seconds": round(seconds, 1),
    }
    return line, np.concatenate([before, after], axis=1)


def measure_inversion(pictures: Pictures, denoiser: Any, asked: Purification) -> dict[str, Any]:
    """PSNR of the reconstruction by guesses at each step; how far the erased model's is from it."""
    thing, styles = OTHERS[pictures.name][0], pictures.world.styles
    pages = np.concatenate([pictures.page(thing, style, 3) for style in styles[:1]])
    latents, (null,) = pictures.latent(pages), denoiser.encode([""])
    sigmas = schedule(denoiser, asked)

    @torch.no_grad()
    def predict(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return denoiser.predict_x0(x, torch.full((len(x),), sigma), [null] * len(x))

    found: dict[str, Any] = {}
    for name, guesses in (("plain DDIM", 1), ("until it stands", MOST_GUESSES)):
        begun = denoiser.forward_equivalents
        start = inverted(latents, sigmas, predict, guesses)[0]
        spent = (denoiser.forward_equivalents - begun) / len(latents)
        again = pictures.pixels(sampled(start, sigmas, predict))
        worst = min(
            _dB(one, other) for one, other in zip(again, pictures.pixels(latents), strict=True)
        )
        found[name] = {"worst_psnr": round(worst, 1), "predictions_per_step": spent / asked.steps}
    erasure = erased(pictures, denoiser, CASES[pictures.name][0])
    own, others = reconstructed(latents[:1], asked, erasure, denoiser)
    return found | {"erased_model_differs": float((own - others).norm() / own.norm())}


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares over all pictures of a model."""

    def share(values: Sequence[bool]) -> str:
        return f"{sum(values)} of {len(values)}" + f", {sum(values) / max(1, len(values)):.0%}"

    concerned = [line for line in lines if line["concerned"]]
    objects = [line for line in concerned if not line["style"]]
    without = [line for line in lines if line not in concerned]
    return {
        "gone": share([line["gone"] for line in objects]),
        "styles_gone": share([line["gone"] for line in concerned if line["style"]]),
        "other_thing_kept": share([k for line in objects for k in line["kept"]]),
        "thing_kept_in_styles": share([k for x in concerned if x["style"] for k in x["kept"]]),
        "without_it_kept": share([k for line in without for k in line["kept"]]),
        "without_it_untouched": share([line["untouched"] for line in without]),
        "worst_psnr": min(line["psnr"] for line in lines),
    }


def _psnr(pictures: Pictures, found: Purified) -> float:
    return _dB(*(pictures.pixels(one) for one in (found.picture, found.reconstruction)))


def _dB(one: np.ndarray, other: np.ndarray) -> float:
    return min(99.0, psnr(*(torch.from_numpy(page / 255.0) for page in (one, other))))


def sheet(shown: Sequence[np.ndarray], path: Path, columns: int = 8, zoom: int = 2) -> None:
    """Write pictures, each above what became of it."""
    row_height = 2 * SIDE + 8
    widths = [page.shape[2] for page in shown]
    rows: list[list[np.ndarray]] = [[]]
    for page, width in zip(shown, widths, strict=True):
        if sum(p.shape[2] for p in rows[-1]) + width > columns * SIDE:
            rows.append([])
        rows[-1].append(page)
    canvas = np.full((len(rows) * row_height, columns * SIDE, 3), 255, np.uint8)
    for number, row in enumerate(rows):
        left = 0
        for page in row:
            top = number * row_height
            canvas[top : top + 2 * SIDE, left : left + page.shape[2]] = page[0]
            left += page.shape[2]
    picture = Image.fromarray(canvas)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(
        path, quality=85
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(CASES))
    parser.add_argument("--cases", nargs="*", help="of these models; else all")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--start-level", type=float, default=Purification.start_level)
    parser.add_argument("--guidance", type=float, default=Purification.guidance)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    asked = Purification(steps=given.steps, start_level=given.start_level, guidance=given.guidance)
    path = given.folder / "purification.json"
    result = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for name in given.models:
        pictures = Pictures(name)
        lines: list[dict[str, Any]] = []
        shown: list[np.ndarray] = []
        with pictures.world.denoiser() as denoiser:
            inversion = measure_inversion(pictures, denoiser, asked)
            for case in given.cases or CASES[name]:
                found, pages = measure(pictures, denoiser, case, asked)
                lines += found
                shown += pages
                result[name] = {
                    "model": identity(name),
                    "engine": VERSION,
                    "settings": dataclasses.asdict(asked),
                    "summary": summary(lines),
                    "inversion": inversion,
                    "pictures": lines,
                }
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                sheet(shown[:: -(-len(shown) // SHOWN)], given.folder / f"purification_{name}.jpg")
                print(name, case, json.dumps(summary(lines)), flush=True)


if __name__ == "__main__":
    main()
