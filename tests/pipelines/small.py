"""Shrunken random models as pipelines of diffusers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from benchmarks.emoji.pipeline import SCHEDULE, place_tokenizer
from tools.environment import HOST

ENCODERS = HOST / "comfy" / "text_encoders"
GAIN = 1.0  # of random layers
WIDTH = 192  # of text encoders: the empty prompt's 77 tokens must leave room
_SCHEDULE = {key: value for key, value in SCHEDULE.items() if not key.startswith("_")}
_TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": WIDTH,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
}


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer."""
    return transformers.CLIPTokenizer.from_pretrained(str(place_tokenizer(folder / "clip")))


def t5_tokenizer() -> Any:
    """T5's tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(str(ENCODERS / "t5_tokenizer"))


def clip(projected: bool = False) -> Any:
    """A random CLIP text encoder."""
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return spread(kind(transformers.CLIPTextConfig(**_TEXT)))


def t5(width: int = WIDTH) -> Any:
    """A random T5 encoder, without places: its padding is hundreds of tokens that are all alike."""
    sizes = {"d_model": width, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    config = transformers.T5Config(**sizes, vocab_size=32128)
    encoder = spread(transformers.T5EncoderModel(config))
    for name, weight in encoder.named_parameters():
        if "relative_attention_bias" in name:
            weight.data.zero_()
    return encoder


def decoder() -> Any:
    """A random language model, as the newer pipelines read prompts with."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Gemma2Config(**sizes, **heads, vocab_size=32128)
    return spread(transformers.Gemma2Model(config))


def spread(module: Any, seed: int = 0) -> Any:
    """Random weights under which a prompt matters: each layer hands on as much as it is given."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1 and "embedding" not in name and "shared" not in name:
            noise = noise * GAIN / weight[0].numel() ** 0.5
        elif weight.ndim == 1:
            noise = 0.1 * noise + float("norm" in name and name.endswith("weight"))
        weight.data.copy_(noise)
    return module.eval()


def vae(channels: int = 4) -> Any:
    """An autoencoder that nothing is drawn with, of eight pixels a side."""
    small_vae = diffusers.AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
    )
    return spread(small_vae)


def sd1(folder: Path) -> Any:
    """A shrunken SD1."""
    unet = diffusers.UNet2DConditionModel(**_UNET, cross_attention_dim=WIDTH)
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(folder),
        unet=spread(unet),
        scheduler=diffusers.DDIMScheduler(**_SCHEDULE, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(folder: Path) -> Any:
    """A shrunken SDXL."""
    unet = diffusers.UNet2DConditionModel(
        **_UNET,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    tokenizer = clip_tokenizer(folder)
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=spread(unet),
        scheduler=diffusers.EulerDiscreteScheduler(**_SCHEDULE),
        add_watermarker=False,
    )


def sd3(folder: Path) -> Any:
    """A shrunken SD3."""
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
    )
    tokenizer = clip_tokenizer(folder)
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(),
        text_encoder=clip(projected=True),
        text_encoder_2=clip(projected=True),
        text_encoder_3=t5(2 * WIDTH),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer(),
        transformer=spread(network),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(folder: Path) -> Any:
    """A shrunken Flux."""
    network = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=spread(network),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def pixart(folder: Path) -> Any:
    """A shrunken PixArt Sigma."""
    network = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=WIDTH,
        cross_attention_dim=24,
        out_channels=8,
        in_channels=4,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=spread(network),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def sana(folder: Path) -> Any:
    """A shrunken Sana."""
    network = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=8,
    )
    return diffusers.SanaPipeline(
        vae=vae(),
        text_encoder=decoder(),
        tokenizer=t5_tokenizer(),
        transformer=spread(network),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def lumina2(folder: Path) -> Any:
    """A shrunken Lumina 2."""
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return diffusers.Lumina2Pipeline(
        vae=vae(),
        text_encoder=decoder(),
        tokenizer=t5_tokenizer(),
        transformer=spread(network),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def auraflow(folder: Path) -> Any:
    """A shrunken AuraFlow."""
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=spread(network),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.7),
    )


def qwen_image(folder: Path) -> Any:
    """A shrunken Qwen-Image."""
    network = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    small_vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return diffusers.QwenImagePipeline(
        vae=small_vae,
        text_encoder=decoder(),
        tokenizer=t5_tokenizer(),
        transformer=spread(network),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


PIPELINES = {
    "SD1.x": sd1,
    "SDXL": sdxl,
    "SD3": sd3,
    "Flux": flux,
    "PixArt": pixart,
    "Sana": sana,
    "Lumina2": lumina2,
    "AuraFlow": auraflow,
    "QwenImage": qwen_image,
}


def state_of(pipe: Any) -> dict[str, Any]:
    """Everything of a pipeline that must be the same afterwards."""
    found: dict[str, Any] = {"config": repr(sorted(pipe.config.items(), key=str))}
    for name, part in pipe.components.items():
        found[name] = id(part)
        if isinstance(part, torch.nn.Module):
            found[f"{name} weights"] = {
                key: (id(p), p.requires_grad, hash(p.detach().numpy().tobytes()))
                for key, p in part.named_parameters()
            }
            found[f"{name} modules"] = [
                (m.training, list(m._forward_hooks), list(m._forward_pre_hooks), sorted(vars(m)))
                for m in part.modules()
            ]
    scheduler = pipe.scheduler
    found["scheduler"] = repr({k: v for k, v in vars(scheduler).items() if k != "generator"})
    return found


def latents(pipe: Any, prompt: str = "a photo of a cat", steps: int = 2) -> torch.Tensor:
    """What a pipeline samples, before it is made a picture."""
    before, known = {**vars(pipe.scheduler)}, inspect.signature(pipe.__call__).parameters
    as_asked = {"use_resolution_binning": False} if "use_resolution_binning" in known else {}
    pipe.set_progress_bar_config(disable=True)
    try:
        drawn = pipe(
            prompt,
            num_inference_steps=steps,
            height=64,
            width=64,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **as_asked,
        )
    finally:
        vars(pipe.scheduler).clear()
        vars(pipe.scheduler).update(before)
    return drawn.images.float()
