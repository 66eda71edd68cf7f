"""Whether an erasure fits the model and the text encoder that it meets, in words."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..files.fingerprint import fingerprint, same_fingerprint
from ..method.collateral import key_value_drift
from .erasure import Erasure


def other_base_warning(erasure: Erasure, name: str) -> str:
    """That an erasure was made on another model.

    Args:
        name: file name of the model that it meets; "" if unknown.
    """
    base = erasure.record["base"]["name"] or "another model"
    return (
        f"The erasure of {erasure.concept!r} was made on {base}, "
        f"this model is {name or 'a different one'}. It may erase less and change more."
    )


def is_of_encoder(erasure: Erasure, null: Tensor) -> bool:
    """Whether an erasure was made with the text encoder that gives this null prompt.

    Args:
        null: its token embeddings, (tokens, width).
    """
    return same_fingerprint(erasure.record["text_encoder"], fingerprint({"null": null}))


def other_encoder_warning(erasure: Erasure, null: Tensor, readers: Mapping[str, Tensor]) -> str:
    """That an erasure was made with another text encoder, and what comes of it.

    Args:
        null: token embeddings of the null prompt, (tokens, width).
        readers: the unpatched matrices that read tokens, (out, width), by the erasure's names.
    """
    text = f"The erasure of {erasure.concept!r} was made with another text encoder: "
    if not readers:
        return text + "what it changes besides isn't known."
    drift = key_value_drift(erasure.edit(), readers, null)
    return (
        f"{text}with this one the null prompt moves by {drift:.2%}, so other pictures change too."
    )
