"""Erasures that are always on, and what is written about them."""

from __future__ import annotations

import shutil

import pytest
import torch
from concept_surgery.erase_core import ErasureFileError, SettingsError

from .test_manners import saved, weights_of


def script(fake):
    from concept_surgery.webui.accordion import ConceptSurgeryScript

    made = ConceptSurgeryScript()
    from modules import scripts

    assert made.show(False) is scripts.AlwaysVisible
    made.ui(False)
    return made


def drawn(fake, names=(), strength=1.0, prompt="a cat", **named):
    return fake.draw(prompt, script=script(fake), args=(list(names), strength), **named)


def test_it_draws_what_a_tag_draws_and_the_prompt_stays_as_it_was(fake, tiny):
    fake.load()
    saved(fake, tiny)
    plain, _ = fake.draw("a cat")
    by_tag, _ = fake.draw("a cat <lora:no_cat:0.8>")
    by_accordion, done = drawn(fake, ["no_cat"], 0.8)
    assert torch.equal(by_accordion.latents[0], by_tag.latents[0])
    assert not torch.equal(by_accordion.latents[0], plain.latents[0])
    assert done.info.startswith("a cat\n") and "lora" not in done.info
    assert "Concept Surgery: no_cat, Concept Surgery strength: 0.8" in done.info
    gone, done = drawn(fake, [])
    assert torch.equal(gone.latents[0], plain.latents[0]) and "Concept" not in done.info
    nothing, done = drawn(fake, ["no_cat"], 0.0)
    assert torch.equal(nothing.latents[0], plain.latents[0]) and "Concept" not in done.info


def test_a_tag_in_the_prompt_counts_once(a1111, tiny):
    a1111.load()
    saved(a1111, tiny)
    by_tag, _ = a1111.draw("a cat <lora:no_cat:0.8>")
    both, _ = drawn(a1111, ["no_cat"], 1.0, prompt="a cat <lora:no_cat:0.8>")
    assert torch.equal(both.latents[0], by_tag.latents[0])


def test_the_info_text_fills_it_in_again(a1111, tiny):
    from concept_surgery.webui import accordion

    a1111.load()
    saved(a1111, tiny, "no_cat")
    saved(a1111, {**tiny, "concepts": "car"}, "no, car")
    made = script(a1111)
    assert made.paste_field_names == ["Concept Surgery", "Concept Surgery strength"]
    (_, pasted), (_, strength_in) = made.infotext_fields
    names_in = accordion.names_in
    p, _ = drawn(a1111, ["no_cat", "no, car"], 0.75)
    params = p.extra_generation_params
    assert names_in(params) == ["no_cat", "no, car"] and strength_in(params) == 0.75
    assert names_in({}) == [] and strength_in({}) is None
    assert names_in({"Concept Surgery": "no_cat | gone"}) == ["no_cat"]
    assert strength_in({"Concept Surgery strength": "x"}) is None
    assert accordion.BETWEEN in params["Concept Surgery"]
    update = pasted(params)
    assert update["value"] == ["no_cat", "no, car"] and set(update["choices"]) >= {"no_cat"}


def test_the_second_pass_of_a_large_picture_has_it_too(a1111, tiny):
    a1111.load()
    saved(a1111, tiny)
    p, _ = drawn(a1111, ["no_cat"], 0.5, enable_hr=True)
    assert [params.items for params in p.hr_extra_network_data["lora"]] == [["no_cat", "0.5"]]
    p, _ = drawn(a1111, ["no_cat"], 0.5, prompt="a cat <lora:no_cat:1>", enable_hr=True)
    assert [params.items for params in p.hr_extra_network_data["lora"]] == [["no_cat", "1"]]


def test_what_isnt_there_or_is_no_number_is_refused(a1111):
    a1111.load()
    with pytest.raises(ErasureFileError, match="Refresh the list"):
        drawn(a1111, ["gone"])
    for strength in ("much", float("nan"), 99, None):
        with pytest.raises(SettingsError, match="strength"):
            drawn(a1111, [], strength)


def test_an_erasure_of_another_family_is_warned_of(a1111, tiny):
    a1111.load()
    saved(a1111, tiny)
    a1111.load("sdxl")
    p, _ = drawn(a1111, ["no_cat"])
    assert any("made for SD1.x" in text for text in p.comments)
    a1111.load()
    p, _ = drawn(a1111, ["no_cat"])
    assert not p.comments


def test_the_list_is_of_erasures_alone(a1111, tiny):
    from concept_surgery.webui import loras
    from safetensors.torch import save_file

    a1111.load()
    path, _ = saved(a1111, tiny)
    other = path.with_name("ordinary.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1, 1)}, other)
    path.with_name("damaged.safetensors").write_bytes(b"x")
    assert loras.erasures() == ["no_cat"]
    more = a1111.folder / "more"  # as Forge Neo's --lora-dirs names it
    more.mkdir()
    for name in ("no_cat", "no_cat_either"):
        shutil.copy2(path, more / f"{name}.safetensors")
    a1111.shared.cmd_opts.lora_dirs = [str(more)]
    try:
        assert loras.erasures() == ["no_cat", "no_cat_either"]
        assert loras.path_of("no_cat") == path
    finally:
        del a1111.shared.cmd_opts.lora_dirs


def test_the_weights_are_put_back_after_it(fake, tiny):
    fake.load()
    saved(fake, tiny)
    before = weights_of(fake)
    drawn(fake, ["no_cat"], 1.0)
    drawn(fake)
    after = weights_of(fake)
    assert all(torch.equal(before[key], after[key]) for key in before)
