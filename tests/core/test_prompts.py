"""The prompts of a run, and what the tokens of those with the concept must become."""

import pytest
import torch
from concept_surgery.erase_core import EraseSettings, erase, preset_settings
from concept_surgery.erase_core.method.alignment import STREAM_IDS, content_length, word_span
from concept_surgery.erase_core.method.encoded import encode_prompts
from concept_surgery.erase_core.method.reading import those_naming
from concept_surgery.erase_core.model.prompt import Encoded
from concept_surgery.erase_core.run.given import Given
from concept_surgery.erase_core.run.meter import Meter, MeteredDenoiser
from concept_surgery.erase_core.settings.prompts import (
    FILLERS,
    TEMPLATES,
    Template,
    name_of,
    prompt_pairs,
    with_article,
)

from .toy import ToyDenoiser


@pytest.mark.parametrize(
    "concept, expected",
    [
        ("hourglass", "an hourglass"),
        ("honest man", "an honest man"),
        ("house", "a house"),
        ("unicorn", "a unicorn"),
        ("uniform", "a uniform"),
        ("uninvited guest", "an uninvited guest"),
        ("umbrella", "an umbrella"),
        ("one-eyed cat", "a one-eyed cat"),
        ("onesie", "an onesie"),
        ("European city", "European city"),
        ("ewer", "a ewer"),
        ("UFO", "UFO"),
        ("ufo", "a ufo"),
        ("lens", "a lens"),
        ("contact lenses", "contact lenses"),
        ("glass", "a glass"),
        ("octopus", "an octopus"),
        ("iris", "an iris"),
        ("people", "people"),
        ("scissors", "scissors"),
        ("old children", "old children"),
        ("children book", "a children book"),
        ("fire truck", "a fire truck"),
        ("two owls", "two owls"),
        ("my owl", "my owl"),
        ("an owl", "an owl"),
        ("(owl:1.3)", "an (owl:1.3)"),
        ("((Picasso))", "((Picasso))"),
        ("(black cats:0.8)", "(black cats:0.8)"),
        ("embedding:mycat", "embedding:mycat"),
        ("(embedding:owl:1.2)", "(embedding:owl:1.2)"),
        ("()", "a ()"),
    ],
)
def test_articles_are_as_spoken_and_plurals_have_none(concept, expected):
    assert with_article(concept) == expected


@pytest.mark.parametrize("kind", TEMPLATES)
def test_there_is_a_filler_of_every_length(kind):
    assert list(FILLERS) == list(TEMPLATES)
    assert [len(filler.split()) for filler in FILLERS[kind]] == list(range(1, 9))
    ends = {filler.split()[-1] for filler in FILLERS[kind]}
    assert ends == {{"style": "plain", "person": "person"}.get(kind, "thing")}


def test_a_filler_stands_behind_the_concepts_own_article():
    template = Template("{a} and the {}")
    assert template.neutral("owl", "plain thing") == "an plain thing and the plain thing"
    assert template.neutral("boots", "thing") == "thing and the thing"
    assert Template("{} style").neutral("Van Gogh", "simple plain") == "simple plain style"


def test_a_pair_knows_its_neutral_prompts():
    templates = "a photo of {}\n{}, ink"
    pairs = prompt_pairs(EraseSettings(concepts="owl => fire truck\npizza", templates=templates))
    assert [pair.concept for pair in pairs] == [0, 0, 1, 1]
    assert pairs[1].neutral[:2] == ("thing, ink", "plain thing, ink")
    assert pairs[1].neutral_alternative == pairs[1].neutral
    assert (pairs[2].alternative, pairs[2].neutral_alternative) == ("", ())
    assert pairs[2].neutral[0] == "a photo of thing"
    own = prompt_pairs(EraseSettings(concepts="owl", templates="sketch, {}, ink => sketch, pen"))
    assert own[0].alternative == "sketch, pen"


def test_a_style_is_not_said_twice_in_neutral_prompts():
    pairs = prompt_pairs(EraseSettings(concepts="ink style => flat style", kind="style"))
    assert pairs[0].neutral[0] == pairs[0].neutral_alternative[0] == "plain style"


@pytest.mark.parametrize(
    "text, kind, name",
    [
        ("watercolor style", "style", "watercolor"),
        ("Watercolor  Style", "style", "Watercolor"),
        ("(watercolor style:1.2)", "style", "watercolor"),
        ("style", "style", "style"),
        ("hair style", "object", "hair style"),
        ("(cat:1.3)", "object", "cat"),
        ("((cat))", "object", "cat"),
        ("[cat]", "object", "cat"),
        ("(fire:1.2) truck", "object", "fire truck"),
        ("a cat", "object", "cat"),
        ("the (owl: 0.7)", "object", "owl"),
        ("The Rock", "person", "The Rock"),
        ("the rock", "person", "the rock"),
        ("an", "object", "an"),
        ("saber \\(fate\\)", "tags", "saber \\(fate\\)"),
        ("cat_ears", "tags", "cat ears"),
        (":)", "tags", ":)"),
        ("embedding:my_cat", "object", "embedding:my cat"),
    ],
)
def test_the_name_of_a_concept_is_what_other_prompts_call_it(text, kind, name):
    assert name_of(text, kind) == name
    pair = prompt_pairs(EraseSettings(concepts=text, kind=kind))[0]
    # What the templates say of it is that name and nothing more, with the user's emphasis.
    assert those_naming([pair.erased], [name])


@pytest.mark.parametrize(
    "text, kind, name",
    [
        ("Van Gogh", "style", "Van Gogh"),
        ("Van Gogh style", "style", "Van Gogh"),
        ("pizza box", "object", "pizza box"),
        ("a pizza box", "object", "pizza box"),
        ("the lathe operator", "object", "lathe operator"),
        ("an orange", "object", "orange"),
    ],
)
def test_only_an_article_in_front_is_no_part_of_the_name(text, kind, name):
    assert name_of(text, kind) == name
    assert those_naming([f"a picture of {name}, framed"], [name_of(text, kind)])


def test_prompts_that_name_it_are_not_protected_however_it_is_written():
    captions = ["a harbour in watercolor", "a (black:1.2) cat, asleep", "blue_hair, solo", "a boat"]
    for text, kind, expected in (
        ("watercolor style", "style", captions[:1]),
        ("(black cat:1.3)", "object", captions[1:2]),
        ("the cat", "object", captions[1:2]),
        ("blue hair", "tags", captions[2:3]),
    ):
        assert those_naming(captions, [name_of(text, kind)]) == expected
    settings = EraseSettings(
        concepts="watercolor style => (oil style:1.1)\n(cat:1.3)", kind="style"
    )
    model = MeteredDenoiser(ToyDenoiser(), Meter())
    given = Given(settings, model, encode_prompts(settings, model), torch.Generator())
    assert given.erased == ["watercolor", "cat"] and given.spoken == [*given.erased, "oil"]


BEGIN, END, PAD = 49406, 49407, 0
# Ids of a prompt of two words and of the null prompt, and where the words are.
LAYOUTS = {
    "CLIP": ([BEGIN, 5, 6, END, END, END], [BEGIN] + [END] * 5, (1, 3)),
    "CLIP-G": ([BEGIN, 5, 6, END, PAD, PAD], [BEGIN, END, PAD, PAD, PAD, PAD], (1, 3)),
    "T5": ([5, 6, 1, PAD, PAD, PAD], [1] + [PAD] * 5, (0, 2)),
    "BERT": ([101, 5, 6, 102, PAD, PAD], [101, 102] + [PAD] * 4, (1, 3)),
    "no padding": ([2, 5, 6], [2], (1, 3)),
    "no padding, with an end": ([5, 6, 1], [1], (0, 2)),
    "several": (
        [BEGIN, 5, 6, END, END, STREAM_IDS + 5, STREAM_IDS + 1, STREAM_IDS],
        [BEGIN, END, END, END, END, STREAM_IDS + 1, STREAM_IDS, STREAM_IDS],
        (1, 3),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_words_are_found_among_what_stands_around_them(layout):
    ids, null, expected = LAYOUTS[layout]
    assert word_span(ids, null) == expected
    begin, end = word_span(null, null)
    assert begin == end


def test_the_content_ends_where_the_padding_begins():
    assert content_length([BEGIN, 5, 6, END, END, END], [BEGIN, *[END] * 5]) == 3
    assert content_length([5, 6, 1], [1]) == 2  # the end token of those without padding
    assert content_length([BEGIN, 5, END], [BEGIN, END, END]) == 2  # the window is full
    ids, null, _ = LAYOUTS["several"]
    assert content_length(ids, null) == 6  # before the end of the last encoder's


def encoded(concepts, denoiser=None, templates="a photo of {}, ink", **values):
    settings = EraseSettings(concepts=concepts, templates=templates, **values)
    return encode_prompts(settings, denoiser or ToyDenoiser())


def tokens(*texts, denoiser=None):
    return [prompt.tokens for prompt in (denoiser or ToyDenoiser()).encode(texts)]


def test_an_alternative_as_long_and_with_the_same_article_is_the_target_itself():
    for templates, concepts, expected in (
        ("a photo of {}, ink", "cat => dog", "a photo of dog, ink"),
        ("", "owl => umbrella", "a photo of an umbrella"),
        ("", "fire truck => palm tree", "a photo of a palm tree"),
    ):
        edit = encoded(concepts, templates=templates).targets[0]
        rows = tokens(expected)[0]
        assert any(torch.equal(part, rows) for part in edit.target.split(len(rows)))


def test_an_alternative_of_another_length_leaves_what_comes_before_as_it_is():
    for alternative in ("fire truck", "one two three"):
        (edit,) = encoded(f"cat => {alternative}", templates="a photo of {} here").targets
        torch.testing.assert_close(edit.target[:4], edit.source[:4], atol=1e-5, rtol=0)
        assert (edit.target[4:] - edit.source[4:]).norm(dim=1).min() > 0.1


def test_an_alternative_with_another_article_leaves_the_article_as_it_is():
    edit = encoded("owl => dog", templates="").targets[0]
    source, target, plain = (
        edit.source.split(12),
        edit.target.split(12),
        tokens("a photo of an owl")[0],
    )
    (place,) = [n for n, rows in enumerate(source) if torch.equal(rows, plain)]
    torch.testing.assert_close(target[place][:5], plain[:5], atol=1e-5, rtol=0)


def test_the_target_says_the_alternative_in_the_places_of_the_concept():
    """n_e + (a - n_a), its rows by their roles."""
    (edit,) = encoded("cat => fire truck", templates="a {} here").targets
    place, alternative, own = tokens("a thing here", "a fire truck here", "a plain thing here")
    # start a cat here end ...: the concept's last word stands for the replacement's last.
    roles = [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11]
    torch.testing.assert_close(edit.target, place + alternative[roles] - own[roles])


def test_of_a_removal_the_target_is_the_neutral_prompt_of_the_same_length():
    for concept, filler in (("cat", "thing"), ("fire truck", "plain thing")):
        prompts = encoded(concept)
        (expected,) = tokens(f"a photo of {filler}, ink")
        assert torch.equal(prompts.targets[0].target, expected)
        assert torch.equal(prompts.pairs[0].alternative.tokens, expected)
        torch.testing.assert_close(expected[:4], prompts.targets[0].source[:4])


def test_a_concept_of_more_words_than_any_filler_takes_the_longest():
    prompts = encoded("one two three four five six seven eight nine", templates="{}")
    (longest,) = tokens(FILLERS["object"][-1])
    assert torch.equal(prompts.pairs[0].alternative.tokens, longest)


def test_a_users_own_prompt_without_the_concept_is_the_target():
    templates = "sketch {} => sketch here"
    prompts = encoded("cat", templates=templates)
    (expected,) = tokens("sketch here")
    assert torch.equal(prompts.pairs[0].alternative.tokens, expected)
    assert torch.equal(prompts.targets[0].target, expected)


def test_eta_goes_beyond_the_target_away_from_the_concept():
    (plain,), (beyond,) = (encoded("cat => dog", eta=eta).targets for eta in (0.0, 0.5))
    torch.testing.assert_close(beyond.target, plain.target + 0.5 * (plain.target - plain.source))
    assert torch.equal(plain.target, tokens("a photo of dog, ink")[0])


def test_eta_counts_in_the_instant_form_and_nought_of_it_does_not():
    def factors(**values):
        values = {"concepts": "cat => dog", "captions": 40, "protection": 1.0, **values}
        settings = preset_settings("instant", **values)
        last = erase(settings, ToyDenoiser())
        edit = last.edit()
        return {name: edit.factors[name] @ edit.bases[name].T for name in edit.factors}

    usual, nought, half = factors(), factors(eta=0.0), factors(eta=0.5)
    assert all(torch.equal(usual[name], nought[name]) for name in usual)
    for name in usual:
        torch.testing.assert_close(half[name], 1.5 * usual[name], rtol=1e-2, atol=1e-4)


def test_the_rows_of_a_subject_are_its_last_token_and_the_end():
    for layout in (ToyDenoiser(), BareToy()):
        first, second = encoded("fire truck => owl\nPicasso", denoiser=layout).subjects
        rows, name = tokens("a photo of a fire truck", "a photo of Picasso", denoiser=layout)
        begin = 0 if isinstance(layout, BareToy) else 1
        assert torch.equal(first, rows[[begin + 5, begin + 6]])
        assert torch.equal(second, name[[begin + 3, begin + 4]])


class BareToy(ToyDenoiser):
    """As T5 without padding: words and an end token."""

    def token_ids(self, prompts):
        return [[i for i in ids[1:] if i != 1] + [1] for ids in super().token_ids(prompts)]

    def encode(self, prompts, together=False):
        return [Encoded(self._embed(ids)) for ids in self.token_ids(prompts)]
