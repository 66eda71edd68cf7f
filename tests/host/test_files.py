"""Erasures in files: a LoRA for everybody, never overwritten, refused when damaged or foreign."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import pytest
import torch
from concept_surgery.erase_core.artefact.erasure import Erasure, ErasureFileError
from concept_surgery.erase_core.artefact.saving import save_erasure
from concept_surgery.nodes.apply import ApplyError, apply_erasure, mismatches
from safetensors.torch import save_file

from tools.checkpoint import build_checkpoint
from tools.environment import BUILD

from .tiny import noise_prediction, tokens_of


def test_file_is_a_lora_that_the_stock_code_loads_alike(loaded, finished, tmp_path):
    model, clip = loaded
    path = save_erasure(finished, tmp_path, "cat")
    again = Erasure.load(path)
    assert again.identity == finished.identity and again.record == finished.record
    with torch.inference_mode():
        stock, _ = comfy.sd.load_lora_for_models(
            model, None, comfy.utils.load_torch_file(str(path)), 1.0, 0.0
        )
    tokens = tokens_of(clip, ["a cat"])[0]
    ours = noise_prediction(apply_erasure(model, again, 1.0), tokens, 2.0)
    assert torch.equal(noise_prediction(stock, tokens, 2.0), ours)
    assert not torch.equal(noise_prediction(model, tokens, 2.0), ours)


def test_saving_never_overwrites_and_the_same_twice_is_one_file(finished, tmp_path):
    other = Erasure(
        {"lora_unet_x": torch.ones(3, finished.rank)},
        {"lora_unet_x": torch.ones(2, finished.rank)},
        finished.record,
    )
    first = save_erasure(finished, tmp_path, "cat")
    assert save_erasure(finished, tmp_path, "cat.safetensors") == first
    assert save_erasure(other, tmp_path, "cat").name == "cat_2.safetensors"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["../cat", "/a/b", "a\\b", "", "  ", ".hidden", "C:cat", "a\nb"])
def test_file_names_that_lead_elsewhere_are_refused(finished, tmp_path, name):
    with pytest.raises(ErasureFileError, match="with or without folders"):
        save_erasure(finished, tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder_is_said(finished, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ErasureFileError, match="Check its rights"):
        save_erasure(finished, tmp_path / "file" / "folder", "cat")
    with pytest.raises(ErasureFileError, match="can't be written"):
        finished.save(tmp_path / "absent" / "cat.safetensors")


def test_damaged_and_foreign_files_are_refused(finished, tmp_path):
    path = save_erasure(finished, tmp_path, "cat")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ErasureFileError, match="damaged or was not copied whole"):
        Erasure.load(cut)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.ones(2)}, foreign)
    with pytest.raises(ErasureFileError, match="not an erasure made by Concept Surgery"):
        Erasure.load(foreign)
    save_file({"x": torch.ones(2)}, foreign, metadata={"concept_surgery": "{}"})
    with pytest.raises(ErasureFileError, match="is damaged"):
        Erasure.load(foreign)
    with pytest.raises(ErasureFileError, match="no erasure at"):
        Erasure.load(tmp_path / "absent.safetensors")


def test_another_base_is_a_warning_and_another_shape_an_error(loaded, finished):
    model, clip = loaded
    assert mismatches(model, finished, clip, "tiny") == []
    path = build_checkpoint(BUILD / "checkpoints" / "other-seed.safetensors", seed=1)
    with torch.inference_mode():
        other, other_clip = comfy.sd.load_checkpoint_guess_config(str(path))[:2]
    base, encoder = mismatches(other, finished, other_clip, "other")
    assert "made on tiny, this model is other" in base
    assert "null prompt moves by" in encoder
    path = build_checkpoint(BUILD / "checkpoints" / "nano.safetensors", layout="nano")
    with torch.inference_mode():
        nano = comfy.sd.load_checkpoint_guess_config(str(path), output_clip=False)[0]
    with pytest.raises(ApplyError, match="lacks 6 of its 8 matrices"):
        apply_erasure(nano, finished, 1.0)
    wrong = {name: b[:-1] for name, b in finished.factors.items()}
    with pytest.raises(ApplyError, match="has the shape"):
        apply_erasure(model, Erasure(finished.bases, wrong, finished.record), 1.0)
    with pytest.raises(ApplyError, match="between -5 and 5"):
        apply_erasure(model, finished, 6.0)
