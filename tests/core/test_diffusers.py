"""The files in diffusers: it finds every matrix and changes it as the erasure says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from concept_surgery.erase_core import Erasure, erase, preset_settings
from safetensors.torch import load_file

from .toy import ToyDenoiser

READER = Path(__file__).with_name("diffusers_reader.py")
RANK, TOKENS, POOLED, HIDDEN = 3, 24, 12, 32  # as wide as its networks
CONTEXT, TEXT = "context_embedder", "time_text_embed.text_embedder.linear_1"
KEY, KEY_THERE = (
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
)
# Of each family the matrices by kohya name: their shape, and what diffusers calls them.
MATRICES = {
    "SD3": {
        "lora_unet_context_embedder": ((HIDDEN, TOKENS), CONTEXT),
        "lora_unet_y_embedder_mlp_0": ((HIDDEN, POOLED), TEXT),
    },
    "Flux": {
        "lora_unet_txt_in": ((HIDDEN, TOKENS), CONTEXT),
        "lora_unet_vector_in_in_layer": ((HIDDEN, POOLED), TEXT),
    },
    "SDXL": {
        KEY: ((64, TOKENS), KEY_THERE),
        "lora_unet_label_emb_0_0": ((128, 80), "add_embedding.linear_1"),
    },
}


def random_erasure(family: str) -> Erasure:
    values = {"captions": 40, "trajectories": 0, "steps": 0, "resolution": 32}
    last = erase(preset_settings("instant", concepts="cat", **values), ToyDenoiser())
    generator, bases, factors = torch.Generator().manual_seed(0), {}, {}
    for name, ((rows, width), _) in MATRICES[family].items():
        bases[name] = torch.linalg.qr(torch.randn(width, RANK, generator=generator))[0]
        factors[name] = torch.randn(rows, RANK, generator=generator)
    return Erasure(bases, factors, {**last.record, "family": family, "rank": RANK})


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Each family's erasure, and what diffusers makes of the file that is for it."""
    for package in ("diffusers", "peft"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"diffusers reads LoRAs with {package}, which is not installed")
    folder = tmp_path_factory.mktemp("files")
    erasures = {family: random_erasure(family) for family in MATRICES}
    for family, erasure in erasures.items():
        erasure.save(folder / f"{family.lower()}.safetensors", "diffusers")
    subprocess.run([sys.executable, str(READER), str(folder)], check=True, timeout=300)
    return {
        family: (erasure, load_file(folder / f"{family.lower()}.changes.safetensors"))
        for family, erasure in erasures.items()
    }


@pytest.mark.parametrize("family", MATRICES)
def test_diffusers_finds_every_matrix_and_changes_it_alike(read, family):
    """SDXL's with the pooled vector's matrix, which diffusers before 0.39 refused."""
    erasure, changes = read[family]
    assert set(changes) == {f"{there}.weight" for _, there in MATRICES[family].values()}
    for name, (_, there) in MATRICES[family].items():
        expected = erasure.delta(name)
        torch.testing.assert_close(changes[f"{there}.weight"], expected, rtol=1e-4, atol=1e-5)
