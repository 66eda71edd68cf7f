"""The whole engine on a toy model: cost, stop flag, errors, report."""

import math
import re

import pytest
import torch
from concept_surgery.erase_core import (
    Erasure,
    Finished,
    GradientError,
    PredictionError,
    Progress,
    TrainingError,
    erase,
    preset_settings,
    report_text,
)
from concept_surgery.erase_core.denoiser import Encoded
from concept_surgery.erase_core.engine import LEAST_MOVED
from concept_surgery.erase_core.language import (
    encode_language,
    naming,
    plain_captions,
    spread,
)
from concept_surgery.erase_core.states import EncodedPair, draw_pairs
from concept_surgery.erase_core.subspace import SubspaceError

from .toy import ToyDenoiser

SMALL = {"resolution": 32, "captions": 40, "trajectories": 8, "sampling_steps": 4, "steps": 20}


def run(denoiser=None, should_stop=lambda: False, **values):
    settings = preset_settings("balanced", **{"concepts": "cat => dog", **SMALL, **values})
    return list(erase(settings, denoiser or ToyDenoiser(), None, should_stop))


def test_progress_ends_at_the_planned_cost_and_every_call_is_counted():
    toy = ToyDenoiser()
    events = run(toy, keep=("a tree", "a boat"))
    progress = [event for event in events if isinstance(event, Progress)]
    assert isinstance(events[-1], Finished)
    done = [event.done for event in progress]
    assert done == sorted(done) and done[-1] == progress[-1].total
    record = events[-1].erasure.record
    assert record["forward_equivalents"] == toy.calls == progress[-1].total
    assert len(events[-1].losses) == record["steps_done"] == 20


def test_balanced_preset_stays_within_900_with_eight_keep_prompts():
    keep = tuple(f"thing {number}" for number in range(8))
    settings = {"steps": None, "trajectories": None, "sampling_steps": None}
    record = run(keep=keep, **settings)[-1].erasure.record
    assert record["forward_equivalents"] <= 900


def test_training_lowers_the_loss_it_starts_with():
    losses = run(steps=200)[-1].losses
    assert sum(losses[-40:]) < sum(losses[:40]) and max(losses[-40:]) < 1


def test_layers_that_read_more_than_the_prompt_are_held_by_plain_captions():
    """Without a ridge; they are sampled, trained along and counted like kept prompts."""
    toy = ToyDenoiser("*_to_out")
    whole, learned = toy.predict_x0, []

    def predict(x, sigma, prompts, edit=None):
        if edit is not None and torch.is_grad_enabled():
            learned.extend(prompts)
        return whole(x, sigma, prompts, edit)

    toy.predict_x0 = predict
    *progress, finished = run(toy, form="soft", layers="*_to_out")
    record = finished.erasure.record
    assert record["forward_equivalents"] == toy.calls == progress[-1].total
    assert list(finished.erasure.factors) == ["toy_attn2_to_out"]
    captions = {prompt.tokens.sum().item() for prompt in toy.encode(plain_captions(40))}
    along = {prompt.tokens.sum().item() for prompt in learned} & captions
    assert len(along) == 8
    assert record["measures"]["moved_held_out"]["overall"] > 0


def test_stop_flag_keeps_what_was_learned():
    answers = iter([False] * 5 + [True])
    finished = run(should_stop=lambda: next(answers))[-1]
    assert finished.erasure.record["steps_done"] == 5
    assert finished.erasure.record["stopped_early"]
    assert "Stopped early, after 5 steps" in report_text(finished.erasure.record)


def test_eta_is_warned_about():
    record = run(eta=1.0)[-1].erasure.record
    assert "negative prompt now draws it" in report_text(record)


def test_the_report_names_exact_and_approximate_prompts():
    keep = ("a tree", "nine quite different words that fill the window whole")
    keep += tuple(f"{n} p{n} q{n} r{n} s{n} t{n} u{n} v{n} w{n}" for n in range(8))
    record = run(keep=keep)[-1].erasure.record
    kinds = {entry["exact"] for entry in record["measures"]["kept"]}
    assert kinds == {True, False}
    text = report_text(record)
    assert "Kept 'a tree': exact" in text and ": approximate, drift" in text


def test_nan_is_said_and_ends_the_run():
    toy = ToyDenoiser()
    toy.out.weight[0, 0] = math.nan
    with pytest.raises(PredictionError, match="contains NaN"):
        run(toy)


def test_a_model_that_explodes_at_once_is_said(monkeypatch):
    toy = ToyDenoiser()
    whole = toy.predict_x0
    monkeypatch.setattr(
        toy,
        "predict_x0",
        lambda x, s, p, edit=None: whole(x, s, p, edit) * (1 if edit is None else math.inf),
    )
    with pytest.raises(GradientError, match="NaN or infinite before the first step"):
        run(toy, protection=1.0)


def test_training_that_diverges_ends_and_keeps_what_was_learned(monkeypatch):
    factor = 1.0

    def predict(self, x, sigma, prompts, edit=None):
        learning = edit is not None and torch.is_grad_enabled()
        return whole(self, x, sigma, prompts, edit) * (factor if learning else 1.0)

    whole = ToyDenoiser.predict_x0
    monkeypatch.setattr(ToyDenoiser, "predict_x0", predict)
    settings = preset_settings("balanced", concepts="cat => dog", **SMALL)
    for event in erase(settings, ToyDenoiser()):
        if getattr(event, "stage", "").startswith("Training, step 7"):
            factor = math.nan
    record = event.erasure.record
    assert record["steps_done"] == 7 and not record["complete"]
    assert "The loss became nan. Lower the learning rate" in report_text(record)
    factor = 1.0
    stopping = iter([False] * 6 + [True])  # the seventh step was the first one not to be trusted
    expected = run(should_stop=lambda: next(stopping))[-1].erasure
    assert event.erasure.identity == expected.identity


@pytest.mark.parametrize(
    "driven_by, drivers", [("both", {0, 1}), ("erased", {0}), ("alternative", {1})]
)
def test_trajectories_are_driven_by_the_prompts_asked_for(driven_by, drivers):
    pairs = [EncodedPair(*ToyDenoiser().encode([f"a {w}", "a dog"]), c) for c, w in enumerate("xy")]
    generator = torch.Generator().manual_seed(0)
    wanted = draw_pairs(pairs, 8, (4, 2, 2), generator, driven_by)
    for concept in (0, 1):
        own = [d for d, i in zip(wanted.driver, wanted.index, strict=True) if i == concept]
        assert len(own) == 4 and set(own) == drivers


def test_memory_that_runs_out_halves_the_batch_and_says_when_that_is_not_enough(monkeypatch):
    def limited(most_kept, most_alone):
        whole = ToyDenoiser.predict_x0

        def predict(self, x, sigma, prompts, edit=None):
            learning = edit is not None and torch.is_grad_enabled()
            if len(x) > (most_kept if learning else most_alone):
                raise RuntimeError("Some backend out of memory. Tried to allocate 2 GiB.")
            return whole(self, x, sigma, prompts, edit)

        monkeypatch.setattr(ToyDenoiser, "predict_x0", predict)

    usual = run(batch=4)[-1]
    limited(1, 5)
    halved = run(batch=4)[-1]
    monkeypatch.undo()
    assert halved.losses == pytest.approx(usual.losses, rel=1e-3)
    usual, halved = usual.erasure, halved.erasure
    assert halved.record["forward_equivalents"] >= usual.record["forward_equivalents"]
    for name in usual.factors:
        torch.testing.assert_close(usual.delta(name), halved.delta(name), rtol=1e-3, atol=1e-5)
    limited(0, 5)
    with pytest.raises(TrainingError, match="not enough memory to train, even one picture"):
        run(batch=4, protection=1.0)
    monkeypatch.undo()
    limited(1, 0)
    with pytest.raises(PredictionError, match="not enough memory to predict"):
        run(batch=4)


def test_a_model_that_ignores_the_prompt_has_nothing_to_erase():
    toy = ToyDenoiser()
    toy.out.weight.zero_()
    with pytest.raises(TrainingError, match="no guidance to change"):
        run(toy)


def test_more_concepts_than_the_embeddings_have_room_for_are_refused_by_name():
    def many(count):
        concepts = "\n".join(f"thing{i} => other{i}" for i in range(count))
        return list(
            erase(preset_settings("instant", concepts=concepts, captions=40), ToyDenoiser())
        )

    record = many(24)[-1].erasure.record
    assert min(c["keys_and_values_moved"] for c in record["concepts"]) >= LEAST_MOVED
    with pytest.raises(SubspaceError, match=r"of 'thing\d+' can be moved .* Erase fewer concepts"):
        many(80)


def test_an_erasure_survives_its_file(tmp_path):
    erasure = run()[-1].erasure
    erasure.save(tmp_path / "a.safetensors")
    again = Erasure.load(tmp_path / "a.safetensors")
    assert again.identity == erasure.identity and again.record == erasure.record
    torch.testing.assert_close(
        again.delta("toy_attn2_to_k"),
        erasure.factors["toy_attn2_to_k"] @ erasure.bases["toy_attn2_to_k"].T,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_captions_are_many_distinct_and_without_prompt_weights():
    captions = plain_captions()
    assert len(captions) >= 980 and len({c.casefold() for c in captions}) == len(captions)
    assert not [c for c in captions if "(" in c.replace("\\(", "")]
    assert spread(captions, 8)[0] == captions[0] and len(spread(captions, 8)) == 8


@pytest.mark.parametrize(
    "words, fewest",
    [
        ("man woman boy girl child people person portrait father mother", 50),
        ("street city beach mountain forest village room kitchen castle river", 50),
        ("painting style watercolor drawing sketch anime render lithograph illustration", 55),
        ("1girl 1boy 2girls solo masterpiece score_9", 75),
        ("cup table chair book lamp bicycle bread cake car clock", 40),
        ("dog bird horse fish sheep fox owl bear rabbit cow", 22),
        ("photography photo lens lighting studio 35mm 85mm", 40),
    ],
    ids="people places styles tags things animals photographs".split(),
)
def test_captions_are_of_every_kind(words, fewest):
    """The ridge protects what the list has in it; ten everyday words stand for each kind."""
    wanted = set(words.split())
    found = [c for c in plain_captions() if wanted & set(re.findall(r"\w+", c.lower()))]
    assert len(found) >= fewest


def test_language_is_encoded_once_per_encoder():
    toy, cache = ToyDenoiser(), {}
    captions = plain_captions(40)
    assert len(list(encode_language(toy, captions, cache))) == 3
    assert list(encode_language(toy, captions, cache)) == []
    assert len(list(encode_language(toy, captions[:-1], cache))) == 3
    assert len(cache) == 2


def end_of(generator):
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def test_captions_that_name_the_concept_do_not_count():
    """One cache serves all concepts, and the rest counts as if those had never been there."""
    toy, cache = ToyDenoiser(), {}
    captions = plain_captions()
    named = naming(captions, ["cat", "Van Gogh"])
    assert "a cat burglar tiptoeing along a roof ridge" in named
    assert any("van Gogh" in caption for caption in named)
    assert all("cat" in c.lower() or "van gogh" in c.lower() for c in named)
    assert not naming(["a category", "concatenate"], ["cat"])
    assert naming(["two Cats", "cat, cute"], ["cat"]) == ["two Cats", "cat, cute"]
    assert naming(["saber \\(fate\\), armour"], ["saber \\(fate\\)"])
    moment = end_of(encode_language(toy, captions, cache, named))
    rest = end_of(encode_language(toy, [c for c in captions if c not in named]))
    torch.testing.assert_close(moment, rest, rtol=1e-4, atol=1e-6)
    assert (moment - end_of(encode_language(toy, captions, cache))).norm() > 1e-3 * rest.norm()
    assert len(cache) == 1


def test_prompts_of_different_length_attend_alike_when_repeated():
    toy = ToyDenoiser()
    short, long = toy.encode(["a cat", "a dog"])
    long = Encoded(torch.cat([long.tokens, toy.encode(["on a chair"])[0].tokens]))
    x, sigma = torch.randn(2, 4, 4, 4), torch.tensor([1.0, 1.0])
    both = toy.predict_x0(x, sigma, [short, long])
    alone = toy.predict_x0(x[:1], sigma[:1], [short])
    torch.testing.assert_close(both[:1], alone)
