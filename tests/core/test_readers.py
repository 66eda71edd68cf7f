"""Layers that read the prompt alone, found by predictions on a network made for it."""

from __future__ import annotations

import torch
from concept_surgery.erase_core.method.alignment import first_at, kept_in_front, rows_at
from concept_surgery.erase_core.model.low_rank import LowRankEdit
from concept_surgery.erase_core.model.prompt import TOKENS, Encoded, Read
from concept_surgery.erase_core.model.readers import (
    Work,
    chosen_readers,
    find_readers,
    read_inputs,
)
from concept_surgery.erase_core.run.meter import Meter, MeteredDenoiser
from torch import nn

from .toy import ToyDenoiser

WIDTH, TOKEN_COUNT = 16, 5


class Network(nn.Module):
    """Two streams: a refined one that two blocks read as keys, and a pooled one by the time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.door, self.refiner = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.keys = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.picture = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.vector, self.time = nn.Linear(WIDTH, WIDTH), nn.Linear(1, WIDTH)
        self.still = nn.Linear(WIDTH, WIDTH)  # reads neither

    def forward(self, x, sigma, tokens, pooled):
        text = self.refiner(torch.tanh(self.door(nn.functional.normalize(tokens, dim=-1))))
        x = x + self.time(sigma[:, None])[:, None] + self.vector(pooled)[:, None]
        x = x + self.still(torch.ones(WIDTH))
        for keys, picture in zip(self.keys, self.picture, strict=True):
            x = picture(x) + (x @ keys(text).transpose(1, 2)).softmax(-1) @ text
        return x


def seeded(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(network):
    layers = {name: one for name, one in network.named_modules() if isinstance(one, nn.Linear)}
    pictures = [(seeded(1, 3, WIDTH, seed=n), torch.tensor([1.0 + n])) for n in range(2)]
    prompts = [
        (seeded(1, TOKEN_COUNT, WIDTH, seed=8 + n), seeded(1, WIDTH, seed=10 + n)) for n in range(2)
    ]
    return layers, lambda picture, prompt: network(*pictures[picture], *prompts[prompt])


def test_a_layer_with_the_same_input_whatever_the_picture_reads_the_prompt_alone():
    groups = find_readers(*parts(Network()))
    assert [group.layers for group in groups] == [
        ("door",),
        ("refiner",),
        ("vector",),
        ("keys.0", "keys.1"),
    ]
    assert [group.behind for group in groups] == [(), (0,), (), (0,)]
    assert [group.spread for group in groups] == [False, False, False, True]


def test_keys_and_values_are_edited_where_there_are_any_else_the_first_layers():
    groups = find_readers(*parts(Network()))

    def firsts(*how):
        return [group.first for group in chosen_readers(groups, *how)]

    assert firsts() == ["keys.0", "vector"]
    assert firsts(True) == ["door", "vector"]
    assert firsts(False, lambda group: False) == ["door", "vector"]  # no room on the keys


def test_an_edit_orthogonal_to_what_is_read_leaves_the_output_and_another_moves_it():
    network = Network()
    layers, predict = parts(network)
    (group, _) = chosen_readers(find_readers(layers, predict))
    read = read_inputs({group.first: layers[group.first]}, lambda: predict(0, 0))[group.first]
    basis = torch.linalg.qr(read[0].double().T, mode="complete").Q[:, TOKEN_COUNT:].float()
    before = [predict(1, prompt) for prompt in (0, 1)]
    edit = LowRankEdit.shared(basis, {n: seeded(WIDTH, basis.shape[1], seed=1) for n in "kv"})
    with torch.no_grad():
        for name, factor in zip(group.layers, edit.factors.values(), strict=True):
            layers[name].weight += factor @ basis.T
        after = [predict(1, prompt) for prompt in (0, 1)]
    assert (after[0] - before[0]).norm() <= 1e-6 * before[0].norm()
    assert (after[1] - before[1]).norm() >= 1e-2 * before[1].norm()


def test_reading_ends_at_the_last_layer_that_is_wanted_and_is_weighed_by_its_work():
    network = Network()
    layers, predict = parts(network)
    work = Work(layers)
    whole = work.of(lambda: predict(0, 0))
    share = work.of(lambda: read_inputs({"door": layers["door"]}, lambda: predict(0, 0))) / whole
    assert 0 < share < 0.25
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_an_interrupt_goes_through_and_leaves_no_hook():
    layers, _ = parts(Network())

    def interrupted():
        layers["door"](seeded(1, WIDTH, seed=0))
        raise KeyboardInterrupt

    try:
        read_inputs(layers, interrupted)
    except KeyboardInterrupt:
        assert not any(layer._forward_pre_hooks for layer in layers.values())
    else:
        raise AssertionError("it was swallowed")


def test_what_the_network_reads_stands_in_for_what_was_encoded():
    tokens = seeded(3, 8, seed=0)
    prompt = Encoded(tokens)
    assert prompt.places(TOKENS) == [0, 1, 2] and prompt.rows(TOKENS) is tokens
    prompt.read[TOKENS] = Read(seeded(4, 6, seed=1), torch.tensor([0, 0, 2, 2]))
    assert prompt.rows(TOKENS).shape == (4, 6) and prompt.places(TOKENS) == [0, 0, 2, 2]
    assert not prompt.zeroed().read  # zeros are read as something else


def test_rows_are_found_by_the_tokens_that_they_stand_for():
    """Two rows for a token, and a token that the other prompt doesn't have."""
    own, other = [0, 0, 1, 1, 2, 2], [0, 0, 1, 1]
    assert rows_at(own, other, [0, 1, 1]) == [0, 1, 2, 3, 2, 3]
    assert rows_at([0, 2], [1, 2], [0, 1, 2]) == [0, 1]
    assert [first_at([0, 0, 2, 2], place) for place in (0, 1, 2, 9)] == [0, 0, 2, 2]


def test_what_a_chat_template_keeps_to_itself_is_found_from_two_prompts():
    """The rows of a causal encoder are the same up to the first token that differs."""
    head, tail = [7, 8, 9, 10], [3, 4]
    ids = [[*head, *tail], [*head, 20, 21, *tail]]

    def causal(tokens):
        rows = torch.stack([seeded(6, seed=token) for token in tokens])
        return rows.cumsum(0)

    for kept in (0, 3, 4):
        cut = [(one, causal(one)[kept:]) for one in ids]
        assert kept_in_front(*cut) == kept
    at_the_end = [(one, causal(one)[:-1]) for one in ids]
    assert kept_in_front(*at_the_end) == 0


def test_what_a_denoiser_predicts_by_itself_is_counted():
    class Finding(ToyDenoiser):
        own_cost = 0.0

        def read(self, prompts):
            self.own_cost += 0.4 * len(prompts)

    meter = Meter()
    model = MeteredDenoiser(Finding(), meter)
    for expected in (1, 2, 3):
        model.read(model.encode(["a cat", "a dog"]))
        assert meter.spent == expected
