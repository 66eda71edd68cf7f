"""The artefact: concepts taken out of it, and its parts."""

import copy

import pytest
import torch
from concept_surgery.erase_core import Erasure, erase, preset_settings, report_text
from concept_surgery.erase_core.artefact.erasure import ErasureError
from concept_surgery.erase_core.settings.texts import concept_names

from .toy import ToyDenoiser

SMALL = {"resolution": 32, "captions": 40, "trajectories": 8, "sampling_steps": 4, "steps": 6}


def trained(concepts, **values) -> Erasure:
    settings = preset_settings("balanced", concepts=concepts, **{**SMALL, **values})
    last = erase(settings, ToyDenoiser())
    return last


@pytest.fixture(scope="module")
def three() -> Erasure:
    return trained("cat => dog\npizza => bread\ncastle => tent")


def values_of(erasure: Erasure):
    return {name: erasure.delta(name).clone() for name in erasure.factors}


def test_what_is_left_is_as_it_was_trained(three):
    record, values = copy.deepcopy(three.record), values_of(three)
    less, pizza = three.without([" PIZZA"]), three.without(["cat", "castle"])
    assert less.concept == "cat, castle" and pizza.concept == "pizza"
    assert less.record["taken_out"] == ["pizza"]
    assert pizza.record["taken_out"] == ["cat", "castle"]
    for name, value in values.items():
        torch.testing.assert_close(less.delta(name) + pizza.delta(name), value)
        assert pizza.delta(name).norm() > 0.01 * value.norm()
    assert three.record == record and "taken_out" not in three.record
    assert all(torch.equal(three.delta(name), value) for name, value in values.items())


def test_the_smaller_erasure_says_so_and_survives_its_file(three, tmp_path):
    less = three.without(["pizza"])
    assert less.record["rank"] == less.rank < three.rank
    ends = [concept["columns"] for concept in less.record["concepts"]]
    assert ends[0][0] == 0 and ends[0][1] == ends[1][0] and ends[1][1] == less.rank
    text = report_text(less.record)
    assert "Taken out again: pizza." in text and "Erased cat (replaced by dog), castle" in text
    less.save(tmp_path / "less.safetensors")
    again = Erasure.load(tmp_path / "less.safetensors")
    assert again.identity == less.identity != three.identity and again.record == less.record
    last = again.without(["castle"])
    assert last.concept == "cat" and last.record["taken_out"] == ["pizza", "castle"]
    assert last.identity == three.without(["castle", "pizza"]).identity


def test_parts_are_recognised_in_what_is_left(three):
    less = three.without(["pizza"])
    assert list(three.parts) == ["cat", "pizza", "castle"]
    assert len(set(three.parts.values())) == 3
    assert less.parts == {text: three.parts[text] for text in ("cat", "castle")}
    assert three.without(["cat", "castle"]).parts == {"pizza": three.parts["pizza"]}
    assert not set(trained("cat => dog").parts.values()) & set(three.parts.values())


def changes_of(*erasures: Erasure):
    """B and R as they are among a host's patches."""
    return {
        name: [(erasure.factors[name], erasure.bases[name]) for erasure in erasures]
        for name in erasures[0].factors
    }


def test_concepts_are_found_in_other_changes_by_their_values(three):
    less, pizza = three.without(["pizza"]), three.without(["cat", "castle"])
    whole, texts = changes_of(three), ["cat", "pizza", "castle"]
    assert three.concepts_in(whole) == texts
    assert less.concepts_in(whole) == ["cat", "castle"] and pizza.concepts_in(whole) == ["pizza"]
    assert three.concepts_in(changes_of(less)) == ["cat", "castle"]
    assert pizza.concepts_in(changes_of(less)) == [] == less.concepts_in(changes_of(pizza))
    rounded = {
        name: [(b.bfloat16().float(), r.half().float()) for b, r in changes]
        for name, changes in changes_of(pizza, less).items()
    }
    assert three.concepts_in(rounded) == texts
    name = next(iter(whole))
    assert three.concepts_in({name: whole[name], "elsewhere": whole[name]}) == texts


def test_other_changes_hold_no_concepts(three):
    alike = [trained("cat => dog", seed=1), trained("cat => dog", captions=41), three]
    for one in alike:
        for other in alike:
            if one is not other:
                assert one.concepts_in(changes_of(other)) == []
    strangers = {
        name: [
            (torch.randn(b.shape), r),  # the same R, as erasures of one model nearly have
            (b, torch.randn(r.shape)),
            (-b, r),
            (2 * b, r),
            (torch.zeros_like(b), torch.zeros_like(r)),
            (b[:, :1], r[:, :1]),
            (b[:, 1:], r[:, :-1]),
            (b[1:], r),
        ]
        for name, ((b, r),) in changes_of(three).items()
    }
    assert three.without(["pizza", "castle"]).concepts_in(strangers) == []
    nothing = Erasure(
        three.bases, {n: torch.zeros_like(b) for n, b in three.factors.items()}, three.record
    )
    assert nothing.concepts_in(changes_of(nothing)) == nothing.concepts_in({}) == []


def test_what_cannot_be_taken_out_is_said(three):
    with pytest.raises(ErasureError, match="'bird' is not among .* cat, pizza, castle"):
        three.without(["cat", "bird"])
    with pytest.raises(ErasureError, match="Nothing would be left"):
        three.without(["cat", "pizza", "castle"])
    assert three.without([]) is three
    soft = trained("cat => dog\npizza => bread", form="soft")
    assert set(soft.parts.values()) == {soft.identity}
    with pytest.raises(ErasureError, match="can't be told apart"):
        soft.without(["pizza"])


def test_names_of_concepts_are_read_as_they_were_typed():
    assert concept_names("cat => dog\n\n  Van Gogh \nCAT") == ("cat", "Van Gogh")
    assert concept_names(" \n => ") == ()
