"""Other names of a concept, and its neighbours, from text encoders that know some."""

from __future__ import annotations

import pytest
import torch
from concept_surgery.erase_core.method.suggest import Suggestion, suggest
from concept_surgery.erase_core.model.prompt import Encoded
from concept_surgery.erase_core.settings.texts import Concept, parse_concepts
from safetensors.torch import load_file

from benchmarks.emoji.build import WEIGHTS, unpack
from benchmarks.emoji.text import known_words, tokenize
from benchmarks.emoji.words import SYNONYMS
from benchmarks.icons.model import IconsModel

from .toy import ToyDenoiser


class EmojiReader:
    """The first small model's text encoder, which has few words."""

    def __init__(self) -> None:
        self._encoder = unpack(load_file(WEIGHTS))[1]

    def encode(self, prompts, together=False):
        with torch.no_grad():
            return [Encoded(rows) for rows in self._encoder(tokenize(list(prompts)))]

    def token_ids(self, prompts):
        return tokenize(list(prompts)).tolist()

    def vocabulary(self):
        return [*known_words(), *SYNONYMS]


@pytest.fixture(scope="module")
def emoji() -> EmojiReader:
    return EmojiReader()


@pytest.mark.parametrize(
    "concept, name", [("cat", "kitten"), ("rabbit", "bunny"), ("car", "automobile")]
)
def test_the_first_small_models_other_names_are_found(emoji, concept, name):
    found = suggest(emoji, Concept(concept), "object", first(name))
    assert name in found.names and len(found.names) <= 3
    assert concept not in (*found.names, *found.neighbours)


def test_the_second_small_models_other_names_are_found():
    """Nothing was chosen on it."""
    with IconsModel().denoiser() as denoiser:
        for concept, name in {"snake": "serpent", "corn": "maize"}.items():
            found = suggest(denoiser, Concept(concept), "object", first(name))
            assert found.names == (name,)


def first(word: str):
    """Puts one word first, and leaves the others in their order."""
    return lambda words: sorted(words, key=lambda one: one != word)


def test_neighbours_are_things_that_stay(emoji):
    (concept,) = parse_concepts("cat | kitten => dog")
    found = suggest(emoji, concept, "object", first("tiger"))
    assert found.neighbours and not {"cat", "kitten", "dog"} & {*found.names, *found.neighbours}
    assert not {*found.names} & {*found.neighbours}


def test_a_line_is_read_back_as_the_concept_with_its_names():
    (concept,) = parse_concepts("cat | kitten => dog")
    line = Suggestion(concept, ("kitty", "feline"), ()).line
    assert line == "cat | kitten | kitty | feline => dog"
    assert parse_concepts(line)[0].names == ("cat", "kitten", "kitty", "feline")


@pytest.mark.parametrize("kind", ["object", "style", "person", "tags"])
def test_an_encoder_without_meaning_suggests_no_names(kind):
    """Each word of the toy is a random vector, and it lists no vocabulary."""
    told: list[int] = []
    for text in ("cat", "a very old red car"):
        found = suggest(ToyDenoiser(), Concept(text), kind, progress=lambda *at: told.extend(at))
        assert found.names == () and told[-1] == told[-2]


def test_an_interrupt_passes(emoji):
    class Stopped(Exception):
        pass

    def stop(done, total):
        raise Stopped

    with pytest.raises(Stopped):
        suggest(emoji, Concept("cat"), "object", progress=stop)
