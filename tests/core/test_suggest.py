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

    read = 0  # prompts

    def encode(self, prompts, together=False):
        self.read += len(prompts)
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


def test_what_was_read_is_not_read_again_by_the_same_encoder_alone():
    cache: dict[str, torch.Tensor] = {}
    reader, cat = EmojiReader(), Concept("cat")
    plain = suggest(EmojiReader(), cat, "object", first("kitten"))
    assert suggest(reader, cat, "object", first("kitten"), cache=cache) == plain
    (kept,) = cache.values()
    assert reader.read > 20 and len(kept) >= 20 and bool(kept.isfinite().all())
    reader.read = 0
    assert suggest(reader, cat, "object", first("kitten"), cache=cache) == plain
    assert reader.read == 1  # by which it is known again
    other = EmojiReader()
    for weight in other._encoder.parameters():
        weight.data.mul_(1.01)
    own = suggest(other, cat, "object", first("kitten"))
    assert suggest(other, cat, "object", first("kitten"), cache=cache) == own
    assert len(cache) == 2
    # A file that is another's, or half of one, counts as none.
    for wrong in (kept[:, :-1], kept.half(), kept[0]):
        damaged = dict.fromkeys(cache, wrong)
        assert suggest(reader, cat, "object", first("kitten"), cache=damaged) == plain


def test_who_cancels_reads_the_rest_alone_the_next_time():
    cache: dict[str, torch.Tensor] = {}
    reader, total = EmojiReader(), []

    def stop(done, of):
        total.append(of)
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suggest(reader, Concept("cat"), "object", first("kitten"), stop, cache)
    read, reader.read = reader.read - 1, 0
    suggest(reader, Concept("cat"), "object", first("kitten"), cache=cache)
    assert 0 < read < total[0] and reader.read - 1 == total[0] - read
