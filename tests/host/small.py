"""Shrunken models of other families than SD1.x, with text encoders that the host can't load small.

The host's own classes throughout: the U-Nets come through the stock loader, the text encoders are
the host's with fewer layers and random weights, SD3 and Flux are built from a configuration.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams

from tools.checkpoint import build_checkpoint
from tools.environment import BUILD

LAYERS = 3  # the fewest that have a last but one beside the first
_GAINS = {"q_proj": 3.0, "k_proj": 3.0, "out_proj": 0.3, "fc2": 0.1}  # as in tools.checkpoint


def load_family(layout: str):
    """MODEL and CLIP of a shrunken checkpoint, made as the host's executor would."""
    path = build_checkpoint(BUILD / "checkpoints" / f"{layout}.safetensors", layout=layout)
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model(str(path))
        return model, random_text_encoder(model.model.model_config)


def random_text_encoder(config):
    """The CLIP that belongs to a configuration of the host, a few layers deep."""
    encoders = ("clip_l", "clip_g", "clip_h")
    options = {
        f"{name}_model_config": {"num_hidden_layers": LAYERS, "intermediate_size": 64}
        for name in encoders
    }
    clip = comfy.sd.CLIP(config.clip_target({}), model_options=options)
    generator = torch.Generator().manual_seed(0)
    for name, weight in clip.cond_stage_model.named_parameters():
        if weight.ndim < 2:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        gain = _GAINS.get(name.split(".")[-2], 1.0)
        std = gain if "embedding" in name else gain / math.sqrt(weight.shape[1])
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return clip


# What makes a transformer read the host's own text encoders, T5 among them.
REAL_WIDTHS = {
    "sd3": {
        "adm_in_channels": 2048,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": 64 * 4},
        },
    },
    "flux": {"context_in_dim": 4096},
}


def built_model(architecture: str, **changes):
    """MODEL and CLIP of a shrunken transformer, built in Python from the host's classes.

    CLIP-L stands for their text encoders: all take the width of the tokens from their weights.

    Args:
        **changes: put over the configuration, such as :data:`REAL_WIDTHS`.
    """
    config_class, unet = _TRANSFORMERS[architecture]
    unet = {**unet, **changes}
    management = comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    with torch.inference_mode():
        config = config_class(_known_here(architecture, unet))
        config.set_inference_dtype(torch.float32, None)
        model = comfy.model_patcher.ModelPatcher(config.get_model({}, "", offload), device, offload)
        filled(model.model.diffusion_model, lambda name: _gain(architecture, name))
        return model, random_text_encoder(comfy.supported_models.SD15({}))


def filled(network: torch.nn.Module, gain: Callable[[str], float]) -> None:
    """Give a network random weights, the same each time.

    Args:
        gain: of a matrix's name, how much larger its numbers are than those that neither grow nor
            shrink what goes through.
    """
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1 and "pos_embed" not in name:
            weight.copy_(gain(name) * noise / math.sqrt(weight[0].numel()))
        else:  # the biases of the modulation open its gates
            weight.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)


def _known_here(architecture: str, unet: dict) -> dict:
    """The configuration with what newer hosts want to be told besides."""
    wanted = {"flux": FluxParams, "chroma": ChromaParams}.get(architecture)
    names = {field.name for field in dataclasses.fields(wanted)} if wanted else set()
    newer = {"txt_ids_dims": [], "vec_in_dim": None}
    return {**{name: value for name, value in newer.items() if name in names}, **unet}


def _gain(architecture: str, name: str) -> float:
    if architecture in ("sd3", "flux"):
        return _POOLED_EFFECT if name.startswith(("y_embedder", "vector_in")) else 1.0
    fed = any(part in name for part in _FED_BY_THE_PROMPT)
    return _PROMPT_EFFECT.get(architecture, 2.0) if fed else 1.0


_TEXT, _HEADS = 768, 4
_POOLED_EFFECT = 0.1  # else it would carry all that a prompt does
_PROMPT_EFFECT = {
    "pixart": 4.0
}  # 2 for the others; else it would be lost among so many tokens that are alike
_FED_BY_THE_PROMPT = (
    "cross_attn",
    "y_proj.fc1",
    "text_embedding.0",
    "cond_seq_linear",
    "attn.w1",
    "txt_in",
    "txt_attn.qkv",
    "cap_embedder.1",
    "context_refiner",
)
_FLUX_SIZES = {
    "context_in_dim": _TEXT,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
}
_TRANSFORMERS = {
    "sd3": (
        comfy.supported_models.SD3,
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": _HEADS,
            "input_size": None,
            "adm_in_channels": _TEXT,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": _TEXT, "out_features": 64 * _HEADS},
            },
            "num_patches": 32 * 32,
            "pos_embed_max_size": 32,
            "pos_embed_scaling_factor": None,
            "x_block_self_attn_layers": [],
        },
    ),
    "flux": (
        comfy.supported_models.Flux,
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            **_FLUX_SIZES,
            "vec_in_dim": _TEXT,
            "guidance_embed": True,
        },
    ),
    "pixart": (
        comfy.supported_models.PixArtSigma,
        {
            "image_model": "pixart_sigma",
            "in_channels": 4,
            "hidden_size": 192,  # a multiple of 3: two sizes are embedded beside the time
            "num_heads": 4,
            "depth": 3,
            "caption_channels": _TEXT,
            "micro_condition": False,
        },
    ),
    "auraflow": (
        comfy.supported_models.AuraFlow,
        {
            "dim": 128,
            "global_conddim": 128,
            "cond_seq_dim": _TEXT,
            "n_layers": 4,
            "n_double_layers": 2,
            "n_heads": 4,
            "max_seq": 16 * 16,
        },
    ),
    "wan": (
        comfy.supported_models.WAN21_T2V,
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 512,  # wide enough that a null prompt of 77 tokens leaves room
            "ffn_dim": 256,
            "text_dim": _TEXT,
            "num_heads": 4,
            "num_layers": 3,
        },
    ),
    "chroma": (
        comfy.supported_models.Chroma,
        {
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            **_FLUX_SIZES,
            "in_dim": 64,
            "out_dim": 256,
            "hidden_dim": 64,
            "n_layers": 1,
        },
    ),
    "lumina": (
        comfy.supported_models.Lumina2,
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 128,
            "cap_feat_dim": _TEXT,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 2,
            "qk_norm": True,
            "axes_dims": [8, 12, 12],
            "axes_lens": [300, 64, 64],
        },
    ),
}
