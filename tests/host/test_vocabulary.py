"""The words that the host's own tokenizers know, each of those that come with it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace

import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders
import pytest
import torch
from comfy.text_encoders import (
    aura_t5,
    flux,
    hunyuan_image,
    hunyuan_video,
    hydit,
    lumina2,
    omnigen2,
    pixart_t5,
    qwen_image,
    sa_t5,
    sd2_clip,
    sd3_clip,
    wan,
    z_image,
)
from concept_surgery.erase_core.method.reading import evenly_spaced
from concept_surgery.nodes.host import ComfyDenoiser
from concept_surgery.nodes.vocabulary import vocabulary

from .small import REAL_WIDTHS, built_model
from .test_text_encoders import small_clip

COMMON = {"cat", "house", "elephant"}
AT_MOST_SECONDS = 0.5
BEFORE = "a photo of a"


def clip_with(tokenizer):
    return SimpleNamespace(tokenizer=tokenizer)


def with_pieces_of_aura(tokenizer):
    """A host's class whose sentencepiece model comes with its weights, with one that is there."""
    folder = Path(next(iter(comfy.text_encoders.__path__)))
    model = (folder / "t5_pile_tokenizer" / "tokenizer.model").read_bytes()
    pieces = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    return tokenizer(tokenizer_data={"spiece_model": pieces})


# By model: its class, how many words there are at least, which common ones it has no token for.
SHIPPED = {
    "SD1": (comfy.sd1_clip.SD1Tokenizer, 30000, ()),
    "SD2": (sd2_clip.SD2Tokenizer, 30000, ()),
    "SDXL": (comfy.sdxl_clip.SDXLTokenizer, 30000, ()),
    "SD3": (sd3_clip.SD3Tokenizer, 30000, ()),
    "Flux": (flux.FluxTokenizer, 30000, ()),
    "HunyuanVideo": (hunyuan_video.HunyuanVideoTokenizer, 30000, ()),
    "PixArt": (pixart_t5.PixArtTokenizer, 12000, ()),
    "Stable Audio": (sa_t5.SAT5Tokenizer, 12000, ()),
    "AuraFlow": (aura_t5.AuraT5Tokenizer, 8000, ("elephant",)),
    "Qwen-Image": (qwen_image.QwenImageTokenizer, 20000, ()),
    "HunyuanImage": (hunyuan_image.HunyuanImageTokenizer, 20000, ()),
    "OmniGen2": (omnigen2.Omnigen2Tokenizer, 20000, ()),
    "Z-Image": (z_image.ZImageTokenizer, 20000, ()),
    "Llama": (hunyuan_video.LLAMA3Tokenizer, 20000, ()),
    "BERT": (hydit.HyditBertTokenizer, 20000, ()),
    "Wan": (lambda: with_pieces_of_aura(wan.WanT5Tokenizer), 8000, ("elephant",)),
    "Lumina": (lambda: with_pieces_of_aura(lumina2.LuminaTokenizer), 8000, ("elephant",)),
}


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request):
    """Name and tokenizer; with this scope each is made once, as some take a second."""
    return request.param, SHIPPED[request.param][0]()


def test_words_of_what_comes_with_the_host(shipped):
    name, tokenizer = shipped
    _, least, unknown = SHIPPED[name]
    clip = clip_with(tokenizer)
    words = vocabulary(clip)
    assert len(words) >= least
    assert set(words) >= COMMON.difference(unknown)
    assert len(set(words)) == len(words)
    assert all(re.fullmatch("[a-z]{3,}", word) for word in words)
    assert words == vocabulary(clip)


def test_frequent_words_come_first(shipped):
    name, tokenizer = shipped
    if name == "BERT":
        pytest.skip("Its tokens aren't in order of frequency.")
    words = vocabulary(clip_with(tokenizer))
    first = words.index("the"), words.index("and")
    assert max(first) < 10 < words.index("house") < words.index("cat") < len(words)


def test_it_takes_no_time(shipped):
    clip = clip_with(shipped[1])
    begin = time.process_time()
    vocabulary(clip)
    assert time.process_time() - begin < AT_MOST_SECONDS


def test_each_word_is_one_token(shipped):
    name, tokenizer = shipped
    if name == "Llama":
        pytest.skip("Newer versions of transformers take the spaces out of what it is given.")
    words = evenly_spaced(vocabulary(clip_with(tokenizer)), 200)

    # Padding hides how long a prompt is, so ask what the host's tokenizer asks.
    parts = [tokenizer, *vars(tokenizer).values()]
    inner = next(part.tokenizer for part in parts if hasattr(part, "inv_vocab"))

    def length(text):
        return len(inner(text)["input_ids"])

    assert [word for word in words if length(f"{BEFORE} {word}") != length(BEFORE) + 1] == []


def test_the_last_stream_named_is_taken_first():
    tokenizer = sd3_clip.SD3Tokenizer()
    clip, t5 = clip_with(tokenizer), vocabulary(clip_with(tokenizer.t5xxl))
    assert vocabulary(clip, ("l", "t5xxl")) == t5
    assert vocabulary(clip, ("t5xxl", "l")) == vocabulary(clip) != t5
    assert vocabulary(clip, ("t5xxl", "unknown")) == t5
    assert vocabulary(clip, ("unknown",)) == vocabulary(clip)


def test_the_next_stream_serves_where_one_has_no_words():
    tokenizer = hunyuan_image.HunyuanImageTokenizer()
    assert vocabulary(clip_with(tokenizer.byt5)) == []
    assert vocabulary(clip_with(tokenizer), ("byt5",)) == vocabulary(clip_with(tokenizer))


@pytest.mark.parametrize(
    "tokens, words",
    [
        ({b" dog": 1, b" cat": 0, b"fish": 2, b"\xff": 3}, ["cat", "dog"]),
        ({"▁dog": 2, "▁Dog": 1, "▁camelCase": 3, "▁it": 4, "▁naïve": 5, "dog": 0}, ["dog"]),
        ({"dog": 3, "##dog": 1, "cat": 2, "[CLS]": 0, "don't": 4}, ["cat", "dog"]),
        ({"Ġcat": 1, " cat": 2, "Ġ ": 3, "Ġcat1": 4}, ["cat"]),
        ({}, []),
        ({"a": 1, 5: 2, None: 3}, []),
    ],
)
def test_marks_of_words(tokens, words):
    listed = SimpleNamespace(get_vocab=lambda: tokens)
    numbered = SimpleNamespace(inv_vocab={number: token for token, number in tokens.items()})
    for tokenizer in (listed, SimpleNamespace(tokenizer=listed), numbered):
        assert vocabulary(clip_with(tokenizer)) == words
        assert vocabulary(clip_with(SimpleNamespace(name="x", one=tokenizer))) == words


def refuses():
    raise NotImplementedError


@pytest.mark.parametrize(
    "clip",
    [
        object(),
        clip_with(None),
        clip_with(object()),
        clip_with(SimpleNamespace(tokenize_with_weights=lambda text: {"l": [[(1, 1.0)]]})),
        clip_with(SimpleNamespace(l=SimpleNamespace(inv_vocab=None, get_vocab=refuses))),
        clip_with(SimpleNamespace(l=SimpleNamespace(get_vocab=lambda: None))),
        clip_with(SimpleNamespace(l=SimpleNamespace(get_vocab=lambda: [1, 2]))),
    ],
)
def test_no_words_where_nothing_is_listed(clip):
    assert vocabulary(clip) == vocabulary(clip, ("l", "t5xxl")) == []


def test_of_flux_the_words_are_t5s():
    clip = small_clip(flux.FluxTokenizer, flux.flux_clip(dtype_t5=torch.float16))
    denoiser = ComfyDenoiser(built_model("flux", **REAL_WIDTHS["flux"])[0], clip, "", 2, 64)
    assert denoiser.vocabulary() == vocabulary(clip_with(clip.tokenizer.t5xxl))
