"""Words to the person at the node, and the names of the files they chose."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.v0_0_2 import ui

FILE_INPUTS = ("ckpt_name", "unet_name")

# Control characters, halves of a surrogate pair (no encoder takes them), and those that turn the
# direction of what follows.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# Where a character that takes no space keeps a front end from reading markup: a tag, an entity,
# [[label|url]] and the name that a link has meanwhile, an address, a link or picture in Markdown.
# Entities would not do: front end 1.32 puts the text into innerHTML, 1.49 cleans that of all tags
# but links, and 1.58 escapes it itself and would show them.
_MARKUP = re.compile(
    r"[<&](?=[\w/!?#])|\[(?=\[)|\](?=[(\[:])|_(?=_)|:(?=//)|\bwww(?=\.)", re.IGNORECASE
)
_APART = "\N{WORD JOINER}"


def warn(message: str, node_id: str | None) -> None:
    """A warning in the log and, where the host can, under the node."""
    warn_all([message], node_id)


def warn_all(warnings: Sequence[str], node_id: str | None, note: str = "") -> None:
    """Several warnings, each in the log, and together under the node, which shows one text.

    Args:
        note: what else is to be read there.
    """
    for warning in warnings:
        logging.warning("Concept Surgery: %s", " ".join(_printable(warning).split("\n")))
    text = " ".join([*warnings, note]).strip()
    if text:
        _send_text(text, node_id)


def id_of(node: Any) -> str | None:
    """The id in its graph of a node that the host runs; None outside of a graph."""
    return getattr(getattr(node, "hidden", None), "unique_id", None)


def shown(text: str) -> str:
    """A text that a front end may show: it reads the same, and none of it is read as markup.

    Names of concepts, prompts and files come from a workflow or a file that someone else made.
    """
    return _MARKUP.sub(lambda found: found[0] + _APART, _printable(text))


def preview(text: str) -> ui.PreviewText:
    """A text among a node's outputs that a front end shows."""
    return ui.PreviewText(shown(text))


def show_progress_text(stage: str, loss: float | None, node_id: str | None) -> None:
    """The stage and the loss under the node, where the host can."""
    _send_text(stage if loss is None else f"{stage}, loss {loss:.3f}", node_id)


def clear_progress_text(node_id: str | None) -> None:
    """Nothing under the node any more: a run has ended, however it did."""
    _send_text("", node_id)


def send_event(name: str, data: Mapping[str, Any], client_id: str | None) -> None:
    """An event of our own to the page that queued a graph, with all of its texts made safe.

    Args:
        client_id: of the page; None sends it to nobody.
    """
    server = _running_server()
    if client_id is not None and server is not None:
        server.send_sync(shown(name), all_shown(data), client_id)


def all_shown(value: Any) -> Any:
    """Plain JSON values with every text as a front end may show it."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, Mapping):
        return {key: all_shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [all_shown(item) for item in value]
    return value


def where_it_runs() -> tuple[str | None, str | None]:
    """The ids of the queued graph that the host runs, and of the page that queued it."""
    client_id = getattr(_running_server(), "client_id", None)
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None, client_id
    context = get_executing_context()
    return getattr(context, "prompt_id", None), client_id


def _running_server() -> Any:
    """The host's web server; None where nodes are called from Python, without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def upstream_file(prompt: Mapping[str, Any] | None, node_id: str | None, name: str) -> str:
    """File name of the model that reaches a node's input, read from the graph; "" if unknown.

    Args:
        prompt: the graph in the host's API format.
        node_id: the node whose input is followed.
        name: the input to follow, through nodes that pass it on under the same name.
    """
    seen = set()
    while prompt and node_id is not None and node_id in prompt and node_id not in seen:
        seen.add(node_id)
        inputs = prompt[node_id].get("inputs", {})
        for file_input in FILE_INPUTS:
            if isinstance(inputs.get(file_input), str):
                return _printable(inputs[file_input])  # on some systems a name may be any bytes
        link = inputs.get(name)
        node_id = link[0] if isinstance(link, list) else None
    return ""


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub(_REPLACEMENT, text)


def _send_text(text: str, node_id: str | None) -> None:
    if node_id is None:
        return
    from server import PromptServer

    send = getattr(getattr(PromptServer, "instance", None), "send_progress_text", None)
    if send is not None:
        send(shown(text), node_id)
