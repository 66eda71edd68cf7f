"""Bad input is refused in words that help."""

import json
import re

import pytest
from concept_surgery.erase_core import EraseSettings, SettingsError, preset_settings
from concept_surgery.erase_core.settings.families import FAMILIES
from concept_surgery.erase_core.settings.layers import (
    LAYER_RULES,
    PROMPT_RULES,
    LayerRuleError,
    matching,
    reads_prompt,
)
from concept_surgery.erase_core.settings.prompts import (
    TEMPLATES,
    prompt_pairs,
    prompt_warnings,
    with_article,
)
from concept_surgery.erase_core.settings.texts import Concept, parse_concepts
from concept_surgery.erase_core.settings.widgets import settings_of


@pytest.mark.parametrize(
    "values, words",
    [
        ({"concepts": "  "}, "concept is empty"),
        ({"concepts": "cat => Cat "}, "same: 'cat'"),
        ({"concepts": "cat => dog => owl"}, "can't be read"),
        ({"concepts": "=> dog"}, "can't be read"),
        ({"concepts": "cat\ndog\n CAT"}, "'CAT' is named twice"),
        ({"concepts": "cat => dog\ndog"}, "which is to be erased itself"),
        ({"concepts": "cat", "steps": -2}, "steps must be between 0 and 10000, not -2"),
        ({"concepts": "cat", "steps": 1.5}, "whole number, not 1.5"),
        ({"concepts": "cat", "eta": float("nan")}, "finite number, not nan"),
        ({"concepts": "cat", "kind": "sound"}, "object, style, person, tags"),
        ({"concepts": "cat", "form": "firm"}, "hard, soft"),
        ({"concepts": "cat", "null_score": "lost"}, "frozen, student, detached"),
        ({"concepts": "cat", "resolution": 100}, "multiple of 8, not 100"),
        ({"concepts": "cat", "trajectories": 1}, "one to train on and one to check on"),
        ({"concepts": ["cat", 3]}, "must be text, not 3"),
        ({"concepts": "cat", "layers": "attention"}, "Choose the soft form"),
        ({"concepts": "cat", "form": "soft", "layers": "some"}, "key-value, cross-attention"),
        ({"concepts": "cat", "form": "soft", "steps": 0}, "no instant variant"),
        ({"concepts": "cat", "templates": "a photo"}, "has no {} where the concept stands"),
    ],
)
def test_settings_that_cannot_work(values, words):
    with pytest.raises(SettingsError, match=re.escape(words)):
        EraseSettings(**values)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(SettingsError, match="instant, balanced, thorough"):
        preset_settings("quick", concepts="cat")


def test_given_values_go_over_the_preset():
    assert preset_settings("thorough", concepts="cat", steps=7, rank=None).steps == 7
    assert preset_settings("thorough", concepts="cat").steps == 160


@pytest.mark.parametrize("field", ["keep", "negative_prompts"])
@pytest.mark.parametrize("prompt", ["cat", "A photo of a  CAT"])
def test_a_kept_prompt_that_is_to_be_erased(field, prompt):
    with pytest.raises(SettingsError, match="Both can't hold"):
        prompt_pairs(EraseSettings(concepts="cat", **{field: prompt}))


def test_lines_are_cleaned():
    kept = EraseSettings(concepts="cat", keep="a dog\n\n  a  Dog \na tree").keep
    assert kept == ("a dog", "a tree")


def test_concepts_are_read_line_by_line():
    found = EraseSettings(concepts="cat => dog\n\n pizza \nred car=>blue bicycle").concepts
    assert found == (Concept("cat", "dog"), Concept("pizza"), Concept("red car", "blue bicycle"))
    assert parse_concepts("cat\npizza => bread", "dog") == (
        Concept("cat", "dog"),
        Concept("pizza", "bread"),
    )
    assert EraseSettings(concepts=found).concepts == found
    again = EraseSettings(**json.loads(json.dumps(EraseSettings(concepts=found).as_dict())))
    assert again.concepts == found


def test_presets_know_the_form_and_the_model():
    instant = preset_settings("instant", concepts="cat")
    assert instant.steps == 0 and not instant.samples
    distilled = preset_settings("balanced", concepts="cat", distilled=True)
    assert distilled.guidance_scale == 1 and distilled.sampling_steps == 4
    soft = preset_settings("balanced", concepts="cat", form="soft")
    assert soft.steps > preset_settings("balanced", concepts="cat").steps


def test_a_run_grows_by_less_than_its_concepts():
    one = preset_settings("balanced", concepts="cat")
    ten = preset_settings("balanced", concepts=[f"thing{n}" for n in range(10)])
    assert one.trajectories < ten.trajectories < 10 * one.trajectories
    assert one.steps < ten.steps < 10 * one.steps
    assert preset_settings("balanced", concepts=["a", "b"], steps=5).steps == 5


def test_every_pair_knows_its_concept_and_its_alternative():
    pairs = prompt_pairs(EraseSettings(concepts="cat => dog\npizza"))
    assert len(pairs) == 2 * len(TEMPLATES["object"])
    assert all("cat" in p.erased and "dog" in p.alternative for p in pairs if p.concept == 0)
    removed = [p for p in pairs if p.concept == 1]
    assert all("pizza" in p.erased and not p.alternative for p in removed)
    assert all("pizza" not in text and "dog" not in text for p in removed for text in p.neutral)


def test_own_templates_replace_those_of_the_kind():
    lines = "a photo of {}, sunny\nsketch, {}, ink => sketch, ink pen\n{a} at night"
    settings = EraseSettings(concepts="owl", templates=lines.replace("{a}", "{}"))
    pairs = [(p.erased, p.alternative) for p in prompt_pairs(settings)]
    assert pairs == [
        ("a photo of owl, sunny", ""),  # the same prompt with a neutral word instead
        ("sketch, owl, ink", "sketch, ink pen"),
        ("owl at night", ""),
    ]


def test_brackets_that_the_host_reads_as_emphasis_are_said():
    tags = {"concepts": "saber (fate) => rin \\(fate\\)", "kind": "tags", "keep": "(sky:1.2)"}
    (warning,) = prompt_warnings(EraseSettings(**tags))
    assert "'saber (fate)'" in warning and r"saber \\(fate\\)" in warning
    assert prompt_warnings(EraseSettings(**{**tags, "kind": "object"})) == []


def test_tags_take_no_article():
    pairs = prompt_pairs(EraseSettings(concepts="cat_ears", kind="tags"))
    assert not [p for p in pairs if " a cat_ears" in p.erased]
    assert with_article("cat_ears") == "cat_ears"


@pytest.mark.parametrize("rule", LAYER_RULES)
def test_layer_rules_take_what_they_name(rule):
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
    names = [
        block + n for n in ("attn1_to_q", "attn2_to_q", "attn2_to_k", "attn2_to_v", "ff_net_2")
    ]
    sd3 = ["context_embedder", "joint_blocks_0_context_block_attn_qkv", "x_embedder_proj"]
    flux = ["txt_in", "double_blocks_0_txt_attn_qkv", "double_blocks_0_img_attn_qkv"]
    others = ["blocks_0_cross_attn_kv_linear", "blocks_0_attn_qkv", "y_embedder_y_proj_fc1"]
    names += [f"lora_unet_{name}" for name in (*sd3, *flux, *others)]
    taken = [name.removeprefix(block).removeprefix("lora_unet_") for name in matching(names, rule)]
    assert (
        taken
        == {
            "readers": ["attn2_to_k", "attn2_to_v", "context_embedder", "txt_in"],
            "first-readers": ["attn2_to_k", "attn2_to_v", "context_embedder", "txt_in"],
            "key-value": ["attn2_to_k", "attn2_to_v"],
            "cross-attention": ["attn2_to_q", "attn2_to_k", "attn2_to_v"],
            "attention": ["attn1_to_q", "attn2_to_q", "attn2_to_k", "attn2_to_v"],
            "transformer": ["attn1_to_q", "attn2_to_q", "attn2_to_k", "attn2_to_v", "ff_net_2"],
            "text-input": ["context_embedder", "txt_in"],
            "text-stream": [
                "joint_blocks_0_context_block_attn_qkv",
                "double_blocks_0_txt_attn_qkv",
            ],
            "prompt-fed": [
                "attn2_to_k",
                "attn2_to_v",
                "context_embedder",
                "joint_blocks_0_context_block_attn_qkv",
                "txt_in",
                "double_blocks_0_txt_attn_qkv",
                "blocks_0_cross_attn_kv_linear",
                "y_embedder_y_proj_fc1",
            ],
        }[rule]
    )
    assert all(map(reads_prompt, matching(names, rule))) == (rule in PROMPT_RULES)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_familys_defaults_make_settings_and_the_user_overrules_them(family):
    settings = preset_settings("balanced", family=family.defaults, concepts="cat")
    assert settings.form == "hard" and settings.layers in PROMPT_RULES
    assert settings.resolution == {"SD1.x": 512, "SD2": 512, "SD2 (v)": 768}.get(family.name, 1024)
    assert settings.guidance_scale == (1 if family.name == "Flux" else 5)
    given = {"resolution": 640, "form": "soft", "layers": "*_to_out"}
    own = preset_settings("balanced", family=family.defaults, concepts="cat", **given)
    assert (own.resolution, own.form, own.layers, own.steps) == (640, "soft", "*_to_out", 80)
    distilled = preset_settings("instant", family=family.defaults, distilled=True, concepts="cat")
    assert distilled.guidance_scale == 1 and distilled.steps == 0


def test_a_layer_rule_that_matches_nothing_lists_the_rules():
    with pytest.raises(LayerRuleError, match="key-value .* cross-attention .* transformer"):
        matching(["lora_unet_x_attn1_to_q"], "*_attn2_to_*")
    assert matching(["lora_unet_x_attn1_to_q"], "*_to_q") == ["lora_unet_x_attn1_to_q"]


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


def test_the_room_beside_kept_prompts_reaches_the_run():
    assert settings_of({"erase": "cat", "keep_room": 0.05}).keep_room == 0.05
    assert settings_of({"erase": "cat"}).keep_room == EraseSettings.keep_room
    with pytest.raises(SettingsError, match="0.25 is usual"):
        settings_of({"erase": "cat", "keep_room": 0})
