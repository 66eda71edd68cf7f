"""Erasures that were solved apart, solved anew together, on a toy model."""

import copy
import dataclasses

import pytest
import torch
from concept_surgery.erase_core import EraseSettings, SettingsError, erase, preset_settings
from concept_surgery.erase_core.artefact.record import record_problem
from concept_surgery.erase_core.artefact.together import (
    changes_together,
    kind_together,
    settings_together,
    warnings_together,
)
from concept_surgery.erase_core.method.collateral import together
from concept_surgery.erase_core.method.encoded import encode_prompts
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.settings.prompts import (
    FILLERS,
    TEMPLATES,
    prompt_pairs,
    prompt_warnings,
)
from concept_surgery.erase_core.settings.texts import Concept, concept_values, parse_concepts

from .toy import ToyDenoiser

SMALL = {"resolution": 32, "captions": 40}


def solved(settings: EraseSettings, cache=None):
    last = erase(settings, ToyDenoiser(), cache)
    return last


def instant(**values):
    return solved(preset_settings("instant", **{**SMALL, **values}))


@pytest.fixture(scope="module")
def cats():
    return instant(concepts="cat => dog\nowl", keep=("a tiger", "a boat"), rank=12)


@pytest.fixture(scope="module")
def cubism():
    return instant(
        concepts="cubism",
        kind="style",
        keep=("a Boat", "a house"),
        negative_prompts=("blurry",),
        eta=0.5,
        rank=8,
    )


def record(concepts="cat => dog", form="hard", family="SD1.x", **settings):
    """A record with no more than what is needed, as of an older version."""
    named = [concept_values(c) for c in parse_concepts(concepts)]
    return {"family": family, "form": form, "concepts": named, "settings": settings}


def test_a_concept_keeps_its_own_kind():
    given = [Concept("cat", "dog", "tags"), {"text": "owl", "kind": "style"}, "car", Concept("bus")]
    concepts = parse_concepts(given, "boat")
    assert [(c.alternative, c.kind) for c in concepts] == [
        ("dog", "tags"),
        ("boat", "style"),
        ("boat", ""),
        ("boat", ""),
    ]
    assert parse_concepts(concepts) == concepts
    settings = EraseSettings(concepts=concepts, kind="person")
    assert EraseSettings(**settings.as_dict()) == settings
    with pytest.raises(SettingsError, match="Unknown kind 'painter' of 'Monet'.*object, style"):
        EraseSettings(concepts=[Concept("Monet", kind="painter")])


def test_each_concept_has_the_phrases_of_its_kind():
    mixed = [
        Concept("cat"),
        Concept("pop art style", kind="style"),
        Concept("owl_(bird)", "", "tags"),
    ]
    settings = EraseSettings(concepts=mixed)
    pairs = prompt_pairs(settings)
    for index, kind in enumerate(("object", "style", "tags")):
        own = [pair for pair in pairs if pair.concept == index]
        assert len(own) == len(TEMPLATES[kind])
        alone = prompt_pairs(EraseSettings(concepts=[mixed[index].text], kind=kind))
        assert [pair.erased for pair in own] == [pair.erased for pair in alone]
        assert own[0].neutral == alone[0].neutral and len(own[0].neutral) == len(FILLERS[kind])
    assert "a painting in pop art style" in [pair.erased for pair in pairs]
    assert len(prompt_warnings(settings)) == 1 and "owl_(bird)" in prompt_warnings(settings)[0]
    phrased = prompt_pairs(EraseSettings(concepts=mixed, templates=("look, {}",)))
    assert [pair.erased for pair in phrased] == ["look, cat", "look, pop art", "look, owl_(bird)"]


def test_what_is_asked_for_together(cats, cubism):
    settings = settings_together([cats.record, cubism.record], seed=7)
    assert settings.concepts == (
        Concept("cat", "dog"),
        Concept("owl"),
        Concept("cubism", kind="style"),
    )
    assert settings.kind == "object"
    assert settings.keep == ("a tiger", "a boat", "a house")
    assert settings.negative_prompts == ("blurry",)
    assert (settings.steps, settings.trajectories, settings.form) == (0, 0, "hard")
    assert (settings.rank, settings.eta, settings.seed) == (12, 0.5, 7)
    assert (settings.resolution, settings.captions) == (32, 40)
    assert settings.protection is None and settings.layers == "key-value"
    (about_eta,) = warnings_together([cats.record, cubism.record])
    assert "different eta (0, 0.5)" in about_eta and "the largest: 0.5" in about_eta


def test_joined_is_what_one_run_of_all_concepts_gives(cats, cubism):
    joined = solved(settings_together([cats.record, cubism.record]))
    concepts = [Concept("cat", "dog"), Concept("owl"), Concept("cubism", "", "style")]
    keep, negative = ("a tiger", "a boat", "a house"), ("blurry",)
    both = instant(concepts=concepts, keep=keep, negative_prompts=negative, rank=12, eta=0.5)
    assert joined.identity == both.identity
    assert not record_problem(joined.record, joined.rank)
    moved = [concept["keys_and_values_moved"] for concept in joined.record["concepts"]]
    assert min(moved) > 0.6
    assert [concept["kind"] for concept in joined.record["concepts"]] == ["", "", "style"]
    again = settings_together([joined.record, record("rug", kind="object")])
    assert again.concepts == (
        *settings_together([cats.record, cubism.record]).concepts,
        Concept("rug"),
    )


def test_a_concept_can_be_taken_out_of_what_is_joined_and_before(cats, cubism):
    joined = solved(settings_together([cats.record, cubism.record]))
    less = joined.without(["owl"])
    assert less.concept == "cat, cubism" and less.parts["cubism"] == joined.parts["cubism"]
    settings = settings_together([cats.without(["cat"]).record, cubism.record])
    assert [concept.text for concept in settings.concepts] == ["owl", "cubism"]


def test_the_same_concept_is_solved_once_and_two_ends_are_refused():
    records = [record("cat => dog\nowl"), record("A Cat => dog"), record("CAT => Dog")]
    concepts = settings_together(records).concepts
    assert [concept.text for concept in concepts] == ["cat", "owl", "A Cat"]
    with pytest.raises(SettingsError, match="'cat' is erased twice.*by 'dog' in.*by nothing"):
        settings_together([record("cat => dog"), record("cat")])
    with pytest.raises(SettingsError, match="'cat' is replaced by 'dog' in one.*erased in another"):
        settings_together([record("cat => dog"), record("Dog => rabbit")])


def test_what_one_keeps_and_another_erases_is_no_longer_kept():
    kept = ("a tiger in the snow", "a photo of an owl", "a cat on a sofa", "a boat")
    cat = record("cat", keep=list(kept), negative_prompts=["tiger", "tiger, blurry"])
    records = [cat, record("tiger => lion"), record("owl", keep=["A BOAT"])]
    settings = settings_together(records)
    assert settings.keep == ("a cat on a sofa", "a boat")
    assert settings.negative_prompts == ("tiger, blurry",)
    prompt_pairs(settings)  # no contradiction is left
    warnings = warnings_together(records)
    assert len(warnings) == 3 and "'a tiger in the snow' is no longer kept" in warnings[0]
    assert "because 'owl' is erased" in warnings[1] and warnings[2].startswith("'tiger' ")
    both = record("cat\nlynx", keep=["a lynx in the snow"])
    assert settings_together([both, record("lynx")]).keep == ("a lynx in the snow",)
    assert settings_together([both, record("snow")]).keep == ()


def test_own_phrases_are_used_where_all_have_the_same():
    own = {"templates": ["look, {}"]}
    assert settings_together([record(**own), record("owl", **own)]).templates == ("look, {}",)
    records = [record(**own), record("owl")]
    assert settings_together(records).templates == ()
    assert "different phrases" in warnings_together(records)[0]


def test_old_records_and_kinds():
    settings = settings_together([record(), record("owl", kind="tags")])
    assert settings.kind == kind_together([record(), record("owl", kind="tags")]) == "tags"
    assert settings.concepts == (Concept("cat", "dog", "object"), Concept("owl"))
    assert (settings.rank, settings.captions) == (EraseSettings.rank, EraseSettings.captions)
    sdxl = settings_together([record(family="SDXL"), record("owl", family="SDXL")])
    assert sdxl.resolution == 1024
    sd3 = [record(name, family="SD3", layers="text-input") for name in ("cat", "owl")]
    assert settings_together(sd3).layers == "text-input"


@pytest.mark.parametrize(
    "records, words",
    [
        ([], "at least two erasures, and there are 0"),
        ([record()], "at least two erasures, and there are 1"),
        ([record(), record("owl", family="SDXL")], "'cat' for SD1.x; 'owl' for SDXL"),
        ([record(), record("owl", form="soft")], "'owl' is in the soft form"),
        ([record(), {"family": "SD1.x", "form": "hard"}], "names no concepts"),
    ],
)
def test_what_cannot_be_joined_is_said(records, words):
    for ask in (settings_together, warnings_together):
        with pytest.raises(SettingsError, match=words):
            ask(records)


def test_the_sum_of_edits_is_both_at_once(cats, cubism):
    toy, strengths = ToyDenoiser(), (1.0, -0.5)
    summed = together(list(zip([cats.edit(), cubism.edit()], strengths, strict=True)))
    for name, factor in summed.factors.items():
        delta = strengths[0] * cats.delta(name) + strengths[1] * cubism.delta(name)
        torch.testing.assert_close(factor @ summed.bases[name].T, delta)
    assert len({id(basis) for basis in summed.bases.values()}) == 1
    x, sigma = torch.randn(1, 4, 4, 4), torch.ones(1)
    prompts = toy.encode(["a cat in cubism style"])
    at_once = toy.predict_x0(x, sigma, prompts, summed)
    weights = dict(toy.matrices())
    for name, weight in weights.items():
        weight.add_(strengths[0] * cats.delta(name) + strengths[1] * cubism.delta(name))
    torch.testing.assert_close(at_once, toy.predict_x0(x, sigma, prompts))


def test_the_sum_of_edits_of_different_matrices():
    one = LowRankEdit({"a": torch.eye(3, 1)}, {"a": torch.ones(2, 1)})
    two = LowRankEdit.shared(torch.eye(3, 2), {"a": torch.ones(2, 2), "b": torch.ones(4, 2)})
    summed = together([(one, 2.0), (two, 1.0)])
    assert summed.bases["a"].shape == (3, 3) and summed.bases["b"].shape == (3, 2)
    expected = torch.tensor([[3.0, 1.0, 0.0]] * 2)
    torch.testing.assert_close(summed.factors["a"] @ summed.bases["a"].T, expected)


def moved_by(edit: LowRankEdit, settings: EraseSettings) -> list[float]:
    """How far each concept's keys and values go."""
    toy, moved = ToyDenoiser(), []
    for tokens in encode_prompts(settings, toy).targets:
        rest = way = 0.0
        for name, weight in toy.matrices().items():
            asked = tokens.change.float() @ weight.T / weight.norm()
            done = tokens.source @ edit.bases[name] @ edit.factors[name].T / weight.norm()
            rest, way = rest + (done - asked).square().sum(), way + asked.square().sum()
        moved.append(float(1 - rest / way))
    return moved


def test_apart_they_are_in_each_others_way_and_joined_they_are_not():
    """And what nobody named changes less, under the same protection."""
    names = ("cat => dog", "pizza => bread", "castle => tent", "owl => pigeon")
    erasures = [instant(concepts=name, protection=3.0) for name in names]
    settings, toy = settings_together([one.record for one in erasures]), ToyDenoiser()
    joined = solved(dataclasses.replace(settings, protection=3.0))
    applied = [(one, 1.0) for one in erasures]
    apart = changes_together(applied, toy, toy.matrices())
    after = changes_together([(joined, 1.0)], toy, toy.matrices())
    assert after.mean < apart.mean
    summed = together([(one.edit(), 1.0) for one in erasures])
    assert min(moved_by(summed, settings)) < 0.8
    assert min(moved_by(joined.edit(), settings)) > 0.85


def test_the_change_is_the_one_that_a_run_reports(cats, cubism):
    """Whether ordinary language is cached or only its held-out words are read."""
    toy, cache = ToyDenoiser(), {}
    joined = solved(settings_together([cats.record, cubism.record]), cache)
    after = changes_together([(joined, 1.0)], toy, toy.matrices(), cache)
    assert after.mean == pytest.approx(joined.record["others"]["change"], rel=0.02)
    read = changes_together([(joined, 1.0)], toy, toy.matrices())
    assert read.mean == pytest.approx(after.mean, rel=0.05)
    assert not {"cat", "dog", "owl", "cubism"} & set(read.texts)


def test_strengths_count(cats, cubism):
    toy = ToyDenoiser()
    whole, half = (
        changes_together([(cats, strength), (cubism, strength)], toy, toy.matrices())
        for strength in (1.0, 0.5)
    )
    assert half.mean == pytest.approx(whole.mean / 2)


def test_only_the_held_out_words_are_read_where_nothing_is_cached(cats, cubism, monkeypatch):
    toy, asked = ToyDenoiser(), []
    encode = toy.encode
    monkeypatch.setattr(toy, "encode", lambda texts, **more: asked.append(texts) or encode(texts))
    assert changes_together([(cats, 1.0), (cubism, 1.0)], toy, toy.matrices(), {}).mean > 0
    assert sum(map(len, asked)) <= 40 and toy.calls == 0


def test_unknown_changes_are_not_made_up(cats, cubism):
    toy = ToyDenoiser()
    applied = [(cats, 1.0), (cubism, 1.0)]
    assert changes_together(applied, toy, {"toy_attn1_to_q": torch.ones(2, 96)}) is None
    assert changes_together(applied, toy, {"toy_attn2_to_k": torch.ones(2, 32)}) is None
    strange = copy.copy(cats)
    object.__setattr__(strange, "record", {**cats.record, "family": "Mochi"})
    assert changes_together([(strange, 1.0)], toy, toy.matrices()) is None


def test_concepts_that_share_a_name_are_one_with_all_their_names():
    first, second = record("cat | kitten => dog"), record("kitten | tomcat => dog\npizza")
    joined = settings_together([first, second]).concepts
    assert list(map(str, joined)) == ["cat | kitten | tomcat => dog", "pizza"]
    with pytest.raises(SettingsError, match="'kitten' is erased twice with different ends"):
        settings_together([first, record("kitten => fox")])
