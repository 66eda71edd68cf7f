"""What a graph does with a MODEL after a node: whether something takes its weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..erase_core.artefact.stack import EXACT, left_behind_text
from .messages import warn

APPLY = "ConceptSurgeryApply"
MODEL = "MODEL"
# Types of outputs that a MODEL may leave by: its own, and those of nodes that pass anything on.
ANYTHING = ("*", "COMFY_MATCHTYPE_V3")
# With one of these beside the MODEL an output node samples, and does so with all that is on it.
SAMPLED_FROM = ("CONDITIONING", "GUIDER", "LATENT", "SAMPLER")
MERGING = "advanced/model_merging"  # the host's menu of nodes that save and merge models


def weight_takers(
    prompt: Mapping[str, Any] | None, node_id: str | None, known: Mapping[str, type] | None = None
) -> list[str]:
    """The nodes behind a node's first output that save or merge the weights of its MODEL.

    What rides beside the weights doesn't reach what they give. Nodes that pass a MODEL on are
    followed.

    Args:
        prompt: the graph in the host's API format.
        node_id: the node whose MODEL is followed, as the graph names it.
        known: node classes by the names that graphs have for them; None for the host's.

    Returns:
        One text for each, such as "CheckpointSave (node 7)", in the graph's order.
    """
    if not prompt or node_id is None:
        return []
    known = _known_classes() if known is None else known
    outputs, found = {(str(node_id), 0)}, set()
    waiting = list(outputs)
    while waiting:
        for consumer, kind in _consumers(prompt, waiting.pop(), known):
            if _takes_weights(prompt, consumer, kind, known):
                found.add(consumer)
            for slot in _passed_on(kind):
                if (consumer, slot) not in outputs:
                    outputs.add((consumer, slot))
                    waiting.append((consumer, slot))
    return [f"{prompt[key]['class_type']} (node {key})" for key in prompt if key in found]


def install(server: Any) -> None:
    """Have every graph looked at when it is queued.

    A host that still has what *Apply Erased UNet* gave doesn't run it again because a node that
    saves was put behind it, so that node can't warn of it.
    """
    if hasattr(server, "add_on_prompt_handler"):
        server.add_on_prompt_handler(say_what_is_left_behind)


def say_what_is_left_behind(request: Any) -> Any:
    """Warn, under the node that applies it, where an erasure won't be in what a graph saves.

    Args:
        request: what the front end sends to queue a graph; it is returned as it came.
    """
    prompt = request.get("prompt") if isinstance(request, dict) else None
    nodes = prompt.items() if isinstance(prompt, dict) else ()
    exact = [key for key, node in nodes if _applies_beside(node)]
    for key in exact:
        takers = weight_takers(prompt, key)
        if takers:
            warn(left_behind_text("the erasure", takers), key)
    return request


def _applies_beside(node: Any) -> bool:
    if not isinstance(node, dict) or node.get("class_type") != APPLY:
        return False
    inputs = node.get("inputs", {})
    return inputs.get("mode") == EXACT and inputs.get("strength") != 0


def _consumers(
    prompt: Mapping[str, Any], output: tuple[str, int], known: Mapping[str, type]
) -> Iterator[tuple[str, type | None]]:
    """The nodes that an output is connected to, and their classes where the host has them."""
    for key, node in prompt.items():
        if output in _links(node):
            yield key, known.get(node.get("class_type"))


def _links(node: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The outputs that a node's inputs are connected to."""
    return [
        (str(value[0]), value[1])
        for value in node.get("inputs", {}).values()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)
    ]


def _takes_weights(
    prompt: Mapping[str, Any], key: str, kind: type | None, known: Mapping[str, type]
) -> bool:
    """Whether a node that is given a MODEL saves or merges what is in its weights."""
    if kind is None:
        return False
    if MODEL in _output_types(kind):
        category = str(getattr(kind, "CATEGORY", ""))
        return category.startswith(MERGING) or "merge" in prompt[key]["class_type"].casefold()
    if not getattr(kind, "OUTPUT_NODE", False) or _output_types(kind):
        return False
    sources = [
        (known.get(prompt[s].get("class_type")), i) for s, i in _links(prompt[key]) if s in prompt
    ]
    given = [_output_types(source)[i : i + 1] for source, i in sources if source is not None]
    return not any(name in SAMPLED_FROM for names in given for name in names)


def _passed_on(kind: type | None) -> list[int]:
    """The outputs by which a MODEL may leave a node; none of a class that isn't known."""
    types = [] if kind is None else _output_types(kind)
    return [slot for slot, name in enumerate(types) if name == MODEL or name in ANYTHING]


def _output_types(kind: type) -> list[str]:
    return [str(name) for name in getattr(kind, "RETURN_TYPES", None) or ()]


def _known_classes() -> Mapping[str, type]:
    """The host's node classes by name."""
    from nodes import NODE_CLASS_MAPPINGS  # the host's module; ours are under the pack's name

    return NODE_CLASS_MAPPINGS
