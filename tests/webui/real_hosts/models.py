"""The small models as these hosts want them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.emoji.build import build_emoji_checkpoint
from tools.checkpoint import build_checkpoint
from tools.environment import BUILD, HOST

from .webui_host import WebuiHost

EMOJI, OTHER = "emoji", "other"

# Stable Diffusion 1 as Automatic1111 describes it, with one level and a small autoencoder.
_CONFIG = """\
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    timesteps: 1000
    first_stage_key: jpg
    cond_stage_key: txt
    image_size: 8
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: 0.18215
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 8
        in_channels: 4
        out_channels: 4
        model_channels: 320
        attention_resolutions: [1]
        num_res_blocks: 1
        channel_mult: [1]
        num_heads: 8
        use_spatial_transformer: true
        transformer_depth: 1
        context_dim: 768
        use_checkpoint: false
        legacy: false
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 64
          in_channels: 3
          out_ch: 3
          ch: 32
          ch_mult: [1, 1, 1, 1]
          num_res_blocks: 1
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params:
        version: {clip}
"""


def install(host: WebuiHost) -> None:
    """Put the emoji model, another of its shape and the emoji TAESD where the host looks."""
    emoji = build_emoji_checkpoint(BUILD / "checkpoints" / "emoji.safetensors")
    other = build_checkpoint(BUILD / "checkpoints" / "other-seed.safetensors", seed=1)
    folder = host.work / "models" / "Stable-diffusion"
    for name, source in ((EMOJI, emoji), (OTHER, other)):
        target = folder / f"{name}.safetensors"
        if host.kind != "a1111":
            shutil.copy2(source, target)
            continue
        clip = _clip_folder(host.work / "clip")
        save_file(as_ldm(load_file(source)), target)
        target.with_suffix(".yaml").write_text(_CONFIG.replace("{clip}", str(clip)))
    _taesd(load_file(emoji), host.work / "models" / "VAE-taesd")


def as_ldm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint with the buffers of ldm, without which the host's schedule is undefined."""
    betas = np.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=np.float64) ** 2
    kept = np.cumprod(1 - betas)
    before = np.append(1.0, kept[:-1])
    buffers = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(kept),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - kept),
        "log_one_minus_alphas_cumprod": np.log(1 - kept),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / kept),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / kept - 1),
    }
    added = {name: torch.tensor(value, dtype=torch.float32) for name, value in buffers.items()}
    rest = {k: v for k, v in weights.items() if not k.startswith("first_stage_model.")}
    return {**rest, **added}


def _taesd(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """The emoji autoencoder under the names that these hosts look for beside their own."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("encoder", "decoder"):
        start = f"first_stage_model.taesd_{part}."
        found = {k[len(start) :]: v.float() for k, v in weights.items() if k.startswith(start)}
        # Their check for unsafe pickles knows no file that today's torch writes into its zips.
        path = folder / f"taesd_{part}.pth"
        torch.save(found, path, _use_new_zipfile_serialization=False)


def _clip_folder(folder: Path) -> Path:
    """Tokenizer and shape of CLIP-L, from the test host; its weights are in the checkpoint."""
    if not folder.exists():
        shutil.copytree(HOST / "comfy" / "sd1_tokenizer", folder)
        shape = json.loads((HOST / "comfy" / "sd1_clip_config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**shape, "model_type": "clip_text_model"}))
    return folder
