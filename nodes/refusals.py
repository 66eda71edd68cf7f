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


class Place(NamedTuple):
    """Where a sentence belongs.

    Attributes:
        name: the input that it is about.
        node_id: of the node that has this input; "" where that is the node that says it.
    """

    name: str
    node_id: str = ""


class _Said(NamedTuple):
    """What is remembered of a sentence.

    Attributes:
        place: where it belongs.
        told_at: the one input that its node names for all of them; "" if the node names each.
    """

    place: Place
    told_at: str


class _Sent(NamedTuple):
    """A graph that is being answered.

    Attributes:
        prompt: the graph itself; the host converts values in it.
        odd: what came where text is expected and is none, by node and input, as it came.
    """

    prompt: Mapping[str, Any]
    odd: Mapping[tuple[str, str], Any]


_said: OrderedDict[tuple[str, str], _Said] = OrderedDict()  # by the node that says it, and text
_sent: ContextVar[_Sent | None] = ContextVar("graph that is being answered", default=None)


def refusal(
    error: ValueError,
    node: Any,
    only_input: str = "",
    told_at: str = "",
    elsewhere: Place | None = None,
) -> str:
    """What a node's ``validate_inputs`` returns about an error, said under the node as well.

    A graph of which another part is in order runs, and its front end then shows no dialog.

    Args:
        node: the class that the host calls, with its hidden values.
        only_input: the input that it is about, where the error doesn't say.
        told_at: the input that the node names for all of them, if it names one alone. The
            sentence is moved from there to where it belongs.
        elsewhere: the input of another node that it is about.
    """
    setting = getattr(error, "setting", "")
    text = shown(str(error))
    place = elsewhere or Place(_INPUTS.get(setting, setting) or only_input)
    said_by = id_of(node)
    _said[said_by or "", text] = _Said(place, told_at)
    while len(_said) > REMEMBERED:
        _said.popitem(last=False)
    warn(text, place.node_id or said_by)
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


def sent_behind(node: Any, name: str) -> tuple[str, dict[str, Any]] | None:
    """The id of the node that is linked to an input, and its values likewise; None if none is."""
    link = _inputs_of(id_of(node)).get(name)
    return (link[0], dict(_values_of(link[0]))) if link is not None and is_link(link) else None


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
        nodes = dict(content["node_errors"].items())
    except (ValueError, KeyError, TypeError, AttributeError):  # the answer of another route
        return answer
    content["node_errors"] = _at_their_inputs(nodes)
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


def _at_their_inputs(nodes: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Errors by node; of each of our sentences the one at its input, else the first.

    Where the host has something to say about the same input, ours is left out.
    """
    kept: dict[str, dict[Any, dict[str, Any]]] = {}
    theirs = set()
    for node_id, node in nodes.items():
        for number, error in enumerate(node["errors"]):
            name = error.get("extra_info", {}).get("input_name", "")
            text = error.get("details", "").removeprefix(f"{name} - ")
            said = _said.get((node_id, text)) or _said.get(("", text))
            if said is None or error.get("type") != _FAILED:
                theirs.add((node_id, name))
                kept.setdefault(node_id, {})[node_id, number] = error
                continue
            place, at = said.place, node_id
            if said.told_at == name:
                error, at = _moved(error, text, place.name), place.node_id or node_id
            of_one = kept.setdefault(at, {})
            if text not in of_one or error["extra_info"]["input_name"] == place.name:
                of_one[text] = error
    return {
        at: {**(nodes.get(at) or _like(nodes, at)), "errors": left}
        for at, of_one in kept.items()
        if (left := [e for k, e in of_one.items() if k not in _ours_beside(at, of_one, theirs)])
    }


def _ours_beside(at: str, errors: Mapping[Any, dict[str, Any]], theirs: set[Any]) -> set[str]:
    """Those of our sentences at a node that the host has something to say at the input of."""
    ours = {key: error for key, error in errors.items() if isinstance(key, str)}
    return {key for key, one in ours.items() if (at, one["extra_info"]["input_name"]) in theirs}


def _like(nodes: Mapping[str, dict[str, Any]], node_id: str) -> dict[str, Any]:
    """What the host says of a node with errors, of one that it has none for."""
    sent = _sent.get()
    node = sent.prompt.get(node_id, {}) if sent else {}
    kind = node.get("class_type", "") if isinstance(node, Mapping) else ""
    return {**next(iter(nodes.values())), "class_type": kind}


def _moved(error: dict[str, Any], text: str, name: str) -> dict[str, Any]:
    """An error at another input."""
    info = {**error["extra_info"], "input_name": name}
    return {**error, "details": f"{name} - {text}", "extra_info": info}
