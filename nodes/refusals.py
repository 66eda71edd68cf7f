"""A value that can't work is told once, at the input that it is about.

A node hands one sentence to its host, which repeats it for every input that the node looks at and
marks them all, since it can't be told which one is wrong. The answer to the front end is put right
on its way out: of the repetitions that at the right input is left.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

from ..erase_core import SettingsError
from .messages import id_of, shown, warn

REMEMBERED = 256  # sentences, of graphs that are being answered
_FAILED = "custom_validation_failed"
# Inputs that have another name than the setting.
_INPUTS = {"concepts": "erase", "seed": "training_seed"}
_input_of: OrderedDict[str, str] = OrderedDict()


def refusal(error: ValueError, node: Any, only_input: str = "") -> str:
    """What a node's ``validate_inputs`` returns about an error, said under the node as well.

    A graph of which another part is in order runs, and its front end then shows no dialog.

    Args:
        node: the class that the host calls, with its hidden values.
        only_input: the input that it is about, where the error doesn't say.
    """
    setting = getattr(error, "setting", "")
    text = shown(str(error))
    _input_of[text] = _INPUTS.get(setting, setting) or only_input
    while len(_input_of) > REMEMBERED:
        _input_of.popitem(last=False)
    warn(text, id_of(node))
    return text


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a choice that isn't there, which some hosts let through.

    Raises:
        SettingsError: another value.
    """
    if not isinstance(value, str) or value not in choices:
        raise SettingsError(
            f"Unknown {name.replace('_', ' ')} {value!r}. Choose one of: {', '.join(choices)}.",
            name,
        )


def told_once(answer: bytes) -> bytes:
    """The host's answer to a graph, with each of our sentences once.

    Args:
        answer: JSON as the host sends it; returned as it is if none of our sentences is in it.
    """
    if _FAILED.encode() not in answer:
        return answer
    try:
        content = json.loads(answer)
        nodes = content["node_errors"].values()
    except (ValueError, KeyError, TypeError, AttributeError):  # the answer of another route
        return answer
    for node in nodes:
        node["errors"] = _at_their_inputs(node["errors"])
    return json.dumps(content).encode()


def install(server: Any) -> None:
    """Put the answers of the host's web server right; without it sentences are repeated."""

    async def put_right(request: Any, response: Any) -> None:
        asked_to_run = request.method == "POST" and request.path.endswith("/prompt")
        body = getattr(response, "body", None)
        if asked_to_run and isinstance(body, bytes) and body != (once := told_once(body)):
            response.body = once
            # Its headers are made already, of the body as it was.
            response.headers.pop("Content-Encoding", None)
            response.headers["Content-Length"] = str(len(once))

    app = getattr(server, "app", None)
    if app is not None and not app.frozen:  # frozen, it takes no more of them
        app.on_response_prepare.append(put_right)


def _at_their_inputs(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors of one node; of each of our sentences the one at its input, else the first."""
    kept: dict[Any, dict[str, Any]] = {}
    for number, error in enumerate(errors):
        name = error.get("extra_info", {}).get("input_name", "")
        text = error.get("details", "").removeprefix(f"{name} - ")
        ours = error.get("type") == _FAILED and text in _input_of
        key = text if ours else number
        if key not in kept or name == _input_of.get(text):
            kept[key] = error
    return list(kept.values())
