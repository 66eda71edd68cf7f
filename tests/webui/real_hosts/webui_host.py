"""A real Automatic1111 or one of its kin as a subprocess, driven over HTTP.

Its own folder is only read: models, extensions, settings and pictures lie in ``work``, which the
host is given as its data directory.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from tools.environment import ROOT, tail
from tools.host import UNPUBLISHED, HostError, _free_port, _signal_group, place

EXTENSION = "concept-surgery"
PROBE = Path(__file__).parent / "probe"
KINDS = ("a1111", "forge", "classic", "reforge", "neo")
_POLL = 0.2

# What these hosts take, all of them, on a machine without a network.
_ALWAYS = (
    "--skip-prepare-environment",
    "--skip-python-version-check",
    "--skip-version-check",
    "--skip-torch-cuda-test",
    "--api",
    "--disable-console-progressbars",
)
# What some of them download at their start unless they are told not to.
_NOTHING_DOWNLOADED = ("--no-download-sd-model", "--do-not-download-clip")
# And what they call the CPU.
_CPU = {
    "a1111": ("--use-cpu", "all", "--no-half", *_NOTHING_DOWNLOADED),
    "forge": ("--always-cpu", *_NOTHING_DOWNLOADED),
    "classic": ("--always-cpu", "--no-download-sd-model"),
    "reforge": ("--always-cpu", *_NOTHING_DOWNLOADED),
    "neo": ("--cpu",),
}
# The emoji model draws with a TAESD. The default emphasis divides by the mean of the embedding,
# which is 0 for its text encoder. Noise from the CPU is the same in all hosts.
_SETTINGS: dict[str, Any] = {
    "sd_vae_decode_method": "TAESD",
    "sd_vae_encode_method": "TAESD",
    "randn_source": "CPU",
    "emphasis": "No norm",
    "samples_save": False,
    "grid_save": False,
    "show_progress_type": "TAESD",
    "show_progress_every_n_steps": -1,
    "lora_in_memory_limit": 0,
    "disable_all_extensions": "none",
    "VERSION_UID": "PY313",  # without it Forge Neo takes them for an old version's, and asks
}


class AnsweredWithError(Exception):
    """The host answered a request with an error: ``code`` and the decoded ``answer``."""

    def __init__(self, path: str, code: int, answer: Any) -> None:
        self.code, self.answer = code, answer
        super().__init__(f"{path} was answered with {code}: {answer}")


@dataclass
class WebuiHost:
    """A host on a free port; stopped on leaving the block.

    Attributes:
        folder: the host's own folder.
        kind: which of ``KINDS`` it is.
        work: models, extensions and settings of this one.
        arguments: more of the command line.
        settings: over those every test has.
        browser: whether it serves the tab too, or only the API.
        copied: the extension is a copy of what is published, not a link to the checkout.
    """

    folder: Path
    kind: str
    work: Path
    arguments: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    browser: bool = True
    extension: bool = True
    copied: bool = False
    start_timeout: float = 400.0

    def __post_init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self.start_seconds = 0.0
        self.log = self.work / "host.log"
        # The machine's proxy settings must not apply to the loopback address.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for name in ("models/Stable-diffusion", "models/Lora", "models/VAE-taesd", "extensions"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        place(PROBE, self.work / "extensions" / "probe")
        target = self.work / "extensions" / EXTENSION
        if not self.extension:
            target.unlink(missing_ok=True)
        elif self.copied:
            ignored = shutil.ignore_patterns(*UNPUBLISHED)
            shutil.copytree(ROOT, target, ignore=ignored, dirs_exist_ok=True)
        else:
            place(ROOT, target)

    @property
    def python(self) -> Path:
        """The Python that runs the host: WEBUI_PYTHON, or that of its ``venv`` folder."""
        named = os.environ.get("WEBUI_PYTHON")
        return Path(named) if named else self.folder / "venv" / "bin" / "python"

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self._port}/"

    @property
    def loras(self) -> Path:
        """The folder that ``<lora:...>`` tags name files of."""
        return self.work / "models" / "Lora"

    def __enter__(self) -> WebuiHost:
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

    def get(self, path: str, timeout: float = 120.0) -> Any:
        """Decoded answer to a GET."""
        return self._request(path, None, timeout)

    def post(self, path: str, body: Any = None, timeout: float = 600.0) -> Any:
        """Decoded answer to a POST of JSON."""
        return self._request(path, json.dumps(body or {}).encode(), timeout)

    def text(self) -> str:
        """What the host has printed until now."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """End it as a power cut would: nothing of it gets to clean up."""
        if self._process is not None:
            _signal_group(self._process, signal.SIGKILL)
            self._process.wait(10)

    def draw(self, prompt: str, **more: Any) -> np.ndarray:
        """A picture as (height, width, 3) in 0..255, the same for the same arguments."""
        return self.drawn(prompt, **more)[0]

    def drawn(self, prompt: str, kind: str = "txt2img", **more: Any) -> tuple[np.ndarray, str]:
        """A picture and its info text."""
        body = {
            "prompt": prompt,
            "negative_prompt": "",
            "seed": 7,
            "steps": 12,
            "width": 64,
            "height": 64,
            "cfg_scale": 5.0,
            "sampler_name": "Euler",
            "scheduler": "Normal",
        }
        answer = self.post(f"/sdapi/v1/{kind}", {**body, **more})
        picture = Image.open(io.BytesIO(base64.b64decode(answer["images"][0].split(",")[-1])))
        info = json.loads(answer["info"])["infotexts"][0]
        return np.asarray(picture.convert("RGB")).astype(np.float32), info

    def weights(self) -> dict[str, str]:
        """SHA-256 of the loaded model's weights, a name each for U-Net and text encoder."""
        return self.get("/probe/weights")

    def background(self, path: str, body: Any, timeout: float = 900.0) -> Asked:
        """A POST that goes on while other things are asked."""
        asked = Asked(self, path, body, timeout)
        asked.start()
        return asked

    def _request(self, path: str, body: bytes | None, timeout: float) -> Any:
        self._check_alive()
        headers = {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:{self._port}{path}"
        request = urllib.request.Request(url, data=body, headers=headers)
        try:
            with self._opener.open(request, timeout=timeout) as response:
                said = response.read()
        except urllib.error.HTTPError as error:
            raise AnsweredWithError(path, error.code, _decoded(error.read())) from None
        except OSError as error:
            self._check_alive()
            raise HostError(f"the host does not answer {path}: {error}") from error
        return _decoded(said)

    def _start(self) -> None:
        began = time.monotonic()
        self._port = _free_port()
        settings = {**_SETTINGS, **self.settings}
        (self.work / "config.json").write_text(json.dumps(settings))
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._await(began + self.start_timeout)
        self.start_seconds = time.monotonic() - began

    def _command(self) -> list[str]:
        where = ("--data-dir", str(self.work), "--port", str(self._port))
        # Its own scripts for the page: Gradio 4 serves them from the data directory alone.
        where += ("--gradio-allowed-path", str(self.folder))
        only_api = () if self.browser else ("--nowebui",)
        # Without a name the API alone listens on every address.
        parts = (*_ALWAYS, *_CPU[self.kind], *where, "--server-name", "127.0.0.1", *only_api)
        return [str(self.python), "launch.py", *parts, *self.arguments]

    def _environment(self) -> dict[str, str]:
        """The caller's environment, without what would change how Python finds modules."""
        dropped = ("PYTHON", "VIRTUAL_ENV", "COMMANDLINE_ARGS")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        return kept | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "PYTHONUNBUFFERED": "1",
            "PYTHONUTF8": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def _await(self, deadline: float) -> None:
        """Wait for the line that each of these hosts prints when it is ready.

        A request before that can end Automatic1111: the first one builds the middleware, to
        which it adds more at the end of its start.
        """
        while True:
            try:
                if "Startup time:" in self.text():
                    self.get("/probe/weights")
                    return
                self._check_alive()
                raise HostError("not ready")
            except (HostError, AnsweredWithError):
                self._check_alive()
                if time.monotonic() > deadline:
                    raise HostError(
                        f"the host did not start within {self.start_timeout:g} s:\n"
                        f"{tail(self.log, 60)}"
                    ) from None
            time.sleep(_POLL)

    def _check_alive(self) -> None:
        if self._process is None:
            raise HostError("the host is not running; use it as a context manager")
        status = self._process.poll()
        if status is not None:
            raise HostError(f"the host ended with exit code {status}:\n{tail(self.log, 60)}")

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        _signal_group(process, signal.SIGKILL)
        process.wait(10)


class Asked(threading.Thread):
    """A request under way; :meth:`wait` gives its answer or raises what came instead."""

    def __init__(self, host: WebuiHost, path: str, body: Any, timeout: float) -> None:
        super().__init__(daemon=True)
        self._asked = (host, path, body, timeout)
        self.answer: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        host, path, body, timeout = self._asked
        try:
            self.answer = host.post(path, body, timeout)
        except Exception as error:  # handed to whoever waits
            self.error = error

    def wait(self, timeout: float = 900.0) -> Any:
        self.join(timeout)
        if self.is_alive():
            raise TimeoutError(f"{self._asked[1]} was not answered within {timeout:g} s")
        if self.error is not None:
            raise self.error
        return self.answer


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """How far two pictures in 0..255 are apart, as RMS of values in 0..1."""
    return float(np.sqrt(np.mean(((a - b) / 255.0) ** 2)))


def _decoded(said: bytes) -> Any:
    try:
        return json.loads(said) if said else None
    except ValueError:
        return said.decode(errors="replace")
