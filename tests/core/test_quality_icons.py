"""The same as ``tests/host/test_quality.py`` shows, on a second model that draws.

Nothing was ever chosen on the icons model of ``benchmarks/icons``. Its text encoder knows whole
words only, its network predicts a flow. Phrases are such as no erasure is trained on, and the
others are things that the run doesn't name.
"""

import numpy as np
import pytest
from concept_surgery.erase_core import erase, preset_settings
from concept_surgery.erase_core.settings.prompts import OBJECT_TEMPLATES

from benchmarks.icons.model import IconsModel
from benchmarks.icons.words import HELD_OUT_PLAIN, THING_NAMES, fill

PHRASES = [p for p in HELD_OUT_PLAIN if p not in {template.text for template in OBJECT_TEMPLATES}]
PICTURES, OTHERS = 12, 16


@pytest.fixture(scope="module")
def model() -> IconsModel:
    return IconsModel()


@pytest.fixture(scope="module")
def language() -> dict:
    """What was read of ordinary language, once for all cases."""
    return {}


def asked_for(things: list[str]) -> list[str]:
    return [fill(PHRASES[n % len(PHRASES)], thing) for n, thing in enumerate(things)]


def right(model: IconsModel, things: list[str], edit=None) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Of which of the things the picture is one."""
    noise = model.draw_noise(len(things), 100)
    pages = model.pictures(asked_for(things), [""] * len(things), noise, edit)
    found, _ = model.classify(pages)
    return np.array(found) == np.array(things)


@pytest.mark.parametrize("concepts", ["cheese", "taxi => fire truck"])
def test_the_concept_goes_and_the_rest_stays(
    model: IconsModel, language: dict, concepts: str
) -> None:
    """Over five seeds of noise all of it was gone and all of the others stayed, in each case."""
    settings = preset_settings("instant", concepts=concepts)
    with model.denoiser() as denoiser:
        last = erase(settings, denoiser, language)
    concept, spoken = settings.concepts[0], set(concepts.split())
    unnamed = [name for name in THING_NAMES if not spoken & set(name.split())]
    things = [concept.text] * PICTURES + unnamed[:: len(unnamed) // OTHERS][:OTHERS]
    before, after = right(model, things), right(model, things, last.edit())
    assert before.mean() >= 0.9  # else nothing is shown
    erased, others = before[:PICTURES], before[PICTURES:]
    assert after[:PICTURES][erased].mean() <= 0.1
    assert after[PICTURES:][others].mean() >= 0.9
