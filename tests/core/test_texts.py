"""What people type is read as it is meant, refused in words, or warned about."""

import re
import time

import pytest
from concept_surgery.erase_core import EraseSettings, SettingsError, preset_settings
from concept_surgery.erase_core.run.plan import MANY_EVALUATIONS, cost_warning
from concept_surgery.erase_core.settings.prompts import prompt_pairs, prompt_warnings
from concept_surgery.erase_core.settings.texts import (
    MOST_CHARACTERS,
    MOST_CONCEPTS,
    MOST_LINES,
    Concept,
    concept_names,
    concept_values,
    distinct_lines,
    parse_concepts,
    refuse_unfinished,
)

CAT_TO_DOG = (Concept("cat", "dog"),)


@pytest.mark.parametrize("arrow", ["=>", "->", "-->", "→", "⇒", "==>", "—>", "＝＞", "~>", "⟶"])
@pytest.mark.parametrize("line", ["cat {} dog", "cat{}dog", " cat  {}dog "])
def test_arrows_of_every_shape_are_read_alike(arrow, line):
    assert parse_concepts(line.format(arrow)) == CAT_TO_DOG
    assert concept_names(line.format(arrow)) == ("cat",)


@pytest.mark.parametrize("tag", [":->", ">_<", "x->:", "<|>_<|>", ";->"])
def test_emoticons_are_no_arrows(tag):
    assert parse_concepts(tag) == (Concept(tag),)


@pytest.mark.parametrize("line", ["cat -> dog => owl", "-> dog", "→", "cat => dog -> owl"])
def test_lines_with_an_arrow_too_many_are_refused(line):
    with pytest.raises(SettingsError, match="can't be read|Nothing to erase") as refusal:
        parse_concepts(line)
    assert refusal.value.setting == "concepts"


@pytest.mark.parametrize("nothing", ["none", "None", "nothing", "NULL", ""])
def test_nothing_in_a_concepts_place(nothing):
    assert parse_concepts(f"cat => {nothing}") == (Concept("cat"),)
    assert parse_concepts("cat", nothing) == (Concept("cat"),)


def test_a_replacement_for_all_lines():
    assert parse_concepts("cat", "=> dog") == CAT_TO_DOG
    assert parse_concepts("cat\npizza =>", "dog") == (*CAT_TO_DOG, Concept("pizza"))
    for given in ("dog\nowl", "cat -> dog"):
        with pytest.raises(SettingsError, match="under 'erase'") as refusal:
            parse_concepts("cat", given)
        assert refusal.value.setting == "replace_with"


@pytest.mark.parametrize("line", ["cat =>", "dog -> owl\ncat →", "cat | kitten =>  "])
def test_who_typed_a_line_that_ends_with_its_arrow_is_asked(line):
    with pytest.raises(SettingsError, match="names nothing after the arrow. Write") as refusal:
        refuse_unfinished(line)
    assert refusal.value.setting == "concepts"
    refuse_unfinished("cat => none\n# cat =>\ncat\n=> dog\n:->")


def test_comments_and_empty_links_are_no_prompts():
    assert parse_concepts("# animals\ncat => dog\n#\n## end") == CAT_TO_DOG
    assert distinct_lines("keep", "# people\nan old man\n#1girl") == ("an old man", "#1girl")
    assert EraseSettings(concepts="cat", keep="None", negative_prompts=None).keep == ()
    for nothing in ("None", None, "# cat", []):
        with pytest.raises(SettingsError, match="Nothing to erase") as refusal:
            parse_concepts(nothing)
        assert refusal.value.setting == "concepts"


@pytest.mark.parametrize("name", ["concepts", "keep", "negative_prompts", "templates"])
@pytest.mark.parametrize("value", [5, {"text": "cat"}, [3], object()])
def test_what_is_no_text_is_refused_at_its_setting(name, value):
    with pytest.raises(SettingsError, match="must be text, not ") as refusal:
        EraseSettings(**{"concepts": "cat", name: value})
    assert refusal.value.setting == name and len(str(refusal.value)) < 200


@pytest.mark.parametrize("name", ["concepts", "keep", "negative_prompts", "templates", "layers"])
def test_half_of_a_character_is_refused_at_its_setting(name):
    with pytest.raises(SettingsError, match=r"half of a character in it: 'cat \\ud83d'") as refusal:
        EraseSettings(**{"concepts": "owl", name: "cat \ud83d"})
    assert refusal.value.setting == name
    assert EraseSettings(concepts="🐱 => 🐶").concepts == (Concept("🐱", "🐶"),)


@pytest.mark.parametrize(
    "text, several",
    [("cat, pizza", "'cat', 'pizza'"), ("cat; pizza ;", "'cat', 'pizza'")],
)
def test_several_concepts_on_a_line_are_warned_about(text, several):
    (warning,) = prompt_warnings(EraseSettings(concepts=text))
    assert "erased as one phrase. If you mean 2 concepts" in warning and several in warning
    assert "If they are names of one: cat | pizza" in warning
    assert not prompt_warnings(EraseSettings(concepts="red car,\nVan Gogh"))


@pytest.mark.parametrize(
    "text, concept",
    [
        ("cat | kitten | tomcat => dog", Concept("cat", "dog", also=("kitten", "tomcat"))),
        ("cat|kitten", Concept("cat", also=("kitten",))),
        (" cat |  kitten  | ", Concept("cat", also=("kitten",))),
        ("cat | kitten | kitten", Concept("cat", also=("kitten",))),
        ("|_|", Concept("|_|")),
        (":| => :)", Concept(":|", ":)")),
    ],
)
def test_a_concept_may_have_several_names(text, concept):
    assert parse_concepts(text) == (concept,)
    assert parse_concepts([concept_values(concept)]) == (concept,)
    assert parse_concepts(str(concept)) == (concept,)
    assert concept.names == (concept.text, *concept.also)


@pytest.mark.parametrize(
    "text, words",
    [
        ("cat | kitten\nkitten", "'kitten' is named twice"),
        ("cat | Cat", "'Cat' is named twice"),
        ("cat | kitten => kitten", "what replaces it are the same: 'kitten'"),
        ("cat | kitten => dog | puppy", "Only what is erased can have several names"),
        ("dog => kitten\ncat | kitten", "replaced by 'kitten', which is to be erased itself"),
    ],
)
def test_names_that_contradict_each_other_are_refused(text, words):
    with pytest.raises(SettingsError, match=words) as refusal:
        parse_concepts(text)
    assert refusal.value.setting == "concepts"


def test_every_name_stands_in_every_phrase_and_counts_as_erased():
    settings = EraseSettings(concepts="cat | kitten => dog\npizza", templates="a {}\n{} here")
    pairs = prompt_pairs(settings)
    assert [pair.erased for pair in pairs[:4]] == ["a cat", "cat here", "a kitten", "kitten here"]
    assert [pair.concept for pair in pairs] == [0] * 4 + [1] * 2
    with pytest.raises(SettingsError, match="'kitten' stands under keep"):
        prompt_pairs(EraseSettings(concepts="cat | kitten", keep=("kitten",)))
    assert concept_names("cat | kitten => dog") == ("cat", "kitten")


def test_a_concept_with_one_name_is_written_as_it_was_before_there_could_be_more():
    one, two = (EraseSettings(concepts=text).as_dict()["concepts"] for text in ("cat", "cat | kit"))
    assert one == [{"text": "cat", "alternative": "", "kind": ""}]
    assert two == [{"text": "cat", "alternative": "", "kind": "", "also": ["kit"]}]


def test_a_line_that_is_meant_to_be_left_out_is_warned_about():
    (warning,) = prompt_warnings(EraseSettings(concepts="cat\n#pizza"))
    assert "'#pizza' is erased with its #" in warning and "'# pizza'" in warning
    assert not prompt_warnings(EraseSettings(concepts="#unicus", kind="tags"))


@pytest.mark.parametrize(
    "name, values, words",
    [
        ("concepts", {"concepts": "\n".join(f"thing{n}" for n in range(254))}, "At most 100 "),
        ("keep", {"keep": "\n".join(map(str, range(4000)))}, "500 lines at most, not 4000"),
        ("keep", {"keep": "a" * (MOST_CHARACTERS + 1)}, "Line 1 of keep has 5,001 characters"),
        ("templates", {"templates": [f"{{}} {n}" for n in range(500)]}, "5,500 prompts"),
        ("trajectories", {"trajectories": 12, "steps": 1}, "22 for 11, not 12"),
        ("captions", {"captions": 7}, "captions must be between 8 and"),
        ("protection", {"protection": True}, "finite number, not True"),
        ("preset", {"preset": "quick"}, "Unknown preset 'quick'"),
        ("form", {"layers": "value", "form": "firm"}, "Unknown form"),
        ("layers", {"layers": "most"}, "Unknown layers"),
        ("resolution", {"resolution": 100}, "multiple of 8"),
        ("keep", {"keep": "thing3"}, "stands under keep and is also a prompt"),
        ("negative_prompts", {"negative_prompts": "THING3"}, "stands under negative prompts"),
    ],
)
def test_a_refusal_names_its_setting(name, values, words):
    eleven = {"concepts": [f"thing{n}" for n in range(11)], "preset": "balanced"}
    with pytest.raises(SettingsError, match=re.escape(words)) as refusal:
        prompt_pairs(preset_settings(**{**eleven, **values}))
    assert refusal.value.setting == name


def test_as_many_concepts_as_are_allowed_fit_every_preset():
    names = [f"thing{n}" for n in range(MOST_CONCEPTS)]
    for preset in ("instant", "balanced", "thorough"):
        settings = preset_settings(preset, concepts=names)
        assert len(prompt_pairs(settings)) == 12 * MOST_CONCEPTS
        assert not settings.steps or settings.trajectories >= 2 * MOST_CONCEPTS


def test_long_lists_are_read_at_once():
    lines = [f"a picture of thing number {n} " + "x" * 100 for n in range(MOST_LINES)]
    began = time.perf_counter()
    settings = preset_settings("balanced", concepts=[f"t{n}" for n in range(100)], keep=lines)
    prompt_pairs(settings)
    with pytest.raises(SettingsError, match="500 lines at most"):
        EraseSettings(concepts="cat", keep="\n".join(map(str, range(200_000))))
    # All pairs of lines compared took 19 s for 4,000; this takes hundredths.
    assert time.perf_counter() - began < 3


def test_a_run_of_hours_is_announced():
    usual = preset_settings("thorough", concepts="cat")
    assert not cost_warning(usual, 2000, 512)
    assert "10000 steps" in cost_warning(
        preset_settings("balanced", concepts="cat", steps=10_000), 60_000, 512
    )
    large = preset_settings("balanced", concepts="cat", resolution=4096)
    text = cost_warning(large, 900, 512)
    assert "4096 px" in text and "1,440 pictures" in text and "cancel it" in text
    assert not cost_warning(large, 900, 4096)
    assert cost_warning(usual, MANY_EVALUATIONS, 512)
