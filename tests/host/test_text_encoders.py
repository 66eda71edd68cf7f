"""Models that read more than one text encoder: which token a row belongs to.

The host's own tokenizers and encoders, T5-XXL among them, with few layers and random weights.
"""

from __future__ import annotations

import comfy.sd
import comfy.supported_models_base
import pytest
import torch
from comfy.text_encoders import flux, sd3_clip
from concept_surgery.erase_core.alignment import STREAM_IDS, align_tokens
from concept_surgery.nodes.host import ComfyDenoiser

from .small import built_model

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
    return ComfyDenoiser(built_model("sd3")[0], clip, "", 2, 64)


def test_every_row_has_its_token(sd3):
    ids = sd3.token_ids(PROMPTS)
    for prompt, own, encoded in zip(PROMPTS, ids, sd3.encode(PROMPTS), strict=True):
        assert len(own) == len(encoded.tokens), prompt
        assert {token // STREAM_IDS for token in own} == {0, 1}


def test_words_are_aligned_in_both_encoders(sd3):
    texts = ["a photo of a red cat in a garden", "a photo of a dog in a garden", "a photo"]
    erased, replaced, without = sd3.token_ids(texts)
    for other in (replaced, without):
        roles = align_tokens(erased, other)
        for token, role in zip(erased, roles, strict=True):
            assert token // STREAM_IDS == other[role] // STREAM_IDS
    roles = align_tokens(erased, replaced)
    for stream in (0, 1):
        begin = next(i for i, token in enumerate(erased) if token // STREAM_IDS == stream)
        equal = [erased[i] == replaced[roles[i]] for i in range(begin, begin + 16)]
        assert sum(equal) == 14  # all but the two words that are replaced


def test_of_flux_the_rows_are_t5s():
    clip = small_clip(flux.FluxTokenizer, flux.flux_clip(dtype_t5=torch.float16))
    denoiser = ComfyDenoiser(built_model("flux")[0], clip, "", 2, 64)
    for own, encoded in zip(denoiser.token_ids(PROMPTS), denoiser.encode(PROMPTS), strict=True):
        assert len(own) == len(encoded.tokens) and encoded.pooled is not None
