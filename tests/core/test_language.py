"""Ordinary language: which prompts are read, what is made of them, what is kept of it."""

import re

import pytest
import torch
from concept_surgery.erase_core import erase, preset_settings
from concept_surgery.erase_core.files.disk import write_safetensors
from concept_surgery.erase_core.method import language
from concept_surgery.erase_core.method.language import (
    SHRINKAGE,
    WITNESS_ROWS,
    read_language,
    read_moment,
    shrunk,
    unknown_share,
)
from concept_surgery.erase_core.method.reading import (
    PHRASES,
    TAG_PHRASES,
    WITNESSES,
    WORDS_PER_CAPTION,
    Reading,
    choose_reading,
    common_tags,
    in_phrases,
    plain_captions,
    things,
    those_naming,
)
from concept_surgery.erase_core.model.prompt import POOLED, Encoded

from .toy import TOKENS, WIDTH, ToyDenoiser


class CountingToy(ToyDenoiser):
    """Counts the prompts that it encodes."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def encode(self, prompts, together=False):
        self.asked += prompts
        return super().encode(prompts, together)


class RaggedToy(CountingToy):
    """Without padding: prompts have as many rows as tokens. With a pooled vector each.

    Args:
        tells: whether batches have them, too.
    """

    def __init__(self, tells=True):
        super().__init__()
        self.tells = tells

    def token_ids(self, prompts):
        return [[i for i in ids if i != 1] + [1] for ids in super().token_ids(prompts)]

    def encode(self, prompts, together=False):
        self.asked += prompts
        rows = [self._embed(ids) for ids in self.token_ids(prompts)]
        return [
            Encoded(one, None if together and not self.tells else one.sum(0)[:7]) for one in rows
        ]


class ListingToy(CountingToy):
    """Lists its words, the frequent ones first."""

    words = [*things(), *(f"word{n}" for n in range(3000))]

    def vocabulary(self):
        return list(self.words)


class WholeWordToy(ListingToy):
    """A word is one token, and any other is the unknown word."""

    UNKNOWN, known = 2, frozenset([*things()[:200], *"a photo of picture".split()])

    def token_ids(self, prompts):
        found = []
        for prompt, ids in zip(prompts, super().token_ids(prompts), strict=True):
            words = prompt.split()[: TOKENS - 2]
            own = [
                i if w in self.known else self.UNKNOWN for w, i in zip(words, ids[1:], strict=False)
            ]
            found.append([0, *own, *ids[len(words) + 1 :]])
        return found


def words_of(texts):
    return set(re.findall(r"\w+", " ".join(texts).casefold()))


CAPTIONS = plain_captions(100)
EVERY = plain_captions()
MOST = int(WORDS_PER_CAPTION * len(EVERY))


def test_with_a_vocabulary_things_come_first_and_fewer_words_than_captions_are_read():
    reading = choose_reading(ListingToy(), EVERY, "object")
    words = [word for word, _ in reading.words]
    held_out = [word for word, _ in reading.witnesses]
    assert reading.protected == (*EVERY, *(text for _, text in reading.words))
    assert len(words) == len(set(words)) == MOST and len(held_out) == WITNESSES
    left = [thing for thing in things() if thing not in held_out]
    assert words[: len(left)] == left
    # Of the others the frequent ones are the denser: half of the list has .63 of them.
    numbers = [int(word.removeprefix("word")) for word in words[len(left) :]]
    assert numbers == sorted(numbers) and numbers[0] == 0 and numbers[-1] > 2900
    assert sum(number < 1500 for number in numbers) == pytest.approx(0.63 * len(numbers), abs=3)


@pytest.mark.parametrize("toy", [ToyDenoiser, ListingToy])
@pytest.mark.parametrize("count", [40, 1000])
def test_witnesses_are_in_nothing_that_is_protected(toy, count):
    captions = plain_captions(count)
    reading = choose_reading(toy(), captions, "object")
    held_out = [word for word, _ in reading.witnesses]
    assert len(held_out) == len(set(held_out)) == WITNESSES
    assert set(held_out) <= set(things())
    assert not set(held_out) & words_of(reading.protected)
    assert those_naming(captions, held_out) == []


def test_where_captions_name_most_words_the_others_are_witnesses_first():
    class FewWords(ToyDenoiser):
        def vocabulary(self):
            return [f"word{n}" for n in range(60)]

    captions = [f"word{n} and more" for n in range(50)]
    reading = choose_reading(FewWords(), captions, "object")
    held_out = {word for word, _ in reading.witnesses}
    assert len(held_out) == 15 and held_out > {f"word{n}" for n in range(50, 60)}
    assert not held_out & {word for word, _ in reading.words}
    assert len(reading.words) == 45


def test_without_a_vocabulary_shipped_words_are_read():
    class Silent(ToyDenoiser):
        def vocabulary(self):
            return []

    for toy in (ToyDenoiser(), Silent()):
        reading = choose_reading(toy, EVERY, "object")
        assert len(reading.words) == MOST
        shipped = words_of([*things(), *common_tags(), *plain_captions()])
        assert not {"ohn", "othic"} & {word for word, _ in reading.words}  # John, Gothic
        assert {word for word, _ in reading.words} <= shipped


def test_tags_are_read_as_tags():
    reading = choose_reading(ListingToy(), EVERY, "tags")
    words = {word for word, _ in (*reading.words, *reading.witnesses)}
    assert words == set(common_tags())
    assert all(
        text in {phrase.replace("{}", word) for phrase in TAG_PHRASES}
        for word, text in reading.words
    )
    assert not {w for w, _ in reading.witnesses} & {w for w, _ in reading.words}


def test_words_take_the_phrases_in_turn():
    found = in_phrases(["owl", "boots", "cat"], PHRASES[:2])
    assert found == (("owl", "a photo of an owl"), ("boots", "boots"), ("cat", "a photo of a cat"))
    reading = choose_reading(ListingToy(), CAPTIONS, "object")
    assert {text for _, text in reading.witnesses} == {
        text for _, text in in_phrases([word for word, _ in reading.witnesses], PHRASES[:1])
    }


def test_unknown_words_are_neither_protected_nor_witnesses():
    toy = WholeWordToy()
    reading = choose_reading(toy, EVERY, "object")
    words = {word for word, _ in (*reading.words, *reading.witnesses)}
    assert words == set(things()[:200])


def test_it_is_told_how_much_of_the_captions_is_unknown():
    toy = WholeWordToy()
    assert unknown_share(toy, ["a photo of zebras", "a gnu"]) == pytest.approx(2 / 6)
    assert unknown_share(toy, [""]) == 0
    assert unknown_share(ToyDenoiser(), ["a photo of zebras"]) == 0
    values = {"concepts": f"{things()[0]} => {things()[1]}", "captions": 40}
    last = erase(preset_settings("instant", **values), toy)
    (warning,) = [w for w in last.record["warnings"] if "text encoder knows only" in w]
    told = unknown_share(toy, plain_captions(64))
    assert told > 0.5 and f"knows only {1 - told:.0%} of the words" in warning


def brute_force(prompts):
    """``mean_p mean_t c c^T`` of encoded prompts."""
    rows = [prompt.tokens.double() for prompt in prompts]
    return sum(one.T @ one / len(one) for one in rows) / len(rows)


@pytest.mark.parametrize("toy", [ToyDenoiser, RaggedToy])
def test_the_moment_is_the_mean_over_prompts_however_long(toy):
    denoiser = toy()
    reading = choose_reading(denoiser, CAPTIONS, "object")
    language = read_language(denoiser, reading)
    expected = brute_force(denoiser.encode(reading.protected, together=True))
    torch.testing.assert_close(language.moment, expected, rtol=1e-5, atol=1e-6)
    assert language.moment.dtype == torch.float64


@pytest.mark.parametrize("toy", [ToyDenoiser, RaggedToy])
def test_prompts_that_name_a_concept_count_as_if_they_had_never_been_there(toy):
    """One cache serves all concepts."""
    denoiser, cache, named = toy(), {}, ["cat", "volcano"]
    captions = plain_captions()
    reading = choose_reading(denoiser, captions, "object")
    left_out = those_naming(reading.protected, named)
    assert "a cat burglar tiptoeing along a roof ridge" in left_out
    assert any("volcano" in text for text in left_out[-3:])
    rest = [text for text in reading.protected if text not in left_out]
    expected = brute_force(denoiser.encode(rest, together=True))
    whole = read_language(denoiser, reading, cache).moment
    for _ in range(2):
        found = read_language(denoiser, reading, cache, named).moment
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert (found - whole).norm() > 1e-3 * whole.norm()
    assert len(cache) == 3


def test_names_are_found_as_words_of_their_own():
    assert not those_naming(["a category", "concatenate"], ["cat"])
    assert those_naming(["two Cats", "cat, cute"], ["cat"]) == ["two Cats", "cat, cute"]
    assert those_naming(["saber \\(fate\\), armour"], ["saber \\(fate\\)"])
    named = those_naming(plain_captions(), ["cat", "Van Gogh"])
    assert any("van Gogh" in caption for caption in named)
    assert all("cat" in c.lower() or "van gogh" in c.lower() for c in named)


def test_language_is_read_once_for_each_encoder_and_reading():
    toy, cache = CountingToy(), {}
    reading = choose_reading(toy, CAPTIONS, "object")
    first = read_language(toy, reading, cache)
    (key,) = [key for key in cache if "-" not in key]
    assert set(cache) == {key, f"{key}-words", f"{key}-witnesses"}
    toy.asked.clear()
    again = read_language(toy, reading, cache)
    assert len(toy.asked) == 4  # the probes that tell encoders apart
    assert torch.equal(first.moment, again.moment) and first.unknown == again.unknown
    for one, other in ((first.vocabulary, again.vocabulary), (first.witnesses, again.witnesses)):
        assert one.texts == other.texts and torch.equal(one.rows, other.rows)
        assert torch.equal(one.counts, other.counts)
    read_language(toy, choose_reading(toy, CAPTIONS[:-1], "object"), cache)
    assert len(cache) == 6
    less = Reading(reading.protected, reading.words, reading.witnesses[:-1])
    read_language(toy, less, cache)
    assert len(cache) == 9

    class OtherToy(CountingToy):
        def _embed(self, ids):
            return super()._embed(ids) * 1.001

    read_language(OtherToy(), reading, cache)
    assert len(cache) == 12


@pytest.mark.parametrize("part", ["", "-words", "-witnesses"])
@pytest.mark.parametrize("amiss", [float("nan"), float("inf"), None])
def test_an_entry_that_is_gone_or_not_finite_is_read_anew(part, amiss):
    toy, cache = CountingToy(), {}
    reading = choose_reading(toy, CAPTIONS, "object")
    first = read_language(toy, reading, cache)
    (key,) = [key for key in cache if key == f"{key[:32]}{part}"]
    if amiss is None:
        del cache[key]
    else:
        cache[key] = cache[key].clone()
        cache[key].view(-1)[3] = amiss
    toy.asked.clear()
    again = read_language(toy, reading, cache)
    assert len(toy.asked) > len(reading.protected)
    assert torch.equal(first.moment, again.moment)
    assert torch.equal(first.witnesses.rows, again.witnesses.rows)
    assert all(rows.isfinite().all() for rows in cache.values())


@pytest.mark.parametrize("toy", [ToyDenoiser, RaggedToy])
def test_words_have_the_rows_of_their_last_token_and_of_the_end(toy):
    denoiser = toy()
    reading = choose_reading(denoiser, CAPTIONS, "object")
    found = read_language(denoiser, reading).vocabulary
    assert found.texts == tuple(word for word, _ in reading.words)
    assert found.rows.shape == (len(found.texts), 2, WIDTH) and found.counts.tolist() == [1, 1]
    for number, (word, text) in list(enumerate(reading.words))[:14]:
        (prompt,) = denoiser.encode([text], together=True)
        place = len(text[: text.index(word) + len(word)].split())  # behind the start token
        expected = prompt.tokens[[place, 1 + len(text.split())]]
        torch.testing.assert_close(found.rows[number], expected, rtol=1e-2, atol=1e-2)


def test_rows_of_witnesses_count_for_the_padding_that_was_left_out():
    class LongToy(ToyDenoiser):
        def token_ids(self, prompts):
            return [[*ids, *[1] * 28] for ids in super().token_ids(prompts)]

    for toy, rows, counts in (
        (LongToy(), WITNESS_ROWS, [1.0] * (WITNESS_ROWS - 1) + [TOKENS + 28 - WITNESS_ROWS + 1.0]),
        (ToyDenoiser(), TOKENS, [1.0] * TOKENS),
    ):
        found = read_language(toy, choose_reading(toy, CAPTIONS, "object")).witnesses
        assert found.rows.shape == (WITNESSES, rows, WIDTH)
        assert found.counts.tolist() == counts


@pytest.mark.parametrize("toy", [ToyDenoiser, RaggedToy])
def test_what_is_kept_can_be_written_to_a_file(toy, tmp_path):
    denoiser, cache = toy(), {}
    read_language(denoiser, choose_reading(denoiser, CAPTIONS, "object"), cache)
    for key, rows in cache.items():
        write_safetensors(tmp_path / key, {"moment": rows}, {})
    assert len(list(tmp_path.iterdir())) == 3


def test_rows_of_witnesses_count_once_where_nothing_is_padded():
    toy = RaggedToy()
    reading = choose_reading(toy, CAPTIONS, "object")
    found = read_language(toy, reading).witnesses
    assert found.counts.tolist() == [1.0] * 7  # start a photo of a word end
    for (_, text), rows in zip(reading.witnesses[:5], found.rows[:5], strict=True):
        (prompt,) = toy.encode([text])
        assert len(prompt.tokens) in (6, 7)  # plurals have no article
        torch.testing.assert_close(rows[: len(prompt.tokens)], prompt.tokens, rtol=1e-2, atol=1e-2)
        assert not rows[len(prompt.tokens) :].any()


def test_the_moment_of_pooled_vectors_is_their_mean():
    toy, cache, prompts = RaggedToy(), {}, plain_captions(60)
    found = read_moment(toy, prompts, POOLED, cache)
    rows = torch.stack([prompt.pooled for prompt in toy.encode(prompts)]).double()
    torch.testing.assert_close(found, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    named = those_naming(prompts, ["woman"])
    assert named
    rest = [text for text in prompts if text not in named]
    rows = torch.stack([prompt.pooled for prompt in toy.encode(rest)]).double()
    toy.asked.clear()
    found = read_moment(toy, prompts, POOLED, cache, ["woman"])
    torch.testing.assert_close(found, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert toy.asked[4:] == named
    silent = RaggedToy(tells=False)
    again = read_moment(silent, prompts, POOLED)
    assert torch.equal(again, cache[next(iter(cache))])
    assert len(silent.asked) == 4 + 60 + 16  # the first batch once more, and then one by one
    (key,) = cache
    assert key.endswith("-pooled")
    cache[key] = cache[key] * float("nan")
    assert read_moment(toy, prompts, POOLED, cache).isfinite().all()


def test_a_shrunk_moment_has_a_share_that_is_alike_in_all_directions():
    rows = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = rows.T @ rows / 5
    found, sizes = shrunk(moment), torch.linalg.eigvalsh(moment)
    assert float(found.trace()) == pytest.approx(float(moment.trace()))
    expected = (1 - SHRINKAGE) * sizes + SHRINKAGE * sizes.mean()
    torch.testing.assert_close(torch.linalg.eigvalsh(found), expected)
    assert torch.equal(shrunk(moment, 0.0), moment)


@pytest.mark.parametrize(
    "part, change",
    [
        ("", lambda rows: rows[:-1]),
        ("", lambda rows: rows[:-1, :-1]),
        ("", lambda rows: rows[None]),
        ("", lambda rows: rows.float()),
        ("", lambda rows: rows + torch.ones(len(rows)).double().diag(1)[:-1, :-1]),
        ("", lambda rows: -rows),
        ("-words", lambda rows: rows[1:]),
        ("-words", lambda rows: rows[:, :1]),
        ("-words", lambda rows: rows[..., :-1]),
        ("-words", lambda rows: rows.flatten()),
        ("-witnesses", lambda rows: rows[1:]),
        ("-witnesses", lambda rows: rows[:, :0]),
        ("-witnesses", lambda rows: rows.repeat(1, 9, 1)),
        ("-witnesses", lambda rows: rows[0, 0, 0]),
    ],
)
def test_what_has_another_shape_than_it_must_is_read_anew(part, change):
    toy, cache = ListingToy(), {}
    reading = choose_reading(toy, CAPTIONS, "object")
    first = read_language(toy, reading, cache)
    (key,) = [key for key in cache if key == f"{key[:32]}{part}"]
    right, cache[key] = cache[key], change(cache[key])
    again = read_language(toy, reading, cache)
    assert torch.equal(again.moment, first.moment) and torch.equal(cache[key], right)
    assert torch.equal(again.vocabulary.rows, first.vocabulary.rows)
    assert torch.equal(again.witnesses.rows, first.witnesses.rows)


@pytest.mark.parametrize("change", [lambda rows: rows[1:], lambda rows: rows[:1, :1], torch.neg])
def test_a_pooled_moment_of_another_shape_is_read_anew(change):
    toy, cache, prompts = RaggedToy(), {}, plain_captions(20)
    first = read_moment(toy, prompts, POOLED, cache)
    (key,) = cache
    cache[key] = change(cache[key])
    assert torch.equal(read_moment(toy, prompts, POOLED, cache), first)
    assert torch.equal(cache[key], first)


class OtherPooledToy(RaggedToy):
    """The same tokens, another encoder for the pooled vector."""

    def encode(self, prompts, together=False):
        plain = super().encode(prompts, together)
        return [Encoded(p.tokens, None if together else p.pooled.flip(0)) for p in plain]


def test_a_pooled_moment_is_of_the_encoder_that_gives_the_pooled_vectors():
    cache, prompts = {}, plain_captions(20)
    one = read_moment(RaggedToy(), prompts, POOLED, cache)
    other = read_moment(OtherPooledToy(), prompts, POOLED, cache)
    assert len(cache) == 2
    torch.testing.assert_close(other, one.flip(0, 1))


def test_what_another_version_cached_is_not_used(monkeypatch):
    toy, cache = ListingToy(), {}
    reading = choose_reading(toy, CAPTIONS, "object")
    read_language(toy, reading, cache)
    read_moment(RaggedToy(), CAPTIONS, POOLED, cache)
    before = set(cache)
    monkeypatch.setattr(f"{read_language.__module__}.VERSION", "0.0.0", raising=False)
    read_language(toy, reading, cache)
    read_moment(RaggedToy(), CAPTIONS, POOLED, cache)
    assert len(cache) == 2 * len(before) == 8


def test_the_key_tells_lists_apart_that_read_alike():
    toy, cache, same = ListingToy(), {}, Encoded(torch.ones(2, WIDTH))
    for captions in (["a cat\na dog", "a boat"], ["a cat", "a dog\na boat"]):
        reading = Reading(tuple(captions), (), ())
        toy.encode = lambda prompts, together=False: [same for _ in prompts]
        read_language(toy, reading, cache)
    assert len(cache) == 6


@pytest.mark.parametrize("has_it", [True, False])
@pytest.mark.parametrize("width", [2048, 15360])
def test_moments_are_summed_where_float64_is_and_has_room(monkeypatch, has_it, width):
    monkeypatch.setattr(language, "_has_float64", lambda device: has_it)
    expected = "meta" if has_it and width == 2048 else "cpu"
    assert language._where_it_is_summed(torch.device("meta"), width).type == expected


def test_a_device_is_asked_for_float64(monkeypatch):
    assert language._has_float64(torch.device("cpu"))

    def refuse(*given, **named):
        raise TypeError("Cannot convert a tensor to float64")

    monkeypatch.setattr(torch, "ones", refuse)
    assert not language._has_float64(torch.device("cpu"))
