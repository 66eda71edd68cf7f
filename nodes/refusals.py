"""A value that can't work is told once, at the input that it is about.

A node hands one sentence to its host, which repeats it for every input that the node looks at and
marks them all, since it can't be told which one is wrong. The answer to the front end is put right
on its way out: of the repetitions that at the right input is left.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from .messages import id_of, shown, warn

REMEMBERED = 256  # sentences, of graphs that are being answered
_FAILED = "custom_validation_failed"
# Inputs that have another name than the setting.
_INPUTS = {"concepts": "erase", "seed": "training_seed"}


class _Place(NamedTuple):
    """Where a sentence belongs.

    Attributes:
        name: the input that it is about.
        told_at: the one input that its node names for all of them; "" if the node names each.
    """

    name: str
    told_at: str


class _Sent(NamedTuple):
    """A graph that is being answered.

    Attributes:
        prompt: the graph itself; the host converts values in it.
        odd: what came where text is expected and is none, by node and input, as it came.
    """

    prompt: Mapping[str, Any]
    odd: Mapping[tuple[str, str], Any]


_place_of: OrderedDict[str, _Place] = OrderedDict()
_sent: ContextVar[_Sent | None] = ContextVar("graph that is being answered", default=None)


def refusal(error: ValueError, node: Any, only_input: str = "", told_at: str = "") -> str:
    """What a node's ``validate_inputs`` returns about an error, said under the node as well.

    A graph of which another part is in order runs, and its front end then shows no dialog.

    Args:
        node: the class that the host calls, with its hidden values.
        only_input: the input that it is about, where the error doesn't say.
        told_at: the input that the node names for all of them, if it names one alone. The
            sentence is moved from there to where it belongs.
    """
    setting = getattr(error, "setting", "")
    text = shown(str(error))
    _place_of[text] = _Place(_INPUTS.get(setting, setting) or only_input, told_at)
    while len(_place_of) > REMEMBERED:
        _place_of.popitem(last=False)
    warn(text, id_of(node))
    return text


def sent_values(node: Any) -> dict[str, Any]:
    """What a graph that is being answered gives a node, as it was sent; links are left out.

    A host hands ``validate_inputs`` text only, made of whatever was sent, and none of what the
    node doesn't declare.

    Args:
        node: the class that the host calls, with its hidden values.

    Returns:
        Values by input; empty where the host didn't say what it was sent.
    """
    return dict(_values_of(id_of(node)))


def sent_values_behind(node: Any, name: str) -> dict[str, Any]:
    """The same of the node that is linked to an input."""
    link = _inputs_of(id_of(node)).get(name)
    return dict(_values_of(link[0])) if link is not None and is_link(link) else {}


def is_linked(node: Any, name: str) -> bool:
    """Whether the graph that is being answered has a link at an input."""
    return is_link(_inputs_of(id_of(node)).get(name))


def unwrapped(value: Any) -> Any:
    """A value that a front end has wrapped, so that a list isn't taken for a link."""
    return value["__value__"] if isinstance(value, Mapping) and "__value__" in value else value


def _inputs_of(node_id: str | None) -> Mapping[str, Any]:
    sent = _sent.get()
    node = sent.prompt.get(node_id) if sent and node_id is not None else None
    return node.get("inputs", {}) if isinstance(node, Mapping) else {}


def _values_of(node_id: str | None) -> Iterator[tuple[str, Any]]:
    sent = _sent.get()
    for name, value in _inputs_of(node_id).items():
        if sent is not None and not is_link(value):
            yield name, unwrapped(sent.odd.get((str(node_id), name), value))


def is_link(value: Any) -> bool:
    """As the host reads it: whatever else is a list of two is none."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int | float)
    )


def note_graph(asked: Any) -> Any:
    """Remember a graph that the host was sent, until it is answered.

    Args:
        asked: the body of the request, which is returned as it is.
    """
    prompt = asked.get("prompt") if isinstance(asked, Mapping) else None
    nodes = prompt.items() if isinstance(prompt, Mapping) else ()
    odd = {
        (str(node_id), name): value
        for node_id, node in nodes
        if isinstance(node, Mapping) and isinstance(node.get("inputs"), Mapping)
        for name, value in node["inputs"].items()
        if not isinstance(value, str | list)
    }
    _sent.set(_Sent(prompt, odd) if isinstance(prompt, Mapping) else None)
    return asked


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

    hear = getattr(server, "add_on_prompt_handler", None)
    if hear is not None:
        hear(note_graph)
    app = getattr(server, "app", None)
    if app is not None and not app.frozen:  # frozen, it takes no more of them
        app.on_response_prepare.append(put_right)


def _at_their_inputs(errors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors of one node; of each of our sentences the one at its input, else the first.

    Where the host has something to say about the same input, ours is left out.
    """
    kept: dict[Any, dict[str, Any]] = {}
    theirs = set()
    for number, error in enumerate(errors):
        name = error.get("extra_info", {}).get("input_name", "")
        text = error.get("details", "").removeprefix(f"{name} - ")
        place = _place_of.get(text) if error.get("type") == _FAILED else None
        if place is None:
            theirs.add(name)
        elif place.told_at == name != place.name:
            error = _moved(error, text, place.name)
        key = number if place is None else text
        if key not in kept or (place is not None and name == place.name):
            kept[key] = error
    return [
        error
        for key, error in kept.items()
        if isinstance(key, int) or error["extra_info"]["input_name"] not in theirs
    ]


def _moved(error: dict[str, Any], text: str, name: str) -> dict[str, Any]:
    """An error at another input."""
    info = {**error["extra_info"], "input_name": name}
    return {**error, "details": f"{name} - {text}", "extra_info": info}
