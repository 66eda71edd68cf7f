"""Erasures that were trained apart: joined by the node, and warned about where they are stacked."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from comfy_api.v0_0_2 import io
from concept_surgery.erase_core import Erasure, SettingsError
from concept_surgery.erase_core.artefact.language_store import LanguageStore
from concept_surgery.erase_core.artefact.results import ResultStore
from concept_surgery.erase_core.artefact.saving import save_erasure
from concept_surgery.erase_core.artefact.stack import (
    AppliedErasure,
    harm_text,
    stack_text,
    together_text,
)
from concept_surgery.erase_core.method.collateral import WordChanges
from concept_surgery.erase_core.method.protection import HARM
from concept_surgery.nodes import apply, messages, runs
from concept_surgery.nodes.apply import ApplyErasure, applied_to, apply_erasure, stack_changes
from concept_surgery.nodes.extension import ConceptSurgeryExtension
from concept_surgery.nodes.join import JoinErasures
from concept_surgery.nodes.schema import ErasureType
from concept_surgery.nodes.take_out import TakeConceptsOut
from concept_surgery.nodes.train import TrainErasure

from tools.environment import ROOT

from .tiny import relative_change, tokens_of, train, weights_hash

INSTANT = {"steps": 0, "trajectories": 0, "captions": 24}
TIGER = "a photo of a tiger"


@pytest.fixture(scope="module")
def pizza(loaded, store):
    return train(loaded, store, concepts="pizza => bread", keep=(TIGER,), **INSTANT)


@pytest.fixture(scope="module")
def castle(loaded, store):
    values = {"kind": "style", "keep": ("a boat",), "negative_prompts": ("blurry",)}
    return train(loaded, store, concepts="castle => tent", **values, **INSTANT)


@pytest.fixture
def shown(monkeypatch, tmp_path, store) -> list[str]:
    """What the nodes show, outside a graph, with a user folder of their own."""
    texts: list[str] = []
    monkeypatch.setattr(messages, "_send_text", lambda text, _: texts.append(text))
    for module in (apply, runs):
        monkeypatch.setattr(module, "language_store", lambda: store)
    monkeypatch.setattr(runs, "result_store", lambda node_id: ResultStore(tmp_path))
    fields = [("prompt", dict, None), ("unique_id", str, None)]
    for node in (ApplyErasure, JoinErasures, TrainErasure):
        hidden = dataclasses.make_dataclass("Hidden", fields)()
        monkeypatch.setattr(node, "hidden", hidden, raising=False)
    return texts


def joined(loaded, *erasures, **more):
    with torch.inference_mode():  # as the host runs nodes
        return JoinErasures.execute(*loaded, *erasures, **more).args


def test_the_joined_erasure_applies_saves_and_loads(loaded, pizza, castle, shown, tmp_path):
    model, clip = loaded
    before = weights_hash(model)
    erasure, report = joined(loaded, pizza, castle)
    assert erasure.concept == "pizza, castle"
    assert [concept["kind"] for concept in erasure.record["concepts"]] == ["", "style"]
    assert erasure.record["settings"]["keep"] == [TIGER, "a boat"]
    assert "Joined from 2 erasures: 'pizza', 'castle'." in report
    assert erasure.record["forward_equivalents"] == 0 and weights_hash(model) == before
    assert any("Reading" in text for text in shown)

    patched = apply_erasure(model, erasure, 1.0)
    exact = tokens_of(clip, ["", "blurry", *(k["text"] for k in _kept(erasure) if k["exact"])])
    assert max(relative_change(model, patched, tokens) for tokens in exact) <= 1e-5
    for text in ("a photo of a pizza", "a house in castle style"):
        assert relative_change(model, patched, tokens_of(clip, [text])[0]) > 0.02

    path = save_erasure(erasure, tmp_path / "loras", "both")
    loaded_again = Erasure.load(path)
    assert loaded_again.identity == erasure.identity and loaded_again.record == erasure.record
    less = TakeConceptsOut.execute(loaded_again, "pizza").args[0]
    assert less.concept == "castle" and less.parts["castle"] == erasure.parts["castle"]
    third, _ = joined(loaded, less, pizza)
    assert third.concept == "castle, pizza"


def test_the_same_is_not_solved_twice_and_train_gives_the_same(loaded, pizza, castle, shown):
    more = {f"erasure_{number}": None for number in range(3, 11)} | {"erasure_7": pizza}
    first, _ = joined(loaded, pizza, castle)
    second, report = joined(loaded, pizza, castle, **more)
    assert second.identity == first.identity and "Taken from the store" in report
    widgets = {"captions": 24, "preset": "instant", "resolution": 64, "keep": TIGER}
    alone, losses, report = TrainErasure.execute(*loaded, erase="pizza => bread", **widgets).args
    assert alone.identity == pizza.identity
    assert len(losses["loss"]) == 2 and "Nothing was sampled" in report


def _kept(erasure):
    return erasure.record["measures"]["kept"]


def with_record(erasure: Erasure, **changes) -> Erasure:
    """The same values scaled, with another record."""
    factors = {name: 0.9 * factor for name, factor in erasure.factors.items()}
    return Erasure(erasure.bases, factors, {**copy.deepcopy(dict(erasure.record)), **changes})


def test_what_cannot_be_joined_is_said_at_the_node(loaded, pizza, castle, shown):
    model, clip = loaded
    refused = {
        "No CLIP is connected": ((model, None), (pizza, castle)),
        "Only the erasure of 'pizza' is connected": (loaded, (pizza, pizza)),
        "different families.*'pizza' for SD1.x; 'castle' for SDXL": (
            loaded,
            (pizza, with_record(castle, family="SDXL")),
        ),
        "'castle' is in the soft form": (loaded, (pizza, with_record(castle, form="soft"))),
        "are for SD2, and the connected model is SD1.x": (
            loaded,
            (with_record(pizza, family="SD2"), with_record(castle, family="SD2")),
        ),
        "already has an erasure on it .'pizza'.*MODEL of the loader": (
            (apply_erasure(model, pizza, 1.0), clip),
            (pizza, castle),
        ),
    }
    for words, (given, erasures) in refused.items():
        with pytest.raises((ValueError, SettingsError), match=words):
            joined(given, *erasures)


def test_another_base_and_what_is_left_out_are_warned_about(loaded, pizza, castle, shown):
    elsewhere = {"name": "other.safetensors", "fingerprint": [9.0] * 4}
    settings = {**castle.record["settings"], "keep": ["a pizza on a table"]}
    _, report = joined(loaded, pizza, with_record(castle, base=elsewhere, settings=settings))
    for words in (
        "'castle' was made on other.safetensors. What it erases is solved anew",
        "'a pizza on a table' is no longer kept, because 'pizza' is erased",
    ):
        assert any(words in text for text in shown) and words in report


def test_stacking_with_clip_warns_with_the_figure(loaded, pizza, castle, shown, caplog):
    model, clip = loaded
    once = ApplyErasure.execute(model, pizza, 5.0, "merge", clip).args[0]
    assert not any("nobody named" in text for text in shown)
    twice = ApplyErasure.execute(once, castle, 5.0, "exact", clip).args[0]
    assert [(one.strength, one.erasure) for one in applied_to(twice)] == [
        (5.0, pizza),
        (5.0, castle),
    ]
    changes = stack_changes(twice, clip)
    assert changes.mean > HARM
    (together,) = [text for text in shown if text.startswith("These 2 erasures")]
    said = "Concept Surgery: "
    (warning,) = [text.removeprefix(said) for text in caplog.messages if "These 2" in text]
    assert f"together change words that nobody named by {changes.mean:.0%} (most: " in warning
    assert "Solve them together with Join Erasures, or lower their strengths." in warning
    assert together == shown[-1] and together.startswith(warning)
    assert "Exact beside all of them: the null prompt" in together

    shown.clear()
    weak = ApplyErasure.execute(apply_erasure(model, pizza, 0.1), castle, 0.1, "merge", clip)
    assert stack_changes(weak.args[0], clip).mean == pytest.approx(changes.mean / 50, rel=1e-3)
    assert not any(text.startswith("These") for text in shown)
    assert f"Words that nobody named change by {changes.mean / 50:.0%} on average" in shown[-1]


def test_without_clip_there_is_a_hint_and_no_hint_within_one_training(loaded, pizza, castle, shown):
    ApplyErasure.execute(apply_erasure(loaded[0], pizza, 1.0), castle, 1.0)
    assert "Join Erasures solves them together" in shown[-1]
    shown.clear()
    both, _ = joined(loaded, pizza, castle)
    parts = both.without(["pizza"]), both.without(["castle"])
    ApplyErasure.execute(apply_erasure(loaded[0], parts[0], 1.0), parts[1], 1.0)
    assert "Erased on this model" in shown[-1] and "Join" not in shown[-1]


def test_where_nothing_can_be_known_there_is_no_error(loaded, pizza, castle, shown, monkeypatch):
    def refuse(*_):
        raise apply.UnsupportedModelError("an inpainting model")

    monkeypatch.setattr(apply, "ComfyDenoiser", refuse)
    ApplyErasure.execute(apply_erasure(loaded[0], pizza, 1.0), castle, 1.0, "merge", loaded[1])
    assert "Join Erasures solves them together" in shown[-1]


def test_texts_of_a_stack():
    changes = WordChanges(("boat", "tree"), torch.tensor([0.5, 0.3]))
    soft = [AppliedErasure(name, name, "soft", (), "merge") for name in ("cat", "dog")]
    (text,) = harm_text(soft, changes)
    assert text == (
        "These 2 erasures together change words that nobody named by 40% (most: boat 50%, tree "
        "30%). Lower their strengths."
    )
    assert harm_text(soft, None) == [] and together_text(soft, None) == ""
    assert together_text(soft[:1], None) == "" and "Join" not in stack_text(soft)


def test_figures_come_from_the_store_or_from_the_held_out_words(loaded, pizza, castle, tmp_path):
    model, clip = loaded
    twice = apply_erasure(apply_erasure(model, pizza, 1.0), castle, 1.0)
    empty = LanguageStore(tmp_path / "none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "language_store", lambda: empty)
        read = stack_changes(twice, clip)
    assert 0 < read.mean < 1 and not len(empty) and len(read.texts) <= 40


def test_the_node_is_listed_with_its_inputs_and_its_help():
    import asyncio

    nodes = asyncio.run(ConceptSurgeryExtension().get_node_list())
    assert JoinErasures in nodes
    schema = JoinErasures.define_schema()
    erasures = [given for given in schema.inputs if isinstance(given, ErasureType.Input)]
    assert [given.id for given in erasures] == [f"erasure_{n}" for n in range(1, 11)]
    assert [given.optional for given in erasures] == [False] * 2 + [True] * 8
    assert all(given.tooltip for given in schema.inputs)
    assert isinstance(schema.inputs[1], io.Clip.Input)
    for node in nodes:
        assert (ROOT / "web" / "docs" / f"{node.define_schema().node_id}.md").is_file()
