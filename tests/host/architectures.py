"""Networks of the kinds that people use, a few blocks deep, built of the host's own classes.

Each has the layers and the code of the real one, random weights, and the stand-in of its text
encoder. Of each it is said which layers read the prompt alone, and nothing that was made from the
picture or the noise level: that follows from how the architecture is built.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models
import torch
from comfy.ldm.chroma.model import ChromaParams
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.hunyuan_video.model import HunyuanVideoParams
from concept_surgery.nodes.families import latent_pixels, latent_shape, with_frames
from torch import Tensor, nn

from .small import filled
from .stand_in_text import (
    T5_IDS,
    StandInClip,
    Stream,
    Text,
    one_after_the_other,
    side_by_side,
    tokens_and_pooled,
    with_byt5,
    with_llama,
    with_t5_ids,
)

MATRIX = 2  # dimensions of one
WIDTH = 336  # of a text encoder's rows; more than most have tokens, as in the real ones
POOLED = 32

_IM = "<|im_start|>"
_SYSTEM = (_IM, "system", "Describe", "the", "image", ":", "<|im_end|>", _IM, "user")
_ANSWER = ("<|im_end|>", _IM, "assistant")


def _t5(name: str = "t5xxl", **given: Any) -> Stream:
    return Stream(name, after=("</s>",), causal=False, ids=T5_IDS, **given)


def _clip(name: str, **given: Any) -> Stream:
    """CLIP's own: sections of a fixed length, padded."""
    around = {"before": ("<|startoftext|>",), "after": ("<|endoftext|>",)}
    return Stream(name, **around, **{"window": 77, "ids": 40_000, **given})


def _chat(name: str, **given: Any) -> Stream:
    """A language model behind a chat template whose rows up to the prompt are dropped."""
    usual = {"before": _SYSTEM, "after": _ANSWER, "drop_before": True}
    return Stream(name, **{**usual, "mask": True, "only_masks": True, **given})


@dataclass(frozen=True)
class Architecture:
    """One of them.

    Attributes:
        config: the host's class, in ``comfy.supported_models``.
        network: what its network is made with.
        text: what its text encoder gives.
        readers: host names of the layers that read the prompt alone, N for any number.
        fed: parts of the names of layers whose weights are made larger, so that the prompt shows.
        latent: pixels of the latent that it is asked with; the fewest that it takes.
        parameters: the host's dataclass of what the network is made with, where it insists on all.
    """

    config: str
    network: Mapping[str, Any]
    text: Text
    readers: tuple[str, ...]
    fed: tuple[str, ...] = ()
    latent: int = 8
    parameters: Any = None
    gains: Mapping[str, float] = field(default_factory=dict)

    @property
    def lacking(self) -> str:
        """Why the host at hand can't build it; "" if it can."""
        if hasattr(comfy.supported_models, self.config):
            return ""
        return f"this host has no {self.config}"


_FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "context_in_dim": WIDTH,
    "hidden_size": 128,
    "mlp_ratio": 2.0,
    "num_heads": 4,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
}
_LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "cap_feat_dim": WIDTH,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "qk_norm": True,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.0,
    "axes_dims": [8, 12, 12],
    "axes_lens": [600, 64, 64],
}
_REFINED = (
    "cap_embedder.N",
    "context_refiner.N.attention.out",
    "context_refiner.N.attention.qkv",
    "context_refiner.N.feed_forward.w1",
    "context_refiner.N.feed_forward.w2",
    "context_refiner.N.feed_forward.w3",
)
_COSMOS = {
    "max_img_h": 64,
    "max_img_w": 64,
    "max_frames": 8,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 96,
    "num_blocks": 2,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "crossattn_emb_channels": WIDTH,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
    "extra_per_block_abs_pos_emb": False,
}

ARCHITECTURES: dict[str, Architecture] = {
    "Flux.1": Architecture(
        "Flux",
        {"image_model": "flux", **_FLUX, "vec_in_dim": POOLED, "guidance_embed": True},
        Text(
            (_clip("l", pooled=POOLED), _t5(least=256)),
            tokens_and_pooled("t5xxl", "l"),
        ),
        ("txt_in", "vector_in.in_layer", "vector_in.out_layer"),
        fed=("txt_in", "txt_attn"),
        parameters=FluxParams,
    ),
    "Flux.2": Architecture(
        "Flux2",
        {
            "image_model": "flux2",
            **_FLUX,
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "context_in_dim": 3 * WIDTH,
            "vec_in_dim": None,
            "guidance_embed": False,
            "axes_dim": [8, 8, 8, 8],
            "theta": 2000,
            "qkv_bias": False,
            "global_modulation": True,
            "mlp_silu_act": True,
            "ops_bias": False,
        },
        # Klein's: the padding is neither zero nor left out by the network, and the mask isn't read.
        Text(
            (
                Stream(
                    "qwen3_4b",
                    layers=3,
                    before=(_IM, "user"),
                    after=(*_ANSWER, "<think>", "</think>"),
                    least=512,
                    mask=True,
                    loud_first=20.0,
                ),
            )
        ),
        ("txt_in",),
        fed=("txt_in", "txt_attn"),
        parameters=FluxParams,
    ),
    "LongCat-Image": Architecture(
        "LongCatImage",
        {
            "image_model": "flux",
            **_FLUX,
            "vec_in_dim": None,
            "guidance_embed": False,
            "txt_ids_dims": [1, 2],
            "context_in_dim": 2 * WIDTH,  # more than there are tokens, as in the real one
        },
        Text(
            (
                _chat(
                    "qwen25_7b",
                    width=2 * WIDTH,
                    least=512,
                    padded_inside=True,
                    drop_after=True,
                    empty="<space>",
                ),
            )
        ),
        ("txt_in",),
        fed=("txt_in", "txt_attn"),
        parameters=FluxParams,
    ),
    "Chroma": Architecture(
        "Chroma",
        {
            "image_model": "chroma",
            **_FLUX,
            "in_channels": 64,
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 128,
            "hidden_dim": 64,
            "n_layers": 1,
        },
        Text((_t5(),)),
        ("txt_in",),
        fed=("txt_in", "txt_attn"),
        parameters=ChromaParams,
    ),
    "Qwen-Image": Architecture(
        "QwenImage",
        {
            "image_model": "qwen_image",
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 3,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (8, 12, 12),
        },
        Text((_chat("qwen25_7b"),)),
        ("txt_in",),
        fed=("txt_in", "add_", "txt_mlp"),
    ),
    "Mage-Flow": Architecture(
        "MageFlow",
        {
            "image_model": "mage_flow",
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 3,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (8, 12, 12),
        },
        Text((_chat("qwen3vl_4b"),)),
        ("txt_in",),
        fed=("txt_in", "add_", "txt_mlp"),
    ),
    "Lumina 2": Architecture(
        "Lumina2",
        _LUMINA,
        Text((Stream("gemma2_2b", before=("<bos>",), mask=True, loud_first=20.0),)),
        _REFINED,
        fed=("cap_embedder.1", "context_refiner"),
    ),
    "Z-Image": Architecture(
        "ZImage",
        {
            **_LUMINA,
            "dim": 256,  # the host modulates with 256 numbers, however narrow the network is
            "n_heads": 8,
            "n_kv_heads": 8,
            "n_layers": 1,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        Text(
            (Stream("qwen3_4b", before=(_IM, "user"), after=_ANSWER, mask=True, loud_first=20.0),)
        ),
        _REFINED,
        fed=("cap_embedder.1", "context_refiner"),
    ),
    "Anima": Architecture(
        "Anima",
        {"image_model": "anima", **_COSMOS},
        Text((Stream("qwen3_06b", mask=True), _t5()), with_t5_ids),
        (
            "blocks.N.cross_attn.k_proj",
            "blocks.N.cross_attn.v_proj",
            "llm_adapter.blocks.N.mlp.N",
            "llm_adapter.out_proj",
            *(
                f"llm_adapter.blocks.N.{kind}_attn.{part}_proj"
                for kind in ("cross", "self")
                for part in "qkvo"
            ),
        ),
        fed=("cross_attn",),
    ),
    "Cosmos-Predict2": Architecture(
        "CosmosT2IPredict2",
        {"image_model": "cosmos_predict2", **_COSMOS},
        Text((_t5(least=512, mask=True, zeroed=True),)),
        ("blocks.N.cross_attn.k_proj", "blocks.N.cross_attn.v_proj"),
        fed=("cross_attn",),
    ),
    "Wan 2": Architecture(
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 96,
            "ffn_dim": 192,
            "text_dim": WIDTH,
            "num_heads": 3,
            "num_layers": 2,
        },
        Text((_t5("umt5xxl", least=512, zeroed=True),)),
        ("blocks.N.cross_attn.k", "blocks.N.cross_attn.v", "text_embedding.N"),
        fed=("cross_attn", "text_embedding"),
    ),
    "ERNIE-Image": Architecture(
        "ErnieImage",
        {
            "image_model": "ernie",
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_layers": 2,
            "ffn_hidden_size": 192,
            "text_in_dim": WIDTH,
            "rope_axes_dim": (8, 12, 12),
        },
        Text((Stream("ministral3_3b", before=("<s>",), mask=True, loud_first=20.0),)),
        ("text_proj",),
        fed=("text_proj",),
    ),
    "Krea 2": Architecture(
        "Krea2",
        {
            "image_model": "krea2",
            "features": 96,
            "tdim": 32,
            "txtdim": WIDTH,
            "heads": 3,
            "kvheads": 3,
            "multiplier": 2,
            "layers": 2,
            "txtlayers": 12,
            "txtheads": 3,
            "txtkvheads": 3,
        },
        Text((_chat("qwen3vl_4b", layers=12),)),
        (
            *(
                f"txtfusion.{blocks}_blocks.N.{part}"
                for blocks in ("layerwise", "refiner")
                for part in (
                    *(f"attn.{name}" for name in ("gate", "wk", "wo", "wq", "wv")),
                    *(f"mlp.{name}" for name in ("down", "gate", "up")),
                )
            ),
            "txtfusion.projector",
            "txtmlp.N",
        ),
        fed=("txtmlp", "txtfusion"),
    ),
    "Kandinsky 5": Architecture(
        "Kandinsky5Image",
        {
            "image_model": "kandinsky5",
            "in_text_dim": WIDTH,
            "in_text_dim2": POOLED,
            "time_dim": 64,
            "model_dim": 96,
            "ff_dim": 192,
            "visual_embed_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (8, 12, 12),
        },
        Text(
            (_chat("qwen25_7b", after=("<|im_end|>",)), _clip("l", pooled=POOLED)),
            tokens_and_pooled("qwen25_7b", "l"),
        ),
        ("pooled_text_embeddings.in_layer", "text_embeddings.in_layer"),
        fed=("text_embeddings", "cross_attention"),
    ),
    "Hunyuan Image 2.1": Architecture(
        "HunyuanImage21",
        {
            "image_model": "hunyuan_video",
            **_FLUX,
            "in_channels": 64,
            "out_channels": 64,
            "patch_size": [1, 1],
            "axes_dim": [16, 16],
            "theta": 256,
            "vec_in_dim": None,
            "guidance_embed": False,
            "byt5": True,
            "meanflow": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
            "meanflow_sum": False,
        },
        Text(
            (
                _chat("qwen25_7b", after=("<|im_end|>",)),
                _t5("byt5", width=1472, mask=True, zeroed=True),
            ),
            with_byt5,
            {"byt5": re.compile(r'"(.*?)"')},
        ),
        (
            "txt_in.c_embedder.in_layer",
            "txt_in.c_embedder.out_layer",
            "txt_in.individual_token_refiner.blocks.N.self_attn.proj",
            "txt_in.individual_token_refiner.blocks.N.self_attn.qkv",
            "txt_in.input_embedder",
        ),
        fed=("txt_in", "txt_attn"),
        parameters=HunyuanVideoParams,
    ),
    "Lens": Architecture(
        "Lens",
        {
            "image_model": "lens",
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 3,
            "enc_hidden_dim": WIDTH,
            "axes_dims_rope": (8, 12, 12),
        },
        Text((_chat("gpt_oss", layers=4, only_masks=False, nothing_for_empty=True),)),
        ("txt_in",),
        fed=("txt_in", "txt_qkv"),
    ),
    "AuraFlow": Architecture(
        "AuraFlow",
        {
            "dim": 96,
            "global_conddim": 96,
            "cond_seq_dim": WIDTH,
            "n_layers": 3,
            "n_double_layers": 1,
            "n_heads": 3,
            "max_seq": 16 * 16,
        },
        Text((_t5("pile_t5xl", least=256, zeroed=True),)),
        ("cond_seq_linear",),
        fed=("cond_seq_linear", "attn.w1"),
    ),
    "SDXL": Architecture(
        "SDXL",
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "transformer_depth": [0, 1],
            "transformer_depth_middle": 1,
            "transformer_depth_output": [0, 0, 1, 1],
            "num_head_channels": 16,
            "num_heads": -1,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": True,
            "context_dim": 2 * WIDTH,
            "num_classes": "sequential",
            "adm_in_channels": POOLED + 6 * 256,
            "use_temporal_attention": False,
            "legacy": False,
        },
        Text((_clip("g", pooled=POOLED), _clip("l")), side_by_side),
        (
            *(
                f"{place}.transformer_blocks.N.attn2.to_{part}"
                for place in ("input_blocks.N.N", "middle_block.N", "output_blocks.N.N")
                for part in "kv"
            ),
            "label_emb.N.N",
        ),
        fed=("attn2",),
    ),
    "SD3": Architecture(
        "SD3",
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 2,
            "input_size": None,
            "adm_in_channels": 2 * POOLED,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 2 * WIDTH, "out_features": 64 * 2},
            },
            "num_patches": 32 * 32,
            "pos_embed_max_size": 32,
            "pos_embed_scaling_factor": None,
            "x_block_self_attn_layers": [],
        },
        Text(
            (
                _clip("g", width=WIDTH, pooled=POOLED),
                _clip("l", pooled=POOLED),
                _t5(width=2 * WIDTH, least=77),
            ),
            one_after_the_other,
        ),
        ("context_embedder", "y_embedder.mlp.N"),
        fed=("context_embedder", "context_block"),
        gains={"y_embedder": 0.1},
    ),
    "HiDream-I1": Architecture(
        "HiDream",
        {
            "image_model": "hidream",
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 3,
            "caption_channels": [WIDTH, WIDTH],
            "text_emb_dim": 2 * POOLED,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (8, 12, 12),
            "llama_layers": [0, 2, 3],
        },
        Text(
            (
                _clip("g", pooled=POOLED),
                _clip("l", pooled=POOLED),
                _t5(least=128, mask=True),
                Stream("llama", layers=4, before=("<|begin_of_text|>",), least=128),
            ),
            with_llama,
        ),
        (
            "caption_projection.N.linear",
            "p_embedder.pooled_embedder.linear_1",
            "p_embedder.pooled_embedder.linear_2",
        ),
        fed=("caption_projection", "_t."),
        gains={"p_embedder": 0.1},
    ),
    "Ideogram 4": Architecture(
        "Ideogram4",
        {
            "image_model": "ideogram4",
            "num_layers": 2,
            "num_attention_heads": 3,
            "attention_head_dim": 32,
            "intermediate_size": 192,
            "adaln_dim": 32,
            "llm_features_dim": 13 * WIDTH,
            "mrope_section": (6, 5, 5),
        },
        Text(
            (
                Stream(
                    "qwen3vl_8b",
                    layers=13,
                    before=(_IM, "user"),
                    after=_ANSWER,
                    mask=True,
                    loud_first=20.0,
                ),
            )
        ),
        ("llm_cond_proj",),
        fed=("llm_cond_proj",),
    ),
    "OmniGen 2": Architecture(
        "Omnigen2",
        {
            "image_model": "omnigen2",
            "hidden_size": 96,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 3,
            "multiple_of": 32,
            "axes_dim_rope": (8, 12, 12),
            "axes_lens": (600, 64, 64),
            "text_feat_dim": WIDTH,
        },
        Text((Stream("qwen25_3b", before=_SYSTEM, after=("<|im_end|>",), mask=True),)),
        (
            *(f"context_refiner.N.attn.to_{part}" for part in ("k", "out.N", "q", "v")),
            *(f"context_refiner.N.feed_forward.linear_{number}" for number in (1, 2, 3)),
            "time_caption_embed.caption_embedder.N",
        ),
        fed=("context_refiner", "caption_embedder"),
    ),
    "PixArt": Architecture(
        "PixArtSigma",
        {
            "image_model": "pixart_sigma",
            "in_channels": 4,
            "hidden_size": 96,  # a multiple of 3: two sizes are embedded beside the time
            "num_heads": 3,
            "depth": 2,
            "caption_channels": WIDTH,
            "micro_condition": False,
        },
        Text((_t5(pad="<pad>"),)),
        ("blocks.N.cross_attn.kv_linear", "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2"),
        fed=("cross_attn", "y_proj"),
        latent=36,  # the host divides by zero on smaller ones
    ),
    "LTX-Video": Architecture(
        "LTXV",
        {
            "image_model": "ltxv",
            "cross_attention_dim": 96,
            "attention_head_dim": 32,
            "num_attention_heads": 3,
            "caption_channels": WIDTH,
            "num_layers": 2,
        },
        Text((_t5(least=128, mask=True),)),
        (
            "caption_projection.linear_1",
            "caption_projection.linear_2",
            "transformer_blocks.N.attn2.to_k",
            "transformer_blocks.N.attn2.to_v",
        ),
        fed=("caption_projection", "attn2"),
    ),
}
# What newer hosts want to be told besides, where they insist on all.
_NEWER = {"txt_ids_dims": [], "vec_in_dim": None, "meanflow_sum": False}


def build(name: str):
    """MODEL and CLIP of an architecture.

    Args:
        name: a key of :data:`ARCHITECTURES`.
    """
    entry = ARCHITECTURES[name]
    with torch.inference_mode():
        inner = _network(entry)
        if name == "Anima":
            inner.diffusion_model.llm_adapter = _small_adapter()
        filled(inner.diffusion_model, lambda weight: _gain(entry, weight))
    return _patcher(inner), StandInClip(entry.text)


def build_packed(name: str, pack: Callable[[Tensor], Mapping[str, Tensor]], widths: int):
    """The same with matrices packed as in the host's own packed files.

    Args:
        pack: what stands in a file for a matrix (out, width), by what follows the layer's name.
        widths: matrices are packed whose width is a multiple of this.
    """
    entry, (plain, clip) = ARCHITECTURES[name], build(name)
    state: dict[str, Tensor] = {}
    for key, weight in plain.model.diffusion_model.state_dict().items():
        layer, _, kind = key.rpartition(".")
        if kind == "weight" and weight.ndim == MATRIX and weight.shape[1] % widths == 0:
            state |= {f"{layer}.{part}": value for part, value in pack(weight).items()}
        else:
            state[key] = weight
    with torch.inference_mode():
        inner = _network(entry, quant_config={"mixed_ops": True})
        inner.load_model_weights(state, "")
    return _patcher(inner), clip


def _network(entry: Architecture, **said: Any):
    config = getattr(comfy.supported_models, entry.config)(_accepted(entry))
    config.unet_config |= _accepted(entry)  # some put what the real one has over it
    vars(config).update(said)
    config.set_inference_dtype(torch.float32, torch.float32 if said else None)
    return config.get_model({}, "", comfy.model_management.unet_offload_device())


def _patcher(inner):
    management = comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(inner, device, offload)


def _accepted(entry: Architecture) -> dict[str, Any]:
    """What its network is made with, with what newer hosts want and without what older ones don't.

    Hosts detect it from a checkpoint and don't compare versions either.
    """
    made = dict(entry.network)
    if entry.parameters is None:
        return made
    names = {f.name for f in dataclasses.fields(entry.parameters)} | {"image_model"}
    return {key: value for key, value in {**_NEWER, **made}.items() if key in names}


def _gain(entry: Architecture, name: str) -> float:
    given = [gain for part, gain in entry.gains.items() if part in name]
    return (given or [2.0 if any(part in name for part in entry.fed) else 1.0])[0]


def _small_adapter() -> nn.Module:
    """The host builds Anima's at its full width, 0.2 billion numbers."""
    from comfy.ldm.anima.model import LLMAdapter
    from comfy.ops import disable_weight_init

    given = {"device": "cpu", "dtype": torch.float32, "operations": disable_weight_init}
    return LLMAdapter(WIDTH, WIDTH, WIDTH, num_layers=2, num_heads=3, **given)


def noisy(model, entry: Architecture, sigma: float, seed: int = 3) -> Tensor:
    """A latent of pure noise at a level, as the model takes it."""
    shape = latent_shape(model, entry.latent * latent_pixels(model))
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    sampling = model.get_model_object("model_sampling")
    level = torch.tensor([sigma])
    x = sampling.noise_scaling(level, noise, torch.zeros_like(noise), max_denoise=True)
    return with_frames(model, x)


def predicted(model, conditioning, x: Tensor, sigma: float) -> Tensor:
    """x0 as the host's samplers get it for a CONDITIONING."""
    comfy.model_management.load_models_gpu([model])
    with torch.inference_mode():
        conds = {"positive": comfy.sampler_helpers.convert_cond(conditioning)}
        conds = comfy.samplers.process_conds(model.model, x, conds, x.device, torch.zeros_like(x))
        model.pre_run()
        options = comfy.model_patcher.create_model_options_clone(model.model_options)
        comfy.sampler_helpers.prepare_model_patcher(model, {}, options)
        found = comfy.samplers.calc_cond_batch(
            model.model, [conds["positive"]], x, torch.tensor([sigma]), options
        )
        model.cleanup()
    return found[0]


def read_of(model, conditioning, x: Tensor, sigma: float) -> dict[str, list[Tensor]]:
    """What every linear layer reads in a prediction, by its name in the network."""
    found: dict[str, list[Tensor]] = {}

    def noting(name: str):
        return lambda _module, given: found.setdefault(name, []).append(given[0].clone())

    hooks = [
        module.register_forward_pre_hook(noting(name))
        for name, module in model.model.diffusion_model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        predicted(model, conditioning, x, sigma)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def readers_of_the_prompt_alone(
    model, clip, entry: Architecture, texts: Sequence[str] = ("a photo of a cat", "two dogs")
) -> list[str]:
    """Names of the linear layers that read the prompt and nothing else, as they are measured.

    What they read is the same, bit for bit, for two pictures at two noise levels, and another for
    another prompt.
    """
    own, other = map(clip.conditioning, texts)
    first = read_of(model, own, noisy(model, entry, 0.9, seed=1), 0.9)
    again = read_of(model, own, noisy(model, entry, 0.4, seed=2), 0.4)
    changed = read_of(model, other, noisy(model, entry, 0.9, seed=1), 0.9)
    return [
        name
        for name, read in first.items()
        if _alike(read, again.get(name, [])) and not _alike(read, changed.get(name, []))
    ]


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def numberless(name: str) -> str:
    """A layer's name with N for each number."""
    return re.sub(r"(?<=\.)\d+", "N", name)
