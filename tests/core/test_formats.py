"""What other programs read of a file: its names in their lists, its base, its matrices' names."""

import pytest
import torch
from concept_surgery.erase_core import Erasure, ErasureFileError, erase, preset_settings
from concept_surgery.erase_core.settings.families import FAMILIES
from safetensors import safe_open

from .toy import ToyDenoiser

SMALL = {"resolution": 32, "captions": 40, "sampling_steps": 4}


def trained(preset="instant", concepts="cat => dog", **values) -> Erasure:
    last = erase(
        preset_settings(preset, concepts=concepts, **SMALL, **values),
        ToyDenoiser(values.get("layers", "key-value")),
    )
    return last


@pytest.fixture(scope="module")
def cat() -> Erasure:
    return trained()


def of_family(erasure: Erasure, family: str, names=None) -> Erasure:
    """The erasure as if another family's matrices had been trained."""
    one = next(iter(erasure.factors))
    names = names or FAMILIES[family].diffusers_names
    return Erasure(
        {name: erasure.bases[one] for name in names},
        {name: erasure.factors[one] * (i + 1) for i, name in enumerate(names)},
        {**erasure.record, "family": family},
    )


def saved(erasure: Erasure, path, **choice) -> dict[str, str]:
    """The metadata of its file."""
    erasure.save(path, **choice)
    with safe_open(str(path), framework="pt") as file:
        return file.metadata()


def test_the_alias_of_a_file_is_its_name(cat, tmp_path):
    """Automatic1111 writes it into prompts, as <lora:alias:1>: no ``:`` or ``>``, no two alike."""
    info = saved(cat, tmp_path / "without cat.safetensors")
    assert info["ss_output_name"] == "without cat"
    assert saved(cat, tmp_path / "other.safetensors")["ss_output_name"] == "other"


@pytest.mark.parametrize(
    ("family", "v2"), [("SD1.x", None), ("SD2", "True"), ("SD2 (v)", "True"), ("SDXL", None)]
)
def test_sd2_is_said_in_the_key_that_automatic1111_reads(cat, tmp_path, family, v2):
    erasure = Erasure(cat.bases, cat.factors, {**cat.record, "family": family})
    assert saved(erasure, tmp_path / "a.safetensors").get("ss_v2") == v2


def test_titles_tell_files_presets_and_bases_apart(cat, tmp_path):
    elsewhere = {**cat.record, "base": {**cat.record["base"], "name": "another.safetensors"}}
    sampled = trained("balanced", trajectories=4, steps=1)
    titles = [
        saved(cat, tmp_path / "a.safetensors")["modelspec.title"],
        saved(cat, tmp_path / "b.safetensors")["modelspec.title"],
        saved(sampled, tmp_path / "a.safetensors")["modelspec.title"],
        saved(Erasure(cat.bases, cat.factors, elsewhere), tmp_path / "a.safetensors")[
            "modelspec.title"
        ],
    ]
    assert len(set(titles)) == len(titles)
    assert titles[3] == "a: Erase cat (replaced by dog) (instant, another.safetensors)"
    assert "own settings" in titles[2]


@pytest.mark.parametrize(
    ("preset", "form"),
    [
        ("instant", "hard"),
        ("balanced", "hard"),
        ("thorough", "hard"),
        ("balanced", "soft"),
        ("thorough", "soft"),
    ],
)
@pytest.mark.parametrize("concepts", ["cat", "cat\npizza => bread\ndog"])
def test_a_title_names_the_preset(cat, tmp_path, preset, form, concepts):
    settings = preset_settings(preset, concepts=concepts, form=form)
    record = {**cat.record, "settings": settings.as_dict(), "form": form}
    erasure = Erasure(cat.bases, cat.factors, record)
    assert f"({preset}, " in saved(erasure, tmp_path / "a.safetensors")["modelspec.title"]


@pytest.mark.parametrize("family", ["SD3", "Flux"])
def test_names_for_diffusers_are_read_back(cat, tmp_path, family):
    erasure = of_family(cat, family)
    path = tmp_path / "cat.safetensors"
    erasure.save(path, "diffusers")
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
    embedders = ("context_embedder", "time_text_embed.text_embedder.linear_1")
    assert names == {f"transformer.{e}.lora_{side}.weight" for e in embedders for side in "AB"}
    again = Erasure.load(path)
    assert again.identity == erasure.identity and again.record == erasure.record
    for name in erasure.factors:
        torch.testing.assert_close(again.delta(name), erasure.delta(name), rtol=0, atol=0)


def test_where_diffusers_reads_kohya_names_those_are_written(cat):
    assert set(cat.tensors("diffusers")) == set(cat.tensors("kohya"))


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("SD3", ["lora_unet_joint_blocks_0_context_block_attn_qkv"]),
        ("Flux", ["lora_unet_txt_in", "lora_unet_double_blocks_0_txt_attn_qkv"]),
        ("Chroma", ["lora_unet_txt_in"]),
    ],
)
def test_what_diffusers_has_no_name_for_is_refused_and_nothing_written(
    cat, tmp_path, family, names
):
    erasure = of_family(cat, family, names)
    with pytest.raises(ErasureFileError, match=f"{names[-1]} of {family} isn't known"):
        erasure.save(tmp_path / "cat.safetensors", "diffusers")
    assert not list(tmp_path.iterdir())
    erasure.save(tmp_path / "cat.safetensors", "kohya")


@pytest.mark.parametrize("odd", ["other.lora_A.weight", "transformer.context_embedder.lora_A.bias"])
def test_other_tensors_beside_them_are_refused(cat, tmp_path, odd):
    erasure = of_family(cat, "SD3")
    tensors = erasure.tensors("diffusers") | {odd: torch.zeros(2, 2)}
    info = {"concept_surgery": saved(erasure, tmp_path / "a.safetensors")["concept_surgery"]}
    with pytest.raises(ErasureFileError, match="not those of an erasure"):
        Erasure._from_file("a.safetensors", tensors, info)


@pytest.mark.parametrize("values", [torch.tensor(1.0), torch.zeros(0, 4), torch.zeros(3)])
def test_values_of_a_wrong_shape_are_refused(cat, tmp_path, values):
    erasure = of_family(cat, "SD3")
    tensors = erasure.tensors("diffusers")
    tensors["transformer.context_embedder.lora_A.weight"] = values
    info = {"concept_surgery": saved(erasure, tmp_path / "a.safetensors")["concept_surgery"]}
    with pytest.raises(ErasureFileError, match="wrong shape"):
        Erasure._from_file("a.safetensors", tensors, info)
