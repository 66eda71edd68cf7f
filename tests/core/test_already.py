"""A model that does already what is asked for: said with a figure, and only where it is so."""

import pytest
import torch
from concept_surgery.erase_core import SubspaceError, erase, preset_settings
from concept_surgery.erase_core.method.already import told_apart, usual_gains
from concept_surgery.erase_core.method.closed_form import Metric, TokenTargets
from concept_surgery.erase_core.method.language import Words
from concept_surgery.erase_core.run.erase import refuse_if_too_little_moves

from .toy import ToyDenoiser

QUICK = {"captions": 40, "protection": None}


def run(toy, concepts, preset="instant", **values):
    last = erase(preset_settings(preset, concepts=concepts, **{**QUICK, **values}), toy)
    return last


def with_erasure(concepts, strength=1.0, **values):
    """A toy whose weights carry an erasure, as a checkpoint saved after Apply does."""
    toy = ToyDenoiser()
    edit = run(toy, concepts, **values).edit()
    for name, weight in toy.matrices().items():
        weight.data += strength * edit.factors[name] @ edit.bases[name].T
    return toy


@pytest.mark.parametrize(
    "concepts, end",
    [("cat => dog", "'cat' already comes out as 'dog'"), ("cat", "out as nothing in particular")],
)
@pytest.mark.parametrize("templates", ["", "a photo of {}\n{}"])
def test_what_is_erased_already_is_not_erased_again(concepts, end, templates):
    toy = with_erasure(concepts, templates=templates)
    with pytest.raises(SubspaceError, match=rf"{end}: keys and values differ by only \d+% "):
        run(toy, concepts, templates=templates)
    with pytest.raises(SubspaceError, match="nothing to move.*MODEL of the loader"):
        run(toy, concepts, templates=templates, protection=1.0)
    assert toy.calls == 0  # nothing was sampled for it


def test_those_that_are_erased_are_named_and_the_others_are_not():
    toy = with_erasure("cat => dog\npizza")
    with pytest.raises(SubspaceError) as raised:
        run(toy, "boat => ship\ncat => dog\npizza")
    assert "'cat' already comes out as 'dog', 'pizza' already comes out as nothing" in str(raised)
    assert "boat" not in str(raised.value)


@pytest.mark.parametrize("concepts", ["cat => tiger", "boat => ship", "dog"])
def test_what_is_not_erased_is_erased_also_beside_what_is(concepts):
    assert run(with_erasure("cat => dog"), concepts).record["concepts"]


def test_half_an_erasure_leaves_something_to_move():
    assert run(with_erasure("cat => dog", strength=0.5), "cat => dog").record["concepts"]


def test_words_that_are_nearly_the_same_are_not_taken_for_erased():
    """The figure is how the model tells them apart, for how far apart they are."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 24, generator=generator)
    rows = torch.randn(12, 5, 24, generator=generator)
    words = Words(tuple(map(str, range(12))), rows, torch.tensor([1.0, 1, 1, 1, 7]))
    metric = Metric.of({"k": weight}, torch.eye(24).double())
    source = torch.randn(10, 24, generator=generator)
    near, far = (TokenTargets(source, source + s * rows[0][:1]) for s in (1e-3, 1.0))
    assert told_apart(near, metric, words) == pytest.approx(
        told_apart(far, metric, words), rel=1e-3
    )
    change = (weight @ rows[0][0]).square().sum() / rows[0][0].square().sum()
    away = rows - rows.mean(0)
    usual = ((away @ weight.T).square().sum(-1) * words.counts).sum()
    usual = usual / (away.square().sum(-1) * words.counts).sum()
    assert told_apart(far, metric, words) == pytest.approx(float(change / usual), rel=1e-4)
    assert (
        0.3 < float(usual_gains(metric, words).min()) < 1 < float(usual_gains(metric, words).max())
    )


@pytest.mark.parametrize(
    "concepts, said, advice",
    [
        ("cat", "beside what must stay (at", "Keep fewer prompts"),
        ("cat\ndog", "beside what must stay and the other concept (at", "Erase fewer concepts"),
        (
            "cat\ndog\nowl",
            "beside what must stay and the other 2 concepts (at",
            "Erase fewer concepts",
        ),
    ],
)
def test_the_other_concepts_are_spoken_of_where_there_are_some(concepts, said, advice):
    settings = preset_settings("instant", concepts=concepts)
    shares = [0.19, *[1.0] * (len(settings.concepts) - 1)]
    with pytest.raises(SubspaceError) as raised:
        refuse_if_too_little_moves(settings, shares)
    assert f"Only 19% of 'cat' can be moved {said}" in str(raised.value)
    assert advice in str(raised.value)
