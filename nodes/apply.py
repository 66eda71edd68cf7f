"""The node that puts an erasure on a model."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.lora
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..erase_core import Erasure, SettingsError
from ..erase_core.artefact.fit import is_of_encoder, other_base_warning, other_encoder_warning
from ..erase_core.artefact.formats import kohya_tensors
from ..erase_core.artefact.stack import (
    EXACT,
    MERGE,
    STRONGEST,
    AppliedErasure,
    applied_twice_problem,
    harm_text,
    left_behind_warnings,
    overlap_warnings,
    rounding_warnings,
    stack_text,
    together_text,
)
from ..erase_core.artefact.together import changes_together
from ..erase_core.method.collateral import WordChanges
from ..erase_core.settings.layers import LayerRuleError, reads_prompt
from ..erase_core.settings.widgets import check_choice
from .downstream import weight_takers
from .encoding import encode_null
from .exact import add_side_path
from .families import UnsupportedModelError
from .host import ComfyDenoiser
from .kinds import misfit
from .matrices import is_base_of, known_matrices, kohya_keys, original_weights
from .messages import upstream_file, warn_all
from .packed import coarse_format
from .refusals import refusal
from .schema import CATEGORY, ErasureType, compatible
from .stores import language_store

MODES = (MERGE, EXACT)
ATTACHMENT = "concept_surgery_applied"


class ApplyError(ValueError):
    """An erasure that doesn't fit the model."""


class ApplyErasure(io.ComfyNode):
    """MODEL and ERASURE in, patched MODEL out; the input model stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs as the host shows them."""
        return compatible(
            io.Schema,
            node_id="ConceptSurgeryApply",
            display_name="Apply Erased UNet",
            category=CATEGORY,
            description=(
                "Puts an erasure on a model, as a patch. Several can follow one another, in any "
                "order and mixed with LoRAs. Strength 0 is the model as it came in."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model of the loader (LoRAs are fine)."),
                ErasureType.Input("erasure", tooltip="From Train Concept Erasure or Load Erasure."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-STRONGEST,
                    max=STRONGEST,
                    step=0.05,
                    tooltip="1 erases as trained, 0 is the untouched model, above 1 pushes further,"
                    " below 0 draws the concept more.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=MERGE,
                    optional=True,  # graphs saved before there was a choice
                    tooltip="merge: puts the change into the weights, as a LoRA; no loss of speed. "
                    "exact: keeps it beside the weights. Choose exact on fp8, fp16 or bf16 models "
                    "when the empty prompt and the kept prompts must give identical pictures; it "
                    "is a little slower, and a compiled model runs uncompiled. Nodes that save or "
                    "merge models lose what is exact: choose merge for those.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Connect to check that the erasure was made with this text encoder, "
                    "and how much several erasures together change besides.",
                ),
            ],
            outputs=[io.Model.Output("patched_model", display_name="MODEL")],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(cls, mode: str = MERGE) -> bool | str:
        """Refuse an unknown mode before anything is trained for it."""
        try:
            check_choice("mode", mode, MODES)
        except SettingsError as error:
            return refusal(error, cls)
        return True

    @classmethod
    def execute(
        cls, model, erasure: Erasure, strength: float, mode: str = MERGE, clip=None
    ) -> io.NodeOutput:
        """Patch a clone of the model."""
        patched = apply_erasure(model, erasure, strength, mode)
        name = upstream_file(cls.hidden.prompt, cls.hidden.unique_id, "model")
        warnings = mismatches(model, erasure, clip, name)
        if strength:
            warnings += overlap_warnings(applied_to(model), erasure)
        if strength and mode == EXACT:
            takers = weight_takers(cls.hidden.prompt, cls.hidden.unique_id)
            warnings += left_behind_warnings(erasure, takers)
        if strength and mode == MERGE:
            warnings += rounding_warnings(coarse_formats(model, erasure))
        changes = None if clip is None else stack_changes(patched, clip)
        warnings += harm_text(applied_to(patched), changes)
        warn_all(warnings, cls.hidden.unique_id, stack_report(patched, changes))
        return io.NodeOutput(patched)


def apply_erasure(model, erasure: Erasure, strength: float, mode: str = MERGE):
    """A clone of the host's model with the erasure on it; at strength 0 with nothing on it.

    Merged, it is a patch that the host's own LoRA code makes from the tensors that the file holds,
    so the pictures are those of a stock LoRA loader. Exact, it rides beside the weights, see
    :mod:`.exact`.

    Raises:
        ApplyError: wrong strength or mode, another architecture, or the erasure, or a part of it,
            is already on the model.
        ExactModeError: exact, and the host can't.
    """
    if mode not in MODES:
        raise ApplyError(f"mode must be {' or '.join(map(repr, MODES))}, not {mode!r}.")
    if not -STRONGEST <= strength <= STRONGEST:
        raise ApplyError(
            f"strength must be between {-STRONGEST:g} and {STRONGEST:g}, not {strength!r}."
        )
    keys = _matching_keys(model, erasure)
    applied = applied_to(model)
    twice = applied_twice_problem(applied, erasure, _loras_on(model, keys))
    if twice:
        raise ApplyError(twice)
    patched = model.clone()
    if strength == 0:
        return patched
    if mode == EXACT:
        add_side_path(patched, erasure, keys, strength)
    else:
        _merge(patched, erasure, keys, strength)
    patched.set_attachments(ATTACHMENT, (*applied, AppliedErasure.of(erasure, mode, strength)))
    return patched


def mismatches(model, erasure: Erasure, clip, name: str) -> list[str]:
    """Warnings when the erasure was made on another base or with another text encoder."""
    warnings = []
    if not is_base_of(model, erasure.record):
        warnings.append(other_base_warning(erasure, name))
    if clip is None:
        return warnings
    encoded = encode_null(clip)
    misfits = misfit(model, encoded)
    if misfits:
        warnings.append(misfits)
    elif not is_of_encoder(erasure, encoded.tokens):
        keys = _matching_keys(model, erasure)
        readers = original_weights(model, {n: key for n, key in keys.items() if reads_prompt(n)})
        warnings.append(other_encoder_warning(erasure, encoded.tokens, readers))
    return warnings


def applied_to(model) -> tuple[AppliedErasure, ...]:
    """The erasures on a model, in the order in which they were applied."""
    return model.get_attachment(ATTACHMENT) or ()


def coarse_formats(model, erasure: Erasure) -> list[str]:
    """What the weights that an erasure changes are kept in, of those kept in few bits."""
    keys = kohya_keys(model)
    layers = (keys[name].removesuffix(".weight") for name in erasure.factors)
    found = {coarse_format(model.model.get_submodule(layer).weight) for layer in layers}
    return sorted(found - {""})


def stack_report(model, changes: WordChanges | None = None) -> str:
    """What stays exact on a model that carries several erasures, and what changes; "" for fewer.

    Args:
        changes: of words that nobody named, where they are known.
    """
    weight = next(iter(known_matrices(model).values()))
    applied = applied_to(model)
    texts = [stack_text(applied, str(weight.dtype).removeprefix("torch."))]
    return " ".join([text for text in (*texts, together_text(applied, changes)) if text])


def stack_changes(model, clip) -> WordChanges | None:
    """How far words that nobody named change by all erasures on a model; None if not known."""
    applied = applied_to(model)
    if len(applied) < 2:
        return None
    try:
        denoiser = ComfyDenoiser(model, clip, "", 1, 64)  # to read words with: it loads no model
    except (UnsupportedModelError, LayerRuleError):
        return None
    known = kohya_keys(model)
    erasures = [(one.erasure, one.strength) for one in applied if one.erasure is not None]
    names = {name for erasure, _ in erasures for name in erasure.factors if reads_prompt(name)}
    weights = original_weights(model, {name: known[name] for name in sorted(names)})
    return changes_together(erasures, denoiser, weights, language_store())


def _merge(patcher, erasure: Erasure, keys: Mapping[str, str], strength: float) -> None:
    """Add the erasure to the patches of the host's ModelPatcher.

    Raises:
        ApplyError: the host took fewer changes than it was given.
    """
    patches = comfy.lora.load_lora(kohya_tensors(erasure.bases, erasure.factors), keys)
    accepted = patcher.add_patches(patches, strength)
    sent = set(keys.values())
    if set(accepted) != sent:
        raise ApplyError(
            f"The host took {len(accepted)} of the {len(sent)} changes of the erasure of "
            f"{erasure.concept!r}. Sent and not taken: {_some(sent - set(accepted))}; taken: "
            f"{_some(accepted)}. The model was left as it was; connect the MODEL of a core loader."
        )


def _matching_keys(model, erasure: Erasure) -> dict[str, str]:
    """Host key of every matrix of the erasure.

    Raises:
        ApplyError: matrices that the model doesn't have, or of another shape.
    """
    known = kohya_keys(model)
    # The host knows names for biases and for parts of matrices, too, which no erasure changes.
    matrices = {
        name: key for name, key in known.items() if isinstance(key, str) and key.endswith(".weight")
    }
    missing = [name for name in erasure.factors if name not in matrices]
    if missing:
        raise ApplyError(
            f"The erasure of {erasure.concept!r} is for {erasure.record['family']} "
            f"({erasure.record['base']['name'] or 'unnamed model'}); this model "
            f"({type(model.model.model_config).__name__}) lacks {len(missing)} of its "
            f"{len(erasure.factors)} matrices, for example {_some(missing)}. Load the kind of "
            "model that it was made for."
        )
    keys = {name: matrices[name] for name in erasure.factors}
    if len(set(keys.values())) < len(keys):
        raise ApplyError(
            f"The erasure of {erasure.concept!r} changes a matrix under several names at once, "
            "which no training does. Get its file again, or train it again."
        )
    weights = original_weights(model, keys)
    for name, factor in erasure.factors.items():
        expected = (factor.shape[0], erasure.bases[name].shape[0])
        if tuple(weights[name].shape) != expected:
            raise ApplyError(
                f"The erasure of {erasure.concept!r} has the shape {expected} at {name}, the "
                f"model {tuple(weights[name].shape)}. Load the kind of model that it was made for."
            )
    return keys


def _loras_on(model, keys: Mapping[str, str]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """B and R of the LoRAs among the model's patches, by the erasure's names of the matrices."""
    found = {}
    for name, key in keys.items():
        loras = [
            patch[1].weights
            for patch in model.patches.get(key, ())
            if patch[0] and getattr(patch[1], "name", "") == "lora"
        ]
        changes = [_change(*weights[:3]) for weights in loras if weights[0].ndim == 2]
        if changes:
            found[name] = changes
    return found


def _change(up: Tensor, down: Tensor, alpha: float | None) -> tuple[Tensor, Tensor]:
    """B (out, rank) and R (width, rank) of a LoRA, float32 on the CPU."""
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    return scale * up.float().cpu(), down.flatten(1).T.float().cpu()


def _some(names) -> str:
    return ", ".join(sorted(names)[:3])
