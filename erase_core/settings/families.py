"""The model families: what differs between them, so that nothing else has to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .layers import READERS


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
        pooled_matrix: kohya LoRA name of the matrix that reads it, before anything else that the
            matrix reads; "" where none is known.
        joint: whether prompt and picture attend to each other in one sequence, so that a prompt
            can't be repeated without counting more.
        adds_in_place: whether the host's layers overwrite what a backward needs.
        token_streams: the host's names of the tokenizers whose tokens lie one after the other in
            an encoded prompt; of those that lie side by side, in one entry, the first that is there
            stands for all. Empty where there is but one.
        defaults: settings that are put over those of the preset.
        notes: what a person should know about erasing on it, for the report.
        diffusers_names: what diffusers calls the matrices that it doesn't read under their kohya
            names, by those; empty where it reads all of them; None where that isn't known.
        readers_known: whether :func:`layers.reads_prompt` can be believed about its matrices, which
            spares the predictions that would find the same.
    """

    name: str
    matrix_names: tuple[str, ...]
    architecture: str
    kohya_base: str
    pooled: bool = False
    pooled_matrix: str = ""
    joint: bool = False
    adds_in_place: bool = False
    token_streams: tuple[tuple[str, ...], ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    diffusers_names: Mapping[str, str] | None = field(default_factory=dict)
    readers_known: bool = True


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
    pooled_matrix="lora_unet_label_emb_0_0",
    token_streams=(("l", "g"),),
    defaults={"resolution": 1024},
)

# diffusers reads kohya names of SD3 and Flux without an error and finds nothing in them. ComfyUI
# knows both spellings.
_PROMPT_EMBEDDER = "transformer.context_embedder"
_POOLED_EMBEDDER = "transformer.time_text_embed.text_embedder.linear_1"

# Prompt and picture share one sequence there, but the prompt enters it through one matrix alone,
# which reads nothing else: the hard form holds for it as for keys and values.
_JOINT = {"layers": "text-input", "resolution": 1024}
_EXPERIMENTAL = "Experimental on this family: tried on shrunken models with random weights only."
SD3 = Family(
    "SD3",
    ("lora_unet_joint_blocks_", "lora_unet_context_embedder"),
    "stable-diffusion-v3-medium/lora",
    "sd3",
    pooled=True,
    pooled_matrix="lora_unet_y_embedder_mlp_0",
    joint=True,
    token_streams=(("l", "g"), ("t5xxl",)),
    diffusers_names={
        "lora_unet_context_embedder": _PROMPT_EMBEDDER,
        "lora_unet_y_embedder_mlp_0": _POOLED_EMBEDDER,
    },
    defaults=_JOINT,
    notes=(_EXPERIMENTAL,),
)
FLUX = Family(
    "Flux",
    ("lora_unet_double_blocks_", "lora_unet_single_blocks_", "lora_unet_txt_in"),
    "flux-1-dev/lora",
    "flux1",
    pooled=True,
    pooled_matrix="lora_unet_vector_in_in_layer",
    joint=True,
    adds_in_place=True,
    token_streams=(("t5xxl",),),
    diffusers_names={
        "lora_unet_txt_in": _PROMPT_EMBEDDER,
        "lora_unet_vector_in_in_layer": _POOLED_EMBEDDER,
    },
    defaults={**_JOINT, "guidance_scale": 1.0},
    notes=(_EXPERIMENTAL,),
)

FAMILIES = {family.name: family for family in (SD1, SD2, SD2_V, SDXL, SD3, FLUX)}

# What reads the prompt alone is found by predictions there, see :mod:`..model.readers`.
_MEASURED = {"layers": READERS, "resolution": 1024}


def generic(name: str) -> Family:
    """An architecture that is not in :data:`FAMILIES`, by the host's name for it.

    The layers that read its prompts, and what they read, are found by predictions.
    """
    return Family(
        name,
        ("lora_unet_",),
        name,
        name,
        joint=True,
        defaults=_MEASURED,
        notes=(
            "Experimental: no trained weights of this architecture were tried, only shrunken "
            "models with random ones.",
        ),
        diffusers_names=None,
        readers_known=False,
    )


def by_name(name: str) -> Family:
    """The family of a record or a denoiser; a generic one for a name that isn't known."""
    return FAMILIES.get(name) or generic(name)
