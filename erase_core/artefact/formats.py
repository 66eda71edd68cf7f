"""Names and layouts that other tools read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files.digest import content_hash
from ..settings.families import SD2, SD2_V, by_name
from ..settings.settings import PRESETS, SOFT_PRESETS, preset_settings
from .record import read_record

RECORD_KEY = "concept_surgery"
# The first is of the record and of the tensors with their names; files of version 0.7.0 and older
# lack it. The other, ModelSpec's, is of the tensors' values alone, and every file has it.
HASH_KEY, VALUES_KEY = "concept_surgery_hash", "modelspec.hash_sha256"
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
# What is larger fits no weight in half precision.
LARGEST = torch.finfo(torch.float16).max
LONGEST_MATRIX = 120  # letters of its name
_MATRIX = re.compile(rf"\w{{1,{LONGEST_MATRIX}}}")  # no dots, which names of other weights have
PEFT_DOWN, PEFT_UP = ".lora_A.weight", ".lora_B.weight"
KOHYA, DIFFUSERS = NAMINGS = ("kohya", "diffusers")
LAYERS_KEY = "diffusers_layers"  # of a record, where diffusers' names aren't the family's


def kohya_tensors(bases: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``dW = B R^T`` as a kohya LoRA: up = B, down = R^T, alpha = rank.

    Every matrix gets its own copy of R^T, since that is what readers of the format expect.
    """
    tensors = {}
    for name, factor in factors.items():
        basis = bases[name]
        tensors[name + DOWN] = basis.T.contiguous().clone()
        tensors[name + UP] = factor.contiguous()
        tensors[name + ALPHA] = torch.tensor(float(basis.shape[1]))
    return tensors


def diffusers_tensors(
    bases: Mapping[str, Tensor],
    factors: Mapping[str, Tensor],
    family: str,
    layers: Any = (),
) -> dict[str, Tensor]:
    """The same under the names that diffusers reads: PEFT's, or kohya's where it knows those.

    Without an alpha, which PEFT keeps elsewhere: readers then take the rank for it.

    Args:
        layers: what a record says of its layers in diffusers, see :func:`layer_names`.

    Raises:
        ValueError: a matrix that diffusers has another layout for, or a family that isn't known.
    """
    known = by_name(family).diffusers_names
    if known == {}:
        return kohya_tensors(bases, factors)
    names = {**layer_names(layers), **(known or {})}
    odd = sorted(set(factors) - set(names))
    if odd:
        raise ValueError(
            f"What diffusers calls {odd[0]} of {family} isn't known here"
            + (f", nor {len(odd) - 1} more of its matrices" if odd[1:] else "")
            + "."
        )
    tensors = {}
    for name, factor in factors.items():
        tensors[names[name] + PEFT_DOWN] = bases[name].T.contiguous().clone()
        tensors[names[name] + PEFT_UP] = factor.contiguous()
    return tensors


def layer_names(layers: Any) -> dict[str, str]:
    """PEFT's names of layers by their kohya names.

    Args:
        layers: what a record says of layers that diffusers calls otherwise than the hosts: their
            places in its network, with dots. Anything else, as a damaged file may have, is nothing.
    """
    paths = [path for path in layers if isinstance(path, str)] if isinstance(layers, list) else []
    return {f"lora_unet_{path.replace('.', '_')}": f"transformer.{path}" for path in paths}


def as_kohya(tensors: Mapping[str, Tensor], family: Any, layers: Any = ()) -> Mapping[str, Tensor]:
    """Tensors of a file under kohya names, whichever of the two it has; unknown names stay.

    Args:
        family: what the file's record says.
        layers: likewise, see :func:`layer_names`.
    """
    names = (by_name(family).diffusers_names if isinstance(family, str) else None) or {}
    known = {theirs: ours for ours, theirs in {**layer_names(layers), **names}.items()}
    kohya = {}
    for key, tensor in tensors.items():
        name, end = next(
            ((key[: -len(e)], e) for e in (PEFT_DOWN, PEFT_UP) if key.endswith(e)), (key, "")
        )
        if name not in known:
            kohya[key] = tensor
        elif end == PEFT_UP:
            kohya[known[name] + UP] = tensor
        else:
            kohya[known[name] + DOWN] = tensor
            kohya[known[name] + ALPHA] = torch.tensor(
                float(tensor.shape[0]) if tensor.ndim else 0.0
            )
    return kohya


def read_kohya_tensors(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """R and B by matrix name from the tensors of a file; equal R come back as one tensor.

    Raises:
        ValueError: a tensor is missing, misshapen, of another type than float32, not finite or too
            large for any weight, or alpha isn't the rank.
    """
    names = sorted(key[: -len(UP)] for key in tensors if key.endswith(UP))
    expected = {name + suffix for name in names for suffix in (DOWN, UP, ALPHA)}
    odd = sorted(expected.symmetric_difference(tensors))
    odd += [name for name in names if not _MATRIX.fullmatch(name)]
    if not names or odd:
        some = [name[:LONGEST_MATRIX] for name in odd[:3]]
        raise ValueError(f"its tensors are not those of an erasure (for example {some}).")
    bases: dict[str, Tensor] = {}
    factors = {}
    last = None
    for name in names:
        up, down, alpha = (tensors[name + suffix] for suffix in (UP, DOWN, ALPHA))
        _refuse_what_is_no_edit(name, up, down, alpha)
        if last is None or not torch.equal(down.T, last):
            last = down.T.contiguous()
        bases[name], factors[name] = last, up
    return bases, factors


def _refuse_what_is_no_edit(name: str, up: Tensor, down: Tensor, alpha: Tensor) -> None:
    if any(tensor.dtype != torch.float32 for tensor in (up, down, alpha)):
        raise ValueError(f"the values of {name} are not in float32.")
    fits = up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0]
    if not fits or 0 in (*up.shape, *down.shape):
        shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
        raise ValueError(f"the values of {name} have wrong shapes, {shapes}.")
    # Not a number is never within bounds.
    if not all(bool((values.abs() <= LARGEST).all()) for values in (up, down)):
        raise ValueError(f"the values of {name} are not finite or too large for any weight.")
    # Loaders scale by alpha / rank. Something else than 1 is not what was trained and measured.
    if alpha.ndim or float(alpha) != len(down):
        raise ValueError(f"alpha of {name} is {alpha.tolist()} and not its rank {len(down)}.")


def has_hash(metadata: Mapping[str, str]) -> bool:
    """Whether a file says what its content must be."""
    return not {HASH_KEY, VALUES_KEY}.isdisjoint(metadata)


def content_problem(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Why the content of a file isn't what was written; "" if it is.

    Files of version 0.7.0 and before say what their values must be and nothing of the record.
    """
    if HASH_KEY in metadata:
        same = metadata[HASH_KEY] == content_hash(metadata[RECORD_KEY], tensors)
    elif VALUES_KEY in metadata:
        same = metadata[VALUES_KEY] == f"0x{tensor_hash(tensors)}"
    else:
        return "it doesn't say what its content must be, which every erasure does"
    return "" if same else "its content is not what was saved"


def metadata(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], stem: str = ""
) -> dict[str, str]:
    """File metadata: our record, ModelSpec 1.0.1, and the kohya keys that managers show.

    Args:
        stem: name of the file without its ending. Automatic1111 puts it into prompts as the name
            of the LoRA, where two files of one name or a ``:`` in it would do nothing.

    Raises:
        ValueError: a record that couldn't be read again.
    """
    settings, family = record["settings"], by_name(record["family"])
    concepts = concept_list(record)
    base = record["base"]["name"] or record["family"]
    title = f"Erase {concepts} ({_preset(record)}, {base})"
    text = json.dumps(record, sort_keys=True)
    read_record(text)
    info = {
        RECORD_KEY: text,
        HASH_KEY: content_hash(text, tensors),
        "modelspec.sai_model_spec": "1.0.1",
        # Forge matches these two strings exactly when it sorts LoRAs by base model.
        "modelspec.architecture": family.architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": f"{stem}: {title}" if stem else title,
        "modelspec.description": (f"Concept erasure. Removes {concepts}; apply at strength 1."),
        "modelspec.resolution": f"{settings['resolution']}x{settings['resolution']}",
        "modelspec.date": record["created"],
        VALUES_KEY: f"0x{tensor_hash(tensors)}",
        "ss_base_model_version": family.kohya_base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(record["rank"]),
        "ss_network_alpha": str(record["rank"]),
    }
    if stem:
        info["ss_output_name"] = stem
    if family in (SD2, SD2_V):  # else Automatic1111 takes it for SD1 and hides it under an SD2
        info["ss_v2"] = "True"
    return info


def _preset(record: Mapping[str, Any]) -> str:
    """The preset whose steps and trajectories a run had."""
    settings = record["settings"]
    count = len(settings.get("concepts") or record["concepts"])
    form, names = ("soft", SOFT_PRESETS) if record["form"] == "soft" else ("hard", PRESETS)
    for name in names:
        preset = preset_settings(name, concepts=[f"{n}" for n in range(count)], form=form)
        amounts = ("steps", "trial_steps", "trajectories")
        if all(settings.get(amount) == getattr(preset, amount) for amount in amounts):
            return name
    return "own settings"


def concept_list(record: Mapping[str, Any], most: int = 5) -> str:
    """The concepts of a record in words: "cat or kitten (replaced by dog), pizza"."""
    names = [" or ".join([c["text"], *c.get("also", ())]) for c in record["concepts"]]
    named = [
        f"{name} (replaced by {c['alternative']})" if c["alternative"] else name
        for name, c in zip(names, record["concepts"], strict=True)
    ]
    more = len(named) - most
    return ", ".join(named[:most]) + (f" and {more} more" if more > 0 else "")


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
