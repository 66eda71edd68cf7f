"""Bad input is refused in words that help."""

import pytest
from concept_surgery.erase_core import EraseSettings, SettingsError, preset_settings
from concept_surgery.erase_core.prompts import TEMPLATES, prompt_pairs, with_article


@pytest.mark.parametrize(
    "values, words",
    [
        ({"concept": "  "}, "concept is empty"),
        ({"concept": "cat", "alternative": "Cat "}, "same: 'cat'"),
        ({"concept": "cat\ndog"}, "One concept at a time"),
        ({"concept": "cat", "steps": 0}, "steps must be between 1 and 10000, not 0"),
        ({"concept": "cat", "steps": 1.5}, "whole number, not 1.5"),
        ({"concept": "cat", "eta": float("nan")}, "finite number, not nan"),
        ({"concept": "cat", "kind": "person"}, "object, style"),
        ({"concept": "cat", "resolution": 100}, "multiple of 8, not 100"),
        ({"concept": "cat", "trajectories": 1}, "one to train on, one to check on"),
        ({"concept": 3}, "must be text, not 3"),
    ],
)
def test_settings_that_cannot_work(values, words):
    with pytest.raises(SettingsError, match=words.replace("(", r"\(")):
        EraseSettings(**values)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(SettingsError, match="balanced, thorough"):
        preset_settings("quick", concept="cat")


def test_given_values_go_over_the_preset():
    assert preset_settings("thorough", concept="cat", steps=7, rank=None).steps == 7
    assert preset_settings("thorough", concept="cat").steps == 160


@pytest.mark.parametrize("field", ["keep", "negative_prompts"])
@pytest.mark.parametrize("prompt", ["cat", "A photo of a  CAT"])
def test_a_kept_prompt_that_is_to_be_erased(field, prompt):
    with pytest.raises(SettingsError, match="Both can't hold"):
        prompt_pairs(EraseSettings(concept="cat", **{field: prompt}))


def test_lines_are_cleaned():
    kept = EraseSettings(concept="cat", keep="a dog\n\n  a  Dog \na tree").keep
    assert kept == ("a dog", "a tree")


def test_every_template_names_the_concept_only_where_it_should():
    for templates in TEMPLATES.values():
        for template in templates:
            assert template.fill("zebra").count("zebra") == 1
            assert "{" not in template.without


@pytest.mark.parametrize(
    "concept, expected",
    [
        ("cat", "a cat"),
        ("owl", "an owl"),
        ("Van Gogh", "Van Gogh"),
        ("cats", "cats"),
        ("bus", "a bus"),
        ("the moon", "the moon"),
    ],
)
def test_articles(concept, expected):
    assert with_article(concept) == expected
