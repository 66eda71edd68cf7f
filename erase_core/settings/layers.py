"""Which matrices train: named rules over their kohya LoRA names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

# Where the prompt enters an architecture that refines it before anything reads it.
ENTRANCES = (
    "*_context_embedder",
    "*_txt_in",
    "*_txt_in_input_embedder",
    "*_cond_seq_linear",
    "*_cap_embedder_1",
    "*_caption_projection_linear_1",
    "*_caption_embedder_1",
    "*_text_embedding_0",
    "*_t5_yproj",
    "*_y_embedder_y_proj_fc1",
)

# Rules that no names say: the layers that read the prompt alone are found by predictions, see
# :mod:`..model.readers`. Keys and values where there are any, else the first layers after the text
# encoder; or those first layers in any case.
READERS, FIRST_READERS = "readers", "first-readers"
MEASURED_RULES = (READERS, FIRST_READERS)
_KEYS_AND_VALUES = ("*_attn2_to_k", "*_attn2_to_v")
_DOORS = ("*_context_embedder", "*_txt_in")

LAYER_RULES: dict[str, tuple[str, ...]] = {
    # By name they are these, for who can't or needn't predict.
    READERS: (*_KEYS_AND_VALUES, *_DOORS),
    FIRST_READERS: (*_KEYS_AND_VALUES, *_DOORS),
    "key-value": _KEYS_AND_VALUES,
    "cross-attention": ("*_attn2_to_*",),
    "attention": ("*_attn1_to_*", "*_attn2_to_*"),
    "transformer": ("*_transformer_blocks_*",),
    "text-input": _DOORS,
    "text-stream": ("*_context_block_attn_qkv", "*_txt_attn_qkv"),
    # By name, for the soft form: whatever is fed by the prompt, directly or behind layers that
    # refine it first.
    "prompt-fed": (
        # keys and values of cross-attention
        "*_attn2_to_k",
        "*_attn2_to_v",
        "*_attn2_kv_proj",
        "*_cross_attn_k",
        "*_cross_attn_v",
        "*_cross_attn_k_proj",
        "*_cross_attn_v_proj",
        "*_cross_attn_kv_linear",
        # keys and values of the prompt's own stream in joint attention
        "*_add_k_proj",
        "*_add_v_proj",
        "*_to_k_t",
        "*_to_v_t",
        "*_context_block_attn_qkv",
        "*_txt_attn_qkv",
        "*_attn_qkv_y",
        "*_double_layers_*_attn_w1k",
        "*_double_layers_*_attn_w1v",
        "*_context_refiner_*_attention_qkv",
        *ENTRANCES,
    ),
}


# The rules by name whose matrices are applied to the token embeddings of the prompt, and to nothing
# else.
PROMPT_NAMES = ("key-value", "text-input")
# Those that the hard form works on.
PROMPT_RULES = (*PROMPT_NAMES, *MEASURED_RULES)
# What goes with a rule on architectures that are no family of their own, unless it is chosen
# otherwise. Training starts from no change where nothing
# is known to read the prompt alone, so that a larger step has nothing to undo. On shrunken models
# of five architectures 0.003 moved the guidance by 0.35 to 0.57, 0.02 by 0.55 to 0.91.
RULE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "prompt-fed": {"form": "soft", "learning_rate": 0.02}
}


class LayerRuleError(ValueError):
    """A layer rule that matches nothing."""


def matching(names: Iterable[str], rule: str) -> list[str]:
    """The names that a rule takes, in their order.

    Args:
        names: kohya LoRA names of the matrices of a model.
        rule: a key of :data:`LAYER_RULES`, or a pattern with ``*`` for any text.

    Raises:
        LayerRuleError: nothing matches; the message lists the rules.
    """
    names = list(names)
    patterns = LAYER_RULES.get(rule, (rule,))
    found = [name for name in names if any(fnmatchcase(name, p) for p in patterns)]
    if not found:
        rules = ", ".join(f"{name} ({' '.join(p)})" for name, p in LAYER_RULES.items())
        example = f" Its matrices are named like {names[0]}." if names else ""
        raise LayerRuleError(
            f"The layers {rule!r} match none of the model's {len(names)} matrices. Choose one of: "
            f"{rules}.{example}"
        )
    return found


def known_by_name(rule: str) -> str:
    """A rule by names in place of one that needs predictions: enough to know a model again."""
    return "prompt-fed" if rule in MEASURED_RULES else rule


def reads_prompt(name: str) -> bool:
    """Whether the matrix is applied to the token embeddings of the prompt, and to nothing else."""
    patterns = [pattern for rule in PROMPT_NAMES for pattern in LAYER_RULES[rule]]
    return any(fnmatchcase(name, pattern) for pattern in patterns)
