"""Models that read more than one text encoder: which token a row belongs to.

The host's own tokenizers and encoders, T5-XXL among them, with few layers and random weights.
"""

from __future__ import annotations

import comfy.sd
import comfy.supported_models_base
import pytest
import torch
from comfy import sd1_clip, sdxl_clip
from comfy.text_encoders import flux, pixart_t5, sd2_clip, sd3_clip
from concept_surgery.erase_core.method.alignment import (
    STREAM_IDS,
    align_tokens,
    content_length,
    word_span,
)
from concept_surgery.erase_core.settings import families
from concept_surgery.nodes import batches
from concept_surgery.nodes.encoding import batch_encoder, encode_prompts
from concept_surgery.nodes.host import ComfyDenoiser
from concept_surgery.nodes.tokens import row_ids

from .small import REAL_WIDTHS, built_model

SMALL = {
    **{
        f"{name}_model_config": {"num_hidden_layers": 3, "intermediate_size": 64}
        for name in ("clip_l", "clip_g")
    },
    "t5xxl_model_config": {"num_layers": 1, "num_heads": 1, "d_ff": 64},
}
LONG = "a photo of a cat and " + "a very long description of a garden " * 16
PROMPTS = ["", "a cat", "a photo of a Siamese cat in a garden", LONG]


def small_clip(tokenizer, encoder):
    target = comfy.supported_models_base.ClipTarget(tokenizer, encoder)
    with torch.inference_mode():
        clip = comfy.sd.CLIP(target, model_options=SMALL)
        for weight in clip.cond_stage_model.parameters():
            weight.fill_(0.01)
    return clip


@pytest.fixture(scope="module")
def sd3():
    """SD3's denoiser, with CLIP-L, CLIP-G and T5."""
    target = sd3_clip.sd3_clip(dtype_t5=torch.float16)
    clip = small_clip(sd3_clip.SD3Tokenizer, target)
    return ComfyDenoiser(built_model("sd3", **REAL_WIDTHS["sd3"])[0], clip, "", 2, 64)


def test_every_row_has_its_token(sd3):
    ids = sd3.token_ids(PROMPTS)
    for prompt, own, encoded in zip(PROMPTS, ids, sd3.encode(PROMPTS), strict=True):
        assert len(own) == len(encoded.tokens), prompt
        assert {token // STREAM_IDS for token in own} == {0, 1}


def test_words_are_aligned_in_both_encoders(sd3):
    texts = ["a photo of a red cat in a garden", "a photo of a dog in a garden", "a photo"]
    null, erased, replaced, without = sd3.token_ids(["", *texts])
    for other in (replaced, without):
        roles = align_tokens(erased, other, null)
        for token, role in zip(erased, roles, strict=True):
            assert token // STREAM_IDS == other[role] // STREAM_IDS
    roles = align_tokens(erased, replaced, null)
    for stream in (0, 1):
        begin = next(i for i, token in enumerate(erased) if token // STREAM_IDS == stream)
        equal = [erased[i] == replaced[roles[i]] for i in range(begin, begin + 16)]
        assert sum(equal) == 14  # all but the two words that are replaced


def test_of_flux_the_rows_are_t5s():
    clip = small_clip(flux.FluxTokenizer, flux.flux_clip(dtype_t5=torch.float16))
    denoiser = ComfyDenoiser(built_model("flux", **REAL_WIDTHS["flux"])[0], clip, "", 2, 64)
    for own, encoded in zip(denoiser.token_ids(PROMPTS), denoiser.encode(PROMPTS), strict=True):
        assert len(own) == len(encoded.tokens) and encoded.pooled is not None


class Tokenized:
    """A CLIP of which nothing but the tokenizer is asked."""

    def __init__(self, tokenizer, model=None):
        self.tokenizer, self.cond_stage_model = tokenizer, model

    def tokenize(self, text):
        return self.tokenizer.tokenize_with_weights(text)


# Tokenizers with their families' streams, the id of their end token, and of their padding.
TOKENIZERS = {
    "SD1": (sd1_clip.SD1Tokenizer, families.SD1, 49407, 49407),
    "SD2": (sd2_clip.SD2Tokenizer, families.SD2, 49407, 0),
    "SDXL": (sdxl_clip.SDXLTokenizer, families.SDXL, 49407, 49407),
    "Flux": (flux.FluxTokenizer, families.FLUX, 1, 0),
    "PixArt": (pixart_t5.PixArtTokenizer, families.generic("PixArt"), 1, None),  # no padding
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def reads(request):
    """Ids of prompts, and what the tokenizer's end and padding tokens are."""
    tokenizer, family, end, pad = TOKENIZERS[request.param]
    clip = Tokenized(tokenizer())
    return lambda *texts: [row_ids(clip, text, family.token_streams) for text in texts], end, pad


def test_a_word_that_goes_becomes_the_end_in_every_encoder(reads):
    ids, end, _ = reads
    null, erased, without = ids("", "a photo of a castle", "a photo of a")
    roles = align_tokens(erased, without, null)
    castle = word_span(erased, null)[1] - 1
    assert without[roles[castle]] == end == erased[castle + 1]
    assert without[roles[castle + 1]] == end


@pytest.mark.parametrize("words", [70, 74, 75, 76])
def test_the_last_word_is_found_where_the_window_is_full(reads, words):
    ids, _, _ = reads
    null, own, last = ids("", "a " * (words - 1) + "castle", "castle")
    begin, stop = word_span(own, null)
    first, end = word_span(last, null)
    assert own[stop - (end - first) : stop] == last[first:end]
    assert stop - begin >= words
    assert content_length(own, null) == stop


def test_t5_alone_has_its_own_tokens_and_so_have_clip_g_and_t5():
    whole = sd3_clip.SD3Tokenizer()
    tokens = whole.tokenize_with_weights("a cat")
    streams = families.SD3.token_streams
    for missing, names in (({"clip_l", "clip_g"}, ["t5xxl"]), ({"clip_l"}, ["g", "t5xxl"])):
        parts = dict.fromkeys(("clip_l", "clip_g", "t5xxl"), object())
        model = type("Model", (), {**parts, **dict.fromkeys(missing)})
        expected = [
            token + number * STREAM_IDS
            for number, name in enumerate(names)
            for (token, _weight) in tokens[name][0]
        ]
        assert row_ids(Tokenized(whole, model), "a cat", streams) == expected


def test_sd3_with_t5_alone_has_an_id_for_each_row():
    clip = small_clip(
        sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(False, False, True, dtype_t5=torch.float16)
    )
    null, own = (row_ids(clip, text, families.SD3.token_streams) for text in ("", "a cat"))
    assert word_span(own, null)[0] == 0  # T5 puts nothing in front
    assert len(encode_prompts(clip, ["a cat"])[0].tokens) == len(own)


def test_prompts_read_together_are_what_each_is_alone(sd3):
    """Streams that follow one another in a prompt do so in each prompt of a batch, too."""
    texts = ["a cat", "a dog on a sofa", "a photo of a red car"]
    alone, together = sd3.encode(texts), sd3.encode(texts, together=True)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other.tokens, one.tokens, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(other.pooled, one.pooled, rtol=1e-3, atol=1e-3)


def test_nothing_is_read_in_another_encoders_order(sd3, monkeypatch):
    """Where no order of the streams gives what each prompt is alone, they are read one by one."""
    clip, texts = sd3._clip, ["a cat", "a dog on a sofa"]
    monkeypatch.setattr(batches, "_orders", lambda tokens, rows: iter([("t5xxl", "l")]))
    alone = encode_prompts(clip, texts, pooled=True)
    for one, other in zip(alone, batch_encoder(clip)(texts), strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.pooled, other.pooled)
