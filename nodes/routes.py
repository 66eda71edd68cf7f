"""What a page or a program may ask of runs: how they stand, and to stop and keep.

``POST /concept_surgery/stop`` with a JSON object that says whose: ``client_id`` of the page that
queued it, ``prompt_id`` of the queued graph, or both; ``node`` for one node alone. The run ends
after the step that it is at, what was learned is kept, and the graph goes on with it. The answer is
``{"stopping": n}``, the number of runs; 0 where none runs, and as often as one likes.

``GET /concept_surgery/runs?client_id=...`` gives the latest run at each node that this page queued,
for who loads it again: ``{"runs": [...]}``, each like the events that were sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .live import runs_of, stop_runs
from .messages import all_shown

LONGEST = 200  # letters of an id
IDS = ("client_id", "prompt_id", "node")
SAY_WHICH = (
    "Say which run to stop: a JSON object with prompt_id, client_id or both, and node if only one "
    "node is meant."
)


def add_routes(server: Any) -> None:
    """Add the routes to the host's web server; without one there are none."""
    routes = getattr(server, "routes", None)
    if routes is None:
        return
    from aiohttp import web

    @routes.post("/concept_surgery/stop")
    async def stop(request: Any) -> Any:
        try:
            asked = asked_of(await request.json())
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, ValueError):
            return web.json_response({"error": SAY_WHICH}, status=400)
        return web.json_response({"stopping": stop_runs(asked)})

    @routes.get("/concept_surgery/runs")
    async def runs(request: Any) -> Any:
        client = request.query.get("client_id")
        found = [all_shown(run.snapshot()) for run in runs_of(client)] if client else []
        return web.json_response({"runs": found})


def asked_of(content: Any) -> Mapping[str, str]:
    """Whose run is meant.

    Raises:
        ValueError: nobody's, or no object of texts.
    """
    if not isinstance(content, dict):
        raise ValueError(SAY_WHICH)
    given = {name: content[name] for name in IDS if content.get(name) is not None}
    if isinstance(given.get("node"), int):
        given["node"] = str(given["node"])
    texts = all(isinstance(text, str) and 0 < len(text) <= LONGEST for text in given.values())
    if not texts or not (given.keys() - {"node"}):
        raise ValueError(SAY_WHICH)
    return given
