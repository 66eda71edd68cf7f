"""A headless Chromium, driven over its debugging protocol: to see what a page really does.

Needs aiohttp, like the host, and a Chromium that is installed; nothing is downloaded.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# The last ones keep it from calling home, which only fills the log where there is no network.
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1200",
    "--remote-debugging-port=0",
)
_POLL = 0.1


class BrowserError(RuntimeError):
    """The browser did not start, or a script failed in the page."""


def find_chromium() -> str | None:
    """Path of a Chromium: the variable CHROMIUM, or the first one on the path; None if none."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page in a Chromium with an empty profile; closed on leaving the block.

    Attributes:
        complaints: what the page wrote to its console as errors, and exceptions nobody caught.
        clicks: how often the mouse was pressed.
    """

    def __init__(self, executable: str, start_timeout: float = 60.0) -> None:
        self.complaints: list[str] = []
        self.clicks = 0
        self._executable = executable
        self._timeout = start_timeout
        self._loop = asyncio.new_event_loop()
        self._number = 0

    def __enter__(self) -> Browser:
        self._profile = Path(tempfile.mkdtemp(prefix="chromium-"))
        with (self._profile / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [self._executable, *ARGUMENTS, f"--user-data-dir={self._profile}", "about:blank"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._loop.run_until_complete(self._connect())
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def open(self, url: str) -> None:
        """Go to a page; it loads on its own after that."""
        self._call("Page.navigate", url=url)

    def run(self, script: str, timeout: float = 60.0) -> Any:
        """Value of a JavaScript expression in the page, awaited if it is a promise.

        Raises:
            BrowserError: it threw.
        """
        answer = self._call(
            "Runtime.evaluate",
            timeout,
            expression=script,
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in answer:
            raise BrowserError(f"{script}: {_exception_text(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def wait_for(self, script: str, timeout: float = 60.0) -> Any:
        """The first truthy value of a JavaScript expression, asked again and again.

        Raises:
            BrowserError: it never was one.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                value = self.run(script)
            except BrowserError:  # the page isn't so far yet
                value = None
            if value:
                return value
            if time.monotonic() > deadline:
                last = [text[:300] for text in self.complaints[-3:]]
                raise BrowserError(f"{script} was never true. Last in the console: {last}")
            time.sleep(_POLL)

    def click(self, x: float, y: float) -> None:
        """Press and release the left mouse button at a place in the page, in its pixels."""
        self.clicks += 1
        for kind, buttons in (("mouseMoved", 0), ("mousePressed", 1), ("mouseReleased", 0)):
            self._call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                button="none" if kind == "mouseMoved" else "left",
                buttons=buttons,
                clickCount=0 if kind == "mouseMoved" else 1,
            )

    def type(self, text: str) -> None:
        """Put a text where the cursor is, as a keyboard does."""
        self._call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Write what the page looks like as a PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    async def _connect(self) -> None:
        address = await self._address()
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://{address}/json/list") as answer:
            pages = [target for target in await answer.json() if target["type"] == "page"]
        url = pages[0]["webSocketDebuggerUrl"]
        self._socket = await self._session.ws_connect(url, max_msg_size=0)
        for domain in ("Page", "Runtime"):
            await self._ask(f"{domain}.enable", {})

    async def _address(self) -> str:
        """Where it listens, which it writes into its profile."""
        deadline = time.monotonic() + self._timeout
        port = self._profile / "DevToolsActivePort"
        while not (port.exists() and "\n" in port.read_text()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = (self._profile / "log").read_text(errors="replace")
                raise BrowserError(f"{self._executable} did not start:\n{log[-2000:]}")
            await asyncio.sleep(_POLL)
        return f"127.0.0.1:{port.read_text().splitlines()[0]}"

    def _call(self, method: str, timeout: float = 60.0, **parameters: Any) -> dict[str, Any]:
        asked = asyncio.wait_for(self._ask(method, parameters), timeout)
        return self._loop.run_until_complete(asked)

    async def _ask(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            answer = json.loads((await self._socket.receive()).data)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error'].get('message')}")
                return answer["result"]
            self._listen(answer.get("method"), answer.get("params", {}))

    def _listen(self, kind: str | None, data: dict[str, Any]) -> None:
        if kind == "Runtime.exceptionThrown":
            self.complaints.append(_exception_text(data["exceptionDetails"]))
        elif kind == "Runtime.consoleAPICalled" and data["type"] == "error":
            said = [str(part.get("value", part.get("description"))) for part in data["args"]]
            self.complaints.append(" ".join(said))

    def _close(self) -> None:
        if getattr(self, "_session", None) is not None:
            self._loop.run_until_complete(self._session.close())
        self._loop.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self._process.wait(10)
        shutil.rmtree(self._profile, ignore_errors=True)


def _exception_text(details: dict[str, Any]) -> str:
    thrown = details.get("exception", {})
    return str(thrown.get("description") or thrown.get("value") or details.get("text"))
