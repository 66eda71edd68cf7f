"""Words to the person at the node, and the names of the files they chose."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

FILE_INPUTS = ("ckpt_name", "unet_name")


def warn(message: str, node_id: str | None) -> None:
    """A warning in the log and, where the host can, under the node."""
    logging.warning("Concept Surgery: %s", message)
    _send_text(message, node_id)


def show_progress_text(stage: str, loss: float | None, node_id: str | None) -> None:
    """The stage and the loss under the node, where the host can."""
    _send_text(stage if loss is None else f"{stage}, loss {loss:.3f}", node_id)


def upstream_file(prompt: Mapping[str, Any] | None, node_id: str | None, name: str) -> str:
    """File name of the model that reaches a node's input, read from the graph; "" if unknown.

    Args:
        prompt: the graph in the host's API format.
        node_id: the node whose input is followed.
        name: the input to follow, through nodes that pass it on under the same name.
    """
    seen = set()
    while prompt and node_id in prompt and node_id not in seen:
        seen.add(node_id)
        inputs = prompt[node_id].get("inputs", {})
        for file_input in FILE_INPUTS:
            if isinstance(inputs.get(file_input), str):
                return inputs[file_input]
        link = inputs.get(name)
        node_id = link[0] if isinstance(link, list) else None
    return ""


def _send_text(text: str, node_id: str | None) -> None:
    if node_id is None:
        return
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node_id)
