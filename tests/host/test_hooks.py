"""A CLIP with hooks on it, made by the host's own nodes, is refused before anything is encoded."""

from __future__ import annotations

import comfy.hooks
import comfy.sd
import folder_paths
import pytest
import torch
from comfy_extras.nodes_hooks import CombineHooks, CreateHookLora, SetClipHooks
from concept_surgery.nodes.families import UnsupportedModelError
from concept_surgery.nodes.host import ComfyDenoiser
from safetensors.torch import save_file

LAYER = "lora_te_text_model_encoder_layers_0_mlp_fc1"
MATRIX = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture(scope="module")
def loaded(checkpoint):
    with torch.inference_mode():  # as the host loads, inside its executor
        return comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)[:2]


@pytest.fixture(scope="module")
def hooks(tmp_path_factory):
    """A LoRA for both, hooked by the host's node."""
    folder = tmp_path_factory.mktemp("loras")
    tensors = {}
    for name, out, width in ((LAYER, 3072, 768), (MATRIX, 320, 768)):
        tensors[f"{name}.lora_up.weight"] = torch.full((out, 2), 0.1)
        tensors[f"{name}.lora_down.weight"] = torch.full((2, width), 0.1)
    save_file(tensors, folder / "hooked.safetensors")
    folder_paths.add_model_folder_path("loras", str(folder))
    return CreateHookLora().create_hook("hooked.safetensors", 1.0, 1.0)[0]


@pytest.mark.parametrize(
    ("apply_to_conds", "words"),
    [(True, "on its own weights and for the MODEL, on every prompt"), (False, "own weights. They")],
)
@pytest.mark.parametrize("schedule", [True, False])
def test_hooks_on_the_clip_are_refused_with_the_way_out(
    loaded, hooks, apply_to_conds, schedule, words
):
    model, clip = loaded
    hooked = SetClipHooks().apply_hooks(clip, schedule, apply_to_conds, hooks)[0]
    carried = hooked.encode_from_tokens_scheduled(hooked.tokenize("a cat"))[0][1]
    assert ("hooks" in carried) == apply_to_conds  # what the host does, and training would not
    with pytest.raises(UnsupportedModelError, match=f"WeightHook.*{words}.*before Set CLIP Hooks"):
        ComfyDenoiser(model, hooked, "", 6, 64)


def test_a_clip_without_hooks_and_the_one_from_before_are_taken(loaded):
    model, clip = loaded
    nothing = CombineHooks().combine_hooks(hooks_A=comfy.hooks.HookGroup())[0]
    for free in (clip, SetClipHooks().apply_hooks(clip, False, True, nothing)[0]):
        assert ComfyDenoiser(model, free, "", 6, 64).family == "SD1.x"
