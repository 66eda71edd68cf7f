"""A real host as a subprocess, driven as a browser drives it: over HTTP and a websocket.

Needs the packages of ``build/venv`` (aiohttp for the websocket), so import it in there.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from tools.environment import BUILD, HOST, ROOT, STUBS, tail

PACK_FOLDER = "concept-surgery"
# What a published pack does not hold; left out where the checkout has to be copied.
UNPUBLISHED = ("build", "tools", "tests", "benchmarks", ".*", "__pycache__")

_POLL = 0.1
_TEXT_EVENT = 3

Graph = Mapping[str, Mapping[str, Any]]
Event = dict[str, Any]


class HostError(RuntimeError):
    """The host did not start, has died or does not answer."""


class GraphRejected(Exception):
    """The host refused to queue a graph; ``node_errors`` says which inputs it disliked."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        self.node_errors: dict[str, Any] = dict(answer.get("node_errors") or {})
        error = answer.get("error") or {}
        lines = [str(error.get("message", error))]
        for node, problem in self.node_errors.items():
            for item in problem.get("errors", ()):
                lines.append(f"{node} ({problem.get('class_type')}): {item.get('details')}")
        super().__init__("\n".join(lines))


class GraphFailed(Exception):
    """A node raised, or the run was interrupted; ``entry`` is what the history holds."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.entry = entry
        self.details: dict[str, Any] = {}
        self.interrupted = False
        for kind, data in entry.get("status", {}).get("messages", ()):
            if kind in ("execution_error", "execution_interrupted"):
                self.details = data
                self.interrupted = kind == "execution_interrupted"
        reason = "interrupted" if self.interrupted else self.details.get("exception_message")
        trace = "".join(self.details.get("traceback") or ())
        super().__init__(f"{self.details.get('node_type')}: {reason}\n{trace}".rstrip())


class ComfyHost:
    """A host on a free port, with the checkout as a custom node; stopped on leaving the block.

    ``work`` becomes the host's base directory. ``checkpoints`` are offered under their file
    names. Further custom nodes go in with :meth:`extra` before the block is entered.
    """

    def __init__(
        self,
        work: Path = BUILD / "server",
        *,
        checkpoints: Sequence[Path] = (),
        threads: int = 1,
        log: Path | None = None,
        start_timeout: float = 120.0,
        arguments: Sequence[str] = (),
    ) -> None:
        self.work = Path(work).absolute()
        self.log = Path(log).absolute() if log else self.work / "host.log"
        self.start_seconds = 0.0
        self._threads = threads
        self._start_timeout = start_timeout
        self._arguments = tuple(arguments)
        self._client = uuid.uuid4().hex
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: _Listener | None = None
        self._event_marks: dict[str, int] = {}
        # The machine's proxy settings must not apply to the loopback address.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for name in ("custom_nodes", "input", "models/loras", "output", "temp", "user"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        for checkpoint in checkpoints:
            place(Path(checkpoint), self.models("checkpoints") / Path(checkpoint).name)
        self.extra(ROOT, PACK_FOLDER)

    def models(self, kind: str) -> Path:
        """The host's folder for one kind of model, such as ``loras``."""
        folder = self.work / "models" / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def extra(self, folder: Path, name: str | None = None) -> None:
        """Add a folder as a custom node; the host reads them only while it starts."""
        if self._process is not None:
            raise HostError("custom nodes have to be added before the host is started")
        place(Path(folder), self.work / "custom_nodes" / (name or Path(folder).name))

    def __enter__(self) -> ComfyHost:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def object_info(self, node: str) -> dict[str, Any]:
        """What the host tells its front end about one node type."""
        answer = self.get(f"/object_info/{urllib.parse.quote(node)}")
        if node not in answer:
            raise LookupError(f"the host knows no node {node!r}; its log is {self.log}")
        return answer[node]

    def queue(self, graph: Graph) -> str:
        """Queue a graph in API format and return its prompt id."""
        mark = len(self._events())
        answer = self.post("/prompt", {"prompt": graph, "client_id": self._client})
        self._event_marks[answer["prompt_id"]] = mark
        return answer["prompt_id"]

    def wait(
        self,
        prompt_id: str,
        timeout: float,
        on_progress: Callable[[Event], None] | None = None,
    ) -> dict[str, Any]:
        """Wait until a queued graph has ended, however it ended; return its history entry.

        ``on_progress`` gets each message that the host sends a browser meanwhile, as a dict
        with ``type`` and ``data``, in the calling thread.
        """
        deadline = time.monotonic() + timeout
        position = self._event_marks.get(prompt_id, 0)
        while True:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None and on_progress:
                self._await_last_event(prompt_id, position)
            if on_progress:
                position = self._hand_on(prompt_id, position, on_progress)
            if entry is not None:
                return entry
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"the graph has not ended within {timeout:g} s\n{tail(self.log)}"
                )
            time.sleep(_POLL)

    def run(
        self,
        graph: Graph,
        timeout: float = 300.0,
        on_progress: Callable[[Event], None] | None = None,
    ) -> dict[str, Any]:
        """Queue a graph and wait for it; raises :class:`GraphFailed` unless it succeeded."""
        entry = self.wait(self.queue(graph), timeout, on_progress)
        if entry["status"]["status_str"] != "success":
            raise GraphFailed(entry)
        return entry

    def interrupt(self) -> None:
        """Press cancel: stops the graph that runs now."""
        self.post("/interrupt", {})

    def kill(self) -> None:
        """End the host as a power cut would: nothing of it gets to clean up."""
        if self._process is not None:
            _signal_group(self._process, getattr(signal, "SIGKILL", signal.SIGTERM))
            self._process.wait(10)

    def free(self) -> None:
        """Unload models and forget cached results. The host does it between two graphs."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def image(self, record: Mapping[str, str]) -> bytes:
        """The file behind one of the ``images`` in a history entry's outputs."""
        query = {key: record.get(key, "") for key in ("filename", "subfolder", "type")}
        return self._request(f"/view?{urllib.parse.urlencode(query)}")

    def get(self, path: str) -> Any:
        """GET a JSON answer; also for the pack's own routes."""
        return json.loads(self._request(path))

    def post(self, path: str, body: Any) -> Any:
        """POST JSON; the decoded answer, or None where the host answers nothing."""
        answer = self._request(path, json.dumps(body).encode())
        return json.loads(answer) if answer else None

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        self._check_alive()
        request = urllib.request.Request(
            self._url(path), data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=60) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code == 400 and path == "/prompt":
                raise GraphRejected(json.loads(text)) from None
            raise HostError(f"{path} was answered with {error.code}: {text}") from None
        except OSError as error:
            self._check_alive()
            raise HostError(f"the host does not answer {path}: {error}") from error

    @property
    def url(self) -> str:
        """Address of the front end."""
        return self._url("/")

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}{path}"

    def _start(self) -> None:
        began = time.monotonic()
        self._port = _free_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.work,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._await_answer(began + self._start_timeout)
        self._listener = _Listener(self._url(f"/ws?clientId={self._client}"))
        self._listener.start()
        if not self._listener.connected.wait(30):
            raise HostError(f"no websocket connection to the host\n{tail(self.log)}")
        self.start_seconds = time.monotonic() - began

    def _command(self) -> list[str]:
        return [
            sys.executable,
            str(HOST / "main.py"),
            "--cpu",
            *("--listen", "127.0.0.1", "--port", str(self._port)),
            *("--base-directory", str(self.work), "--user-directory", str(self.work / "user")),
            *("--database-url", "sqlite:///:memory:"),
            "--disable-api-nodes",
            "--disable-auto-launch",
            *self._arguments,
        ]

    def _environment(self) -> dict[str, str]:
        """The caller's environment, without what would change how Python finds modules."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return kept | {
            "OMP_NUM_THREADS": str(self._threads),
            # Waiting threads that spin made a graph of 9 s take 147 s on two busy cores.
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": str(STUBS),
            "PYTHONUNBUFFERED": "1",
            "PYTHONUTF8": "1",
        }

    def _await_answer(self, deadline: float) -> None:
        while True:
            try:
                self.get("/system_stats")
                return
            except HostError:
                self._check_alive()
                if time.monotonic() > deadline:
                    raise HostError(
                        f"the host did not start within {self._start_timeout:g} s. "
                        f"The end of {self.log}:\n{tail(self.log)}"
                    ) from None
            time.sleep(_POLL)

    def _check_alive(self) -> None:
        if self._process is None:
            raise HostError("the host is not running; use it as a context manager")
        status = self._process.poll()
        if status is not None:
            raise HostError(
                f"the host ended with exit code {status}. "
                f"The end of {self.log}:\n{tail(self.log, 40)}"
            )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        # The leader is gone or ignores us; in either case nothing of its group shall remain.
        _signal_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait(10)
        if self._listener is not None:
            self._listener.join(10)
            self._listener = None

    def _events(self) -> list[Event]:
        return self._listener.events if self._listener else []

    def _hand_on(self, prompt_id: str, position: int, sink: Callable[[Event], None]) -> int:
        """Give the new events to ``sink``, except those that belong to another prompt."""
        fresh = self._events()[position:]
        for event in fresh:
            if event["data"].get("prompt_id", prompt_id) == prompt_id:
                sink(event)
        return position + len(fresh)

    def _await_last_event(self, prompt_id: str, position: int) -> None:
        """The history is written just before the last event is sent: give that a moment."""
        for _ in range(20):
            if any(_ends(event, prompt_id) for event in self._events()[position:]):
                return
            time.sleep(_POLL / 2)


class _Listener(threading.Thread):
    """Collects what the host sends over its websocket, until the host closes it."""

    def __init__(self, url: str) -> None:
        super().__init__(name="host-websocket", daemon=True)
        self.events: list[Event] = []
        self.connected = threading.Event()
        self._url = url

    def run(self) -> None:
        try:
            asyncio.run(self._listen())
        except (aiohttp.ClientError, OSError):
            pass  # the host is going away, and the polling of the history will say so

    async def _listen(self) -> None:
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(self._url, max_msg_size=0) as connection:
                self.connected.set()
                async for message in connection:
                    event = _decode(message)
                    if event is not None:
                        self.events.append(event)


def _decode(message: Any) -> Event | None:
    """An event as a dict; of the binary ones only a node's progress text is of use here."""
    if message.type is aiohttp.WSMsgType.TEXT:
        event = json.loads(message.data)
        event["data"] = event.get("data") or {}
        return event
    if message.type is aiohttp.WSMsgType.BINARY and len(message.data) >= 8:
        kind, length = struct.unpack(">II", message.data[:8])
        if kind == _TEXT_EVENT:
            node, text = message.data[8 : 8 + length], message.data[8 + length :]
            data = {"node": node.decode(), "text": text.decode(errors="replace")}
            return {"type": "progress_text", "data": data}
    return None


def _ends(event: Event, prompt_id: str) -> bool:
    data = event["data"]
    over = event["type"] == "executing" and data.get("node") is None
    return over and data.get("prompt_id") == prompt_id


def place(source: Path, target: Path) -> None:
    """Link ``source`` at ``target``, or copy it where links are not allowed."""
    source = source.resolve()
    if target.is_symlink() or target.is_file():
        if target.is_symlink() and target.resolve() == source:
            return
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*UNPUBLISHED))
        else:
            shutil.copy2(source, target)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        if os.name == "nt":
            process.terminate()
        else:
            os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass
