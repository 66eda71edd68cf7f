"""The second drawing model, ``benchmarks/icons``: its words, its weights, its adapter."""

import random

import pytest
import torch
from concept_surgery.erase_core.model.activations import Recompute, SavedBytes
from concept_surgery.erase_core.model.low_rank import LowRankEdit

from benchmarks.emoji.words import OBJECTS
from benchmarks.emoji.words import STYLES as STYLES_OF_THE_FIRST
from benchmarks.emoji.words import SYNONYMS as SYNONYMS_OF_THE_FIRST
from benchmarks.icons.build import BITS, WEIGHTS, unpack
from benchmarks.icons.evaluate import questions
from benchmarks.icons.model import IconsModel
from benchmarks.icons.network import END, PADDING, ROWS, SPECIAL, UNKNOWN, WIDTH, tokenize
from benchmarks.icons.words import (
    GROUPS,
    HELD_OUT_PLAIN,
    HELD_OUT_STYLED,
    STYLE_NAMES,
    SYNONYMS,
    THING_NAMES,
    PromptMaker,
    all_prompts,
    fill,
    names_in,
    vocabulary,
)


@pytest.fixture(scope="module")
def model() -> IconsModel:
    return IconsModel()


def an_edit(denoiser, basis: torch.Tensor, size: float) -> LowRankEdit:  # type: ignore[no-untyped-def]
    stream = torch.Generator().manual_seed(5)
    factors = {
        name: size * torch.randn(len(weight), basis.shape[1], generator=stream)
        for name, weight in denoiser.matrices().items()
    }
    return LowRankEdit.shared(basis, factors)


def asked(denoiser, texts: list[str]):  # type: ignore[no-untyped-def]
    """Latents, noise levels and prompts of one prediction for each text."""
    stream = torch.Generator().manual_seed(3)
    x = torch.randn(len(texts), *denoiser.latent_shape(64), generator=stream)
    return x, torch.linspace(1, 0.4, len(texts)), denoiser.encode(texts)


def test_it_shares_no_thing_and_no_style_with_the_first() -> None:
    assert not {*THING_NAMES, *SYNONYMS} & {*OBJECTS, *SYNONYMS_OF_THE_FIRST}
    assert not {*STYLE_NAMES} & {*STYLES_OF_THE_FIRST}
    assert len(THING_NAMES) == 64 == len({name for group in GROUPS.values() for name in group})
    assert sum(" " in name for name in THING_NAMES) >= 6 and len(SYNONYMS) >= 8
    assert set(SYNONYMS.values()) <= {*THING_NAMES}


def test_words_are_whole_and_the_rest_of_a_row_is_padding() -> None:
    assert vocabulary() == sorted(set(vocabulary())) and len(vocabulary()) <= 900
    for name in (*THING_NAMES, *STYLE_NAMES, *SYNONYMS):
        assert UNKNOWN not in tokenize([name])[0].tolist(), name
    row = tokenize(["A Hot Dog, qwxz."])[0].tolist()
    words = [vocabulary()[number - SPECIAL] for number in row[:4]]
    assert words == ["a", "hot", "dog", ","]
    assert row[4] == UNKNOWN and row[6] == END and row[7:] == [PADDING] * (ROWS - 7)
    assert tokenize([" ".join(["cloud"] * 50)])[0, -1] == END


def test_prompts_name_what_is_drawn_and_never_what_evaluation_asks() -> None:
    held_out = {text for text, _, _ in all_prompts(HELD_OUT_PLAIN, HELD_OUT_STYLED)}
    maker = PromptMaker(0)
    drawn = [maker.draw("palm tree", "pixel") for _ in range(1500)]
    assert all(names_in(text) == {"palm tree"} for text in drawn if text)
    assert 0.07 < drawn.count("") / len(drawn) < 0.13
    empty = {maker.draw_nothing() for _ in range(1500)}
    assert not any(map(names_in, empty)) and any("something" in text for text in empty)
    new = {text for text, _, _ in questions("new nothing") if " thing" not in text}
    new = {text for text in new if "something" not in text and "object" not in text}
    assert not held_out & {*drawn} and not new & empty
    assert fill("{a}", "hourglass") == "an hourglass" and fill("{a}", "scissors") == "scissors"


def test_the_committed_weights_unpack(model) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file

    assert sum(path.stat().st_size for path in WEIGHTS.parent.iterdir()) <= 12 * 2**20
    small = load_file(WEIGHTS)
    tensors = unpack(small)
    assert BITS == 8 and all(value.isfinite().all() for value in tensors.values())
    assert any(value.dtype is torch.uint8 for value in small.values())
    assert model.encode(["a camel"])[0].shape == (ROWS, WIDTH)
    assert len(model.identity) == 64


def test_it_draws_what_it_is_asked_for(model) -> None:  # type: ignore[no-untyped-def]
    """In phrasings it was trained on and in new ones, and nothing where nothing is named."""
    stream = random.Random(0)
    kinds = {"styled": 10, "new styled": 8, "nothing": 4, "synonyms": 2}
    chosen = [one for kind, n in kinds.items() for one in stream.sample(questions(kind), n)]
    noise = model.draw_noise(len(chosen), 1)
    pages = model.pictures([text for text, _, _ in chosen], [""] * len(chosen), noise)
    assert pages.shape == (24, 64, 64, 3)
    found = zip(chosen, *model.classify(pages), strict=True)
    right = [name == seen and style in (None, drawn) for (_, name, style), seen, drawn in found]
    assert sum(right) >= 0.8 * len(right)


def test_padding_depends_on_the_prompt(model) -> None:  # type: ignore[no-untyped-def]
    one, other = model.encode(["a camel", "a violin"])
    assert (one[-1] - other[-1]).norm() > 0.05 * one[-1].norm()


def test_the_adapter_names_what_reads_the_prompt(model) -> None:  # type: ignore[no-untyped-def]
    with model.denoiser() as denoiser:
        assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k" in (
            denoiser.names
        )
        assert len(denoiser.names) == 14
        assert all(weight.shape[1] == WIDTH for weight in denoiser.matrices().values())
        sigmas = denoiser.sigmas(10)
        assert len(sigmas) == 11 and sigmas[0] == 1 and sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()
        ids = denoiser.token_ids(["the gift"])[0]
        assert [denoiser.vocabulary().index(word) for word in ("gift", "the")] == sorted(
            denoiser.vocabulary().index(word) for word in ("gift", "the")
        )
        assert len(ids) == ROWS == len(denoiser.encode(["the gift"])[0].tokens)


def test_an_edit_moves_only_what_it_sees(model) -> None:  # type: ignore[no-untyped-def]
    texts = ["a camel in pixel style", "a violin", ""]
    with model.denoiser() as denoiser, torch.no_grad():
        x, sigma, prompts = asked(denoiser, texts)
        before = denoiser.predict_x0(x, sigma, prompts)
        held = torch.cat([prompt.tokens for prompt in prompts]).double()
        directions = torch.linalg.svd(held, full_matrices=True).Vh
        unseen = directions[len(held) :].T.float()
        seen = directions[:4].T.float()
        zero = an_edit(denoiser, seen, 0.0)
        assert torch.equal(denoiser.predict_x0(x, sigma, prompts, zero), before)
        orthogonal = denoiser.predict_x0(x, sigma, prompts, an_edit(denoiser, unseen, 1.0))
        assert (orthogonal - before).abs().max() < 1e-5
        moved = denoiser.predict_x0(x, sigma, prompts, an_edit(denoiser, seen, 0.1))
        assert (moved - before).abs().max() > 0.01


def test_gradients_flow_and_are_the_same_when_blocks_run_again(model) -> None:  # type: ignore[no-untyped-def]
    with model.denoiser() as denoiser:
        x, sigma, prompts = asked(denoiser, ["a camel", "a violin"])
        basis = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.manual_seed(0))).Q
        edit = an_edit(denoiser, basis, 0.05)

        def gradients() -> list[torch.Tensor]:
            factors = {name: b.clone().requires_grad_() for name, b in edit.factors.items()}
            found = denoiser.predict_x0(x, sigma, prompts, LowRankEdit(edit.bases, factors))
            return torch.autograd.grad(found.square().mean(), list(factors.values()))

        plain = gradients()
        assert all(gradient.abs().max() > 0 for gradient in plain)
        with denoiser.around_blocks(Recompute()):
            again = gradients()
        for one, other in zip(plain, again, strict=True):
            assert torch.allclose(one, other, atol=1e-7)
        saved = SavedBytes([*denoiser.weights()])
        trained = {name: b.clone().requires_grad_() for name, b in edit.factors.items()}
        with denoiser.around_blocks(saved), saved.counting():
            denoiser.predict_x0(x, sigma, prompts, LowRankEdit(edit.bases, trained))
        assert 0 < saved.kept_checkpointed < saved.kept


def test_the_merged_edit_draws_what_the_side_path_predicts(model) -> None:  # type: ignore[no-untyped-def]
    """One step of the sampler is ``x0`` at pure noise, with guidance."""
    text, noise = "a trophy in sticker style", model.draw_noise(1, 4)
    with model.denoiser() as denoiser, torch.no_grad():
        basis = torch.linalg.qr(torch.randn(WIDTH, 2, generator=torch.manual_seed(1))).Q
        edit = an_edit(denoiser, basis, 0.1)
        prompt, against = denoiser.encode([text, ""])
        asked = [denoiser.predict_x0(noise, torch.ones(1), [p], edit) for p in (prompt, against)]
        expected = model._network.patches.pages(asked[1] + 4 * (asked[0] - asked[1]))
    drawn = model.pictures([text], [""], noise, edit, steps=1).astype(int)
    plain = model.pictures([text], [""], noise, steps=1).astype(int)
    assert abs(drawn - expected).max() <= 1
    assert abs(drawn - plain).max() > 1
