"""What diffusers makes of LoRA files, in a process of its own, which the host's stubs stay out of.

``python diffusers_reader.py FOLDER``: for each FOLDER/FAMILY.safetensors it loads the file as its
pipelines do, onto a shrunken network of the family, and writes what that changed in the weights to
FOLDER/FAMILY.changes.safetensors, by diffusers' names.
"""

from __future__ import annotations

import sys
from pathlib import Path

import diffusers
from diffusers import loaders
from safetensors.torch import save_file
from torch import Tensor, nn

TOKENS, POOLED, HIDDEN = 24, 12, 32
_JOINT = {
    "joint_attention_dim": TOKENS,
    "pooled_projection_dim": POOLED,
    "attention_head_dim": HIDDEN // 2,
    "num_attention_heads": 2,
    "num_layers": 1,
}


def sd3() -> nn.Module:
    """SD3's network."""
    return diffusers.SD3Transformer2DModel(
        **_JOINT, sample_size=8, in_channels=4, out_channels=4, caption_projection_dim=HIDDEN
    )


def flux() -> nn.Module:
    """Flux's network."""
    return diffusers.FluxTransformer2DModel(
        **_JOINT, in_channels=4, num_single_layers=1, axes_dims_rope=(8, 4, 4)
    )


def sdxl() -> nn.Module:
    """SDXL's network: the pooled vector and the sizes enter through one matrix."""
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=TOKENS,
        norm_num_groups=8,
        use_linear_projection=True,
    )


def changes(family: str, path: Path) -> dict[str, Tensor]:
    """What the file adds to the weights of the family's network."""
    if family == "sdxl":
        network = sdxl()
        read = loaders.StableDiffusionXLLoraLoaderMixin.lora_state_dict
        state, alphas = read(str(path), unet_config=network.config)
        prefix = "unet"
    else:
        loader, network = {
            "sd3": (loaders.SD3LoraLoaderMixin, sd3),
            "flux": (loaders.FluxLoraLoaderMixin, flux),
        }[family]
        network, prefix, alphas = network(), "transformer", None
        state = loader.lora_state_dict(str(path))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_lora_adapter(state, prefix=prefix, network_alphas=alphas)
    network.fuse_lora()
    network.unload_lora()
    after = network.state_dict()
    return {n: after[n] - before[n] for n in before if not after[n].equal(before[n])}


if __name__ == "__main__":
    for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
        save_file(changes(file.stem, file), file.with_suffix(".changes.safetensors"))
