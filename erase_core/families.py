"""The model families: what differs between them, so that nothing else has to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What a family of models needs said about it.

    Attributes:
        name: as records and messages call it.
        matrix_names: how the kohya LoRA names of its matrices begin, in the spelling that other
            tools expect for this family.
        architecture: its name in ModelSpec metadata.
        kohya_base: its name in kohya's metadata.
        pooled: whether the model takes a pooled vector of the prompt beside its tokens.
        defaults: settings that are put over those of the preset.
        notes: what a person should know about erasing on it, for the report.
    """

    name: str
    matrix_names: tuple[str, ...]
    architecture: str
    kohya_base: str
    pooled: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# kohya names SD1 and SD2 after diffusers' blocks, SDXL after the original code's.
_DIFFUSERS_BLOCKS = ("lora_unet_down_blocks_", "lora_unet_mid_block_", "lora_unet_up_blocks_")
_ORIGINAL_BLOCKS = (
    "lora_unet_input_blocks_",
    "lora_unet_middle_block_",
    "lora_unet_output_blocks_",
)

SD1 = Family("SD1.x", _DIFFUSERS_BLOCKS, "stable-diffusion-v1/lora", "sd_v1")
SD2 = Family("SD2", _DIFFUSERS_BLOCKS, "stable-diffusion-v2-512/lora", "sd_v2")
SD2_V = Family(
    "SD2 (v)",
    _DIFFUSERS_BLOCKS,
    "stable-diffusion-v2-768-v/lora",
    "sd_v2_v",
    defaults={"resolution": 768},
)
SDXL = Family(
    "SDXL",
    _ORIGINAL_BLOCKS,
    "stable-diffusion-xl-v1-base/lora",
    "sdxl_base_v1-0",
    pooled=True,
    defaults={"resolution": 1024},
)

FAMILIES = {family.name: family for family in (SD1, SD2, SD2_V, SDXL)}
