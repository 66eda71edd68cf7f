"""The extension's routes, as a program uses them."""

from __future__ import annotations

import time
from typing import Any

from .comfy_side import TRAINING
from .webui_host import WebuiHost

ROUTES = "/concept-surgery/v1"
ENDED = ("done", "cancelled", "failed")
QUICK = {**TRAINING, "stored_result": "train again"}
# For what is to be seen at all in a host that is slow.
SHORT = {"captions": 16, "steps": 4, "trajectories": 2, "rank": 6}


def start(host: WebuiHost, **values: Any) -> str:
    """Begin a training like that of ComfyUI, with some values changed; its number."""
    return host.post(f"{ROUTES}/train", {**QUICK, **values})["id"]


def look(host: WebuiHost, number: str) -> dict[str, Any]:
    """How far it is."""
    return host.get(f"{ROUTES}/jobs/{number}")


def follow(host: WebuiHost, number: str, until: Any = None, timeout: float = 1500) -> dict:
    """Wait until it has ended, or ``until`` says so of what is told."""
    deadline = time.monotonic() + timeout
    while True:
        told = look(host, number)
        if told["state"] in ENDED or (until and until(told)):
            return told
        if time.monotonic() > deadline:
            raise TimeoutError(f"still {told}")
        time.sleep(0.1)


def train(host: WebuiHost, **values: Any) -> str:
    """Train to the end; the number of the run.

    Raises:
        AssertionError: it didn't end well.
    """
    number = start(host, **values)
    told = follow(host, number)
    assert told["state"] == "done", (told, host.text()[-3000:])
    return number


def stop(host: WebuiHost, number: str, keep: bool = True) -> None:
    """Press *Stop and keep*, or *Cancel*."""
    host.post(f"{ROUTES}/stop", {"id": number, "keep": keep})


def save(host: WebuiHost, number: str, filename: str) -> dict[str, Any]:
    """Save into the host's LoRAs."""
    return host.post(f"{ROUTES}/save", {"id": number, "filename": filename})


def report(host: WebuiHost, number: str) -> dict[str, Any]:
    """Text and numbers of a run's report."""
    return host.get(f"{ROUTES}/report?number={number}")


def erasures(host: WebuiHost) -> list[str]:
    """What is in the folder."""
    return host.get(f"{ROUTES}/erasures")


def accordion(*names: str, strength: float = 1.0) -> dict[str, Any]:
    """What a picture is asked for with the accordion filled in."""
    return {"alwayson_scripts": {"Concept Surgery": {"args": [list(names), strength]}}}
