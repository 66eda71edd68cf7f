"""Whether a CLIP is of the model's kind: whether it gives as many numbers as the model reads."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from ..erase_core.model.prompt import Encoded
from ..erase_core.settings import families
from ..erase_core.settings.families import Family
from ..erase_core.settings.layers import ENTRANCES, reads_prompt
from .encoding import encode_null
from .families import UnsupportedModelError, model_family
from .matrices import kohya_keys, original_weights, trained_keys

# The node that loads the text encoder of a family, and what it is given.
_LOADERS = {
    families.SD1.name: "Load CLIP with clip_l and the type stable_diffusion",
    families.SD2.name: "Load CLIP with OpenCLIP-H and the type stable_diffusion",
    families.SD2_V.name: "Load CLIP with OpenCLIP-H and the type stable_diffusion",
    families.SDXL.name: "DualCLIPLoader with clip_l and clip_g and the type sdxl",
    families.SD3.name: "TripleCLIPLoader with clip_l, clip_g and t5xxl",
    families.FLUX.name: "DualCLIPLoader with clip_l and t5xxl and the type flux",
}
_ANY_LOADER = "Load CLIP with the type that bears the model's name"
MATRIX = 2  # dimensions of one
SIDE_BY_SIDE = 12  # layers of a text encoder that Krea 2 is given


def refuse_another_kind(model, clip) -> None:
    """A CLIP of another kind ends the run before its prompts are encoded.

    Raises:
        UnsupportedModelError: it gives other numbers than the model reads.
    """
    problem = misfit(model, encode_null(clip))
    if problem:
        raise UnsupportedModelError(problem)


def misfit(model, null: Encoded) -> str:
    """Why the model can't read what a CLIP gives, and which to connect; "" if it can.

    No model is loaded for it.

    Args:
        model: the host's ModelPatcher.
        null: the empty prompt as the CLIP gives it, with its pooled vector where it has one.
    """
    family, width = model_family(model), null.tokens.shape[-1]
    reads = _widths_of_tokens(model, family)
    if not (width in reads if reads else _takes_somewhere(model, width)):
        return _another(family, f"{width} numbers for each token", max(reads, default=None))
    read = _width_of_pooled(model) if family.pooled else None
    if read is None or (null.pooled is not None and len(null.pooled) == read):
        return ""
    gives = "no pooled vector" if null.pooled is None else f"a pooled vector of {len(null.pooled)}"
    return _another(family, gives, read)


def _another(family: Family, gives: str, reads: int | None) -> str:
    reading = "has no layer that reads as many" if reads is None else f"reads {reads}"
    return (
        f"The connected CLIP is not of this model's kind: it gives {gives}, and this model "
        f"({family.name}) {reading}. Connect the CLIP of the model's own checkpoint, or load it "
        f"with {_LOADERS.get(family.name, _ANY_LOADER)}."
    )


def _widths_of_tokens(model, family: Family) -> set[int]:
    """How many numbers of a token the model reads; nothing where no name says it."""
    if family.readers_known:
        # They all read the same.
        keys = [key for name, key in trained_keys(model).items() if reads_prompt(name)][:1]
    else:
        keys = [
            key
            for name, key in kohya_keys(model).items()
            if any(fnmatchcase(name, pattern) for pattern in ENTRANCES)
        ]
    weights = original_weights(model, dict(zip(keys, keys, strict=True)))
    return {weight.shape[1] for weight in weights.values() if weight.ndim == MATRIX}


def _takes_somewhere(model, width: int) -> bool:
    """Whether any weight is as wide, be it a matrix that reads the tokens or a norm before it.

    Krea 2 is given several layers of a text encoder side by side, and reads each by itself.
    """
    weights = model.model.diffusion_model.state_dict().values()
    widths = {weight.shape[-1] for weight in weights if weight.ndim}
    return width in widths or (width % SIDE_BY_SIDE == 0 and width // SIDE_BY_SIDE in widths)


def _width_of_pooled(model) -> int | None:
    """How many numbers the pooled vector must have; None where that isn't known."""
    known = (family.pooled_matrix for family in families.FAMILIES.values())
    keys = kohya_keys(model)
    name = next((name for name in known if name in keys), None)
    if name is None:
        return None
    matrix = original_weights(model, {name: keys[name]})[name]
    # Some read other numbers with it, such as the size of the picture.
    beside = model.model.encode_adm(pooled_output=torch.zeros(1, 0), device=torch.device("cpu"))
    return matrix.shape[1] - beside.shape[1] or None
