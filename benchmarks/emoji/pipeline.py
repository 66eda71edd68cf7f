"""The emoji checkpoint as a pipeline of diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny, StableDiffusionPipeline
from safetensors.torch import load_file

from tools.environment import HOST

TOKENIZER = HOST / "comfy" / "sd1_tokenizer"
SCHEDULE = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
}
_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [320],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def emoji_configuration(folder: Path) -> Path:
    """What diffusers must be told about the emoji checkpoint: a folder without weights."""
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **parts}
    index |= dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), [None, None])
    text = json.loads((HOST / "comfy" / "sd1_clip_config.json").read_text("utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "model_index.json": index,
        "unet/config.json": _UNET,
        "vae/config.json": {"_class_name": "AutoencoderTiny", "scaling_factor": 1.0},
        "scheduler/scheduler_config.json": SCHEDULE,
        "text_encoder/config.json": text,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), "utf-8")
    place_tokenizer(folder / "tokenizer")
    return folder


def place_tokenizer(folder: Path) -> Path:
    """CLIP's tokenizer of the host, which itself sees to the length of prompts."""
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    file = folder / "tokenizer_config.json"
    options = json.loads(file.read_text("utf-8")) | {"model_max_length": 77}
    file.write_text(json.dumps(options), "utf-8")
    return folder


def emoji_pipeline(checkpoint: Path, folder: Path) -> StableDiffusionPipeline:
    """The emoji checkpoint as a pipeline; ``folder`` takes its configuration."""
    return StableDiffusionPipeline.from_single_file(
        str(checkpoint),
        config=str(emoji_configuration(folder)),
        vae=emoji_autoencoder(checkpoint),
        local_files_only=True,
    )


def emoji_autoencoder(checkpoint: Path) -> AutoencoderTiny:
    """Its autoencoder, TAESD's, which diffusers doesn't read from checkpoints."""
    vae = AutoencoderTiny(scaling_factor=1.0)
    kept: dict[str, Any] = {}
    for name, value in load_file(checkpoint).items():
        part, _, rest = name.removeprefix("first_stage_model.").partition(".")
        if part in ("taesd_encoder", "taesd_decoder"):
            number, _, end = rest.partition(".")
            place = int(number) - (part == "taesd_decoder")  # the clamp is no layer there
            kept[f"{part.removeprefix('taesd_')}.layers.{place}.{end}"] = value.float()
    vae.load_state_dict(kept)
    return vae.eval()
