"""Textual inversions: erased, drawn instead, kept, missing, or made for another text encoder."""

from __future__ import annotations

import comfy.supported_models
import pytest
import torch
from comfy import sd1_clip, sdxl_clip
from concept_surgery.erase_core import Meter, SettingsError, erase, preset_settings
from concept_surgery.erase_core.method.alignment import VECTOR_IDS, align_tokens, word_span
from concept_surgery.erase_core.method.encoded import encode_prompts
from concept_surgery.erase_core.settings import families
from concept_surgery.erase_core.settings.settings import EraseSettings
from concept_surgery.nodes.host import ComfyDenoiser
from concept_surgery.nodes.tokens import row_ids
from safetensors.torch import save_file

from .small import random_text_encoder
from .test_text_encoders import Tokenized

CAT, DOG, PAINTER = "embedding:mycat", "embedding:mydog", "embedding:painter"


def vectors(count, width, seed):
    return 0.05 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inversions of two vectors, of one without a dimension for it, for SDXL, and for SD2."""
    folder = tmp_path_factory.mktemp("embeddings")
    cat, dog = vectors(2, 768, 0), vectors(1, 768, 1)[0]
    save_file({"emb_params": cat}, folder / "mycat.safetensors")
    save_file({"emb_params": dog}, folder / "mydog.safetensors")
    torch.save({"string_to_param": {"*": torch.nn.Parameter(cat.half())}}, folder / "half.pt")
    both = {"clip_l": vectors(3, 768, 2), "clip_g": vectors(3, 1280, 3)}
    save_file(both, folder / "painter.safetensors")
    save_file({"emb_params": vectors(2, 1024, 4)}, folder / "sd2.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def inverting(loaded, folder):
    """The small SD1.5 with a text encoder that finds the inversions."""
    with torch.inference_mode():
        clip = random_text_encoder(comfy.supported_models.SD15({}))
    clip.tokenizer = sd1_clip.SD1Tokenizer(embedding_directory=folder)
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        with ComfyDenoiser(loaded[0], clip, "", 6, 64) as denoiser:
            yield denoiser


def words(denoiser, *texts):
    null, *rows = denoiser.token_ids(["", *texts])
    return [ids[slice(*word_span(ids, null))] for ids in rows]


def test_each_vector_is_a_token_of_its_own_that_is_known_again(inverting):
    texts = (CAT, f"a ({CAT}:1.3), red", DOG, "embedding:half", "embedding:sd2", "embedding:no")
    cat, phrase, dog, half, other, missing = words(inverting, *texts)
    assert len(cat) == 2 and cat[0] != cat[1] and min(cat) >= VECTOR_IDS
    assert phrase[1:3] == cat and max(phrase[0], *phrase[3:]) < 49408
    assert len(dog) == 1 and dog[0] not in cat and len(half) == 2 and not set(half) & set(cat)
    assert other == missing == []
    for text in texts:
        (ids,), (prompt,) = inverting.token_ids([text]), inverting.encode([text])
        assert len(ids) == len(prompt.tokens) == 77


QUICK = {"templates": "a photo of {}\n{} in a garden", "captions": 12, "protection": 0.001}


@pytest.mark.parametrize("concepts", [f"{CAT} => dog", f"cat => {DOG}", CAT])
def test_what_an_inversion_draws_is_erased_and_drawn_instead(inverting, concepts):
    keep = ["a tree" if DOG in concepts else DOG]
    last = erase(preset_settings("instant", concepts=concepts, keep=keep, **QUICK), inverting)
    (concept,), (kept,) = last.record["concepts"], last.record["measures"]["kept"]
    # As far as a random encoder's exact prompts leave it.
    assert concept["keys_and_values_moved"] > 0.85 * concept["share_left"] > 0.5
    assert kept["exact"] and kept["drift"] < 1e-5


def test_the_same_result_is_found_again_and_another_file_is_another_result(inverting, folder):
    results = {}
    settings = preset_settings("instant", concepts=f"{CAT} => dog", **QUICK)
    for stored in (False, True):
        meter = Meter()
        erase(settings, inverting, meter=meter, results=results)
        assert meter.reused == stored
    save_file({"emb_params": vectors(2, 768, 9)}, f"{folder}/mycat.safetensors")
    try:
        meter = Meter()
        erase(settings, inverting, meter=meter, results=results)
    finally:
        save_file({"emb_params": vectors(2, 768, 0)}, f"{folder}/mycat.safetensors")
    assert not meter.reused and len(results) == 2


@pytest.mark.parametrize(
    "values, words",
    [
        ({"concepts": "embedding:nope => dog"}, "reads nothing in 'embedding:nope'"),
        ({"concepts": "embedding:sd2"}, "reads nothing in 'embedding:sd2'"),  # SD2's, on SD1
        ({"concepts": "cat => a red embedding:sd2"}, "embedding that isn't found: 'sd2'"),
        ({"concepts": "()"}, r"reads nothing in '\(\)'"),
        ({"concepts": "cat", "keep": ["(tiger:1e999)"]}, r"'\(tiger:1e999\)' under 'keep' comes"),
        ({"concepts": "cat", "keep": ["(tiger:nan)"]}, r"'\(tiger:nan\)' under 'keep' comes"),
        ({"concepts": CAT, "templates": "by {}."}, "doesn't find 'embedding:mycat'"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(inverting, values, words):
    with pytest.raises(SettingsError, match=words):
        encode_prompts(EraseSettings(**values), inverting)


def test_missing_inversions_in_what_is_kept_are_warned_about(inverting):
    values = {"keep": ["a tiger, embedding:nope, here"], "negative_prompts": ["embedding:sd2"]}
    kept, negative = encode_prompts(EraseSettings(concepts="cat", **values), inverting).warnings
    assert "'a tiger, embedding:nope, here' under 'keep'" in kept and "'nope'" in kept
    assert "reads nothing in 'embedding:sd2' under 'negative prompts'" in negative


def test_of_sdxl_both_encoders_vectors_stand_at_the_same_places(folder):
    clip = Tokenized(sdxl_clip.SDXLTokenizer(embedding_directory=folder))
    streams = families.SDXL.token_streams
    texts = ("", f"a {PAINTER} garden", "a plain old dog garden", f"a {CAT} garden")
    null, erased, other, half_read = (row_ids(clip, text, streams) for text in texts)
    assert word_span(erased, null) == word_span(other, null) == (1, 6)
    assert align_tokens(erased, other, null) == list(range(77))
    assert word_span(half_read, null) == (1, 5)  # CLIP-L reads an inversion of SD1
