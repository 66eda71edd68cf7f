"""Which family the host's model is of, and whether it can be trained on."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..erase_core.settings import families
from ..erase_core.settings.families import Family
from .errors import UnsupportedModelError

# Numbers beside the pooled vector that SDXL reads: height, width, crop and target, 256 of each.
SIZES_OF_SDXL = 6 * 256
SIZES_OF_REFINER = 5 * 256
_PACKED = ("gguf_cls", "bnb_quantized", "quant_state")


def family_of(sd_model: Any, network: nn.Module, predicts_v: bool) -> Family:
    """The family of the loaded model.

    Args:
        sd_model: the host's ``shared.sd_model``.
        network: its U-Net or transformer.
        predicts_v: whether the network predicts v.

    Raises:
        UnsupportedModelError: one that can't be trained on.
    """
    if getattr(sd_model, "is_sdxl", False):
        _refuse_refiner(network)
        return families.SDXL
    if getattr(sd_model, "is_sd3", False):
        raise UnsupportedModelError(
            "SD3 can't be trained on in this host. Load an SD1, SD2 or SDXL checkpoint, or train "
            "it in ComfyUI: the file works here all the same."
        )
    if getattr(sd_model, "is_sd2", False):
        return families.SD2_V if predicts_v else families.SD2
    if getattr(sd_model, "is_sd1", False) or hasattr(network, "input_blocks"):
        return families.SD1
    if hasattr(network, "double_blocks") and hasattr(network, "vector_in"):
        return families.FLUX
    return families.generic(type(sd_model).__name__)


def _refuse_refiner(network: nn.Module) -> None:
    reader = dict(network.named_modules()).get("label_emb.0.0")
    weight = getattr(reader, "weight", None)
    if weight is not None and weight.shape[1] == SIZES_OF_REFINER + 1280:
        raise UnsupportedModelError(
            "This is SDXL's refiner, which reads prompts for the last steps alone. Load the base "
            "model: an erasure trained on it is what is drawn."
        )


def refuse_packed(network: nn.Module) -> None:
    """Weights that are packed bytes can't be trained on here.

    Raises:
        UnsupportedModelError: GGUF, NF4 and the like.
    """
    for path, module in network.named_modules():
        weight = getattr(module, "weight", None)
        packed = weight is not None and not weight.is_floating_point()
        if packed or any(hasattr(weight, name) for name in _PACKED):
            raise UnsupportedModelError(
                f"The weights of this model are packed ({path}: {type(weight).__name__}), as in "
                "GGUF and NF4 files, and can't be trained on here. Load it in fp16, bf16 or fp8."
            )
