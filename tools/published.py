"""What the registry would publish: the files, what must not be in them, what is still missing.

The registry's client packs the files that git tracks, without those that .comfyignore names, and
adds what [tool.comfy] includes. Only the standard library is used, as everywhere in the first
steps of ``tools``.
"""

from __future__ import annotations

import ast
import re
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tools.environment import ToolError

IGNORE_FILE = ".comfyignore"
KINDS = {".py", ".js", ".md", ".txt", ".json", ".jpg", ".png", ".toml"}
WITHOUT_ENDING = {"LICENSE"}

# Modules that run programs or other code, open connections, or make objects out of bytes.
FORBIDDEN_MODULES = frozenset(
    "_pickle _posixsubprocess _socket aiohttp asyncio base64 builtins cffi cloudpickle code codecs "
    "codeop ctypes dill ensurepip ftplib http httpx huggingface_hub imp imaplib importlib joblib "
    "marshal multiprocessing nntplib paramiko pickle pip pkgutil poplib pty requests runpy shelve "
    "smtplib socket socketserver ssl subprocess telnetlib urllib urllib3 webbrowser websocket "
    "websockets xmlrpc zipimport".split()
)
ALLOWED_OF_THEM = frozenset({"importlib.resources", "importlib.util.find_spec"})
# The same within modules that are used. What begins with one of these is meant, too.
FORBIDDEN_PATHS = (
    "comfy.utils.load_torch_file",
    "numpy.load",
    "os.exec",
    "os.fork",
    "os.popen",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "operator.attrgetter",
    "operator.methodcaller",
    "sys.modules.",
    "torch.classes.load_library",
    "torch.distributed",
    "torch.hub",
    "torch.jit.load",
    "torch.load",
    "torch.ops.load_library",
    "torch.package",
    "torch.serialization",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "types.CodeType",
)
FORBIDDEN_NAMES = frozenset(
    {"__builtins__", "__import__", "__loader__", "__spec__", "compile", "eval", "exec"}
    | {"globals", "locals", "breakpoint"}
)
# Ways round, whatever they are asked of.
FORBIDDEN_ATTRIBUTES = frozenset(
    {"__builtins__", "__globals__", "__import__", "__loader__", "__reduce__", "__reduce_ex__"}
    | {"__subclasses__", "load_module", "exec_module", "import_module", "popen", "system"}
)

FORBIDDEN_SCRIPT = {
    "eval": r"\beval\b",
    "Function from text": r"\bFunction\s*\(|\.constructor\s*\(",
    "a timer from text": r"\bset(?:Timeout|Interval)\s*\(\s*[\"'`]",
    "text as HTML": r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|srcdoc|createContextualFragment"
    r"|setHTMLUnsafe|parseFromString)\b|\bdocument\s*\.\s*write(?:ln)?\b",
    "a property by a name in text": r"\b(?:window|globalThis|document)\s*\[",
    "a foreign host": r"[\"'`]\s*(?:(?:https?|wss?|ftp|data|javascript):|//[\w\[])",
    "a connection": r"\b(?:XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts"
    r"|RTCPeerConnection)\b|\bfetch\s*\(\s*(?![\"'`]/(?!/))",
    "a script from elsewhere": r"\bimport\s*\(|createElement\s*\(\s*[\"'`](?:script|iframe)",
}
FORBIDDEN_DOCUMENT = {
    "HTML": r"<[/!]?[a-zA-Z]|<!-",
    "a link that is a script": r"(?i)\]\(\s*(?:javascript|data|vbscript):",
    "a picture from elsewhere": r"!\[[^\]]*\]\(\s*(?:https?:)?//",
}

# What the registry shows of a pack or judges it by, as keys of pyproject.toml.
FIELDS = (
    "project.name",
    "project.version",
    "project.description",
    "project.readme",
    "project.license",
    "project.requires-python",
    "project.dependencies",
    "project.classifiers",
    "project.urls.Repository",
    "project.urls.Issues",
    "tool.comfy.PublisherId",
    "tool.comfy.DisplayName",
    "tool.comfy.Icon",
    "tool.comfy.requires-comfyui",
)
ADDRESSES = ("project.urls.", "tool.comfy.Icon")


class PublishingError(ToolError):
    """The list of published files can't be made."""


def published_files(root: Path) -> list[str]:
    """Paths of what would be in the archive, relative to ``root``.

    Raises:
        PublishingError: ``root`` is no checkout, or there is no git.
    """
    tracked = _git(root, "ls-files", "-z")
    ignored = set(_git(root, "ls-files", "-z", "-i", "-c", f"--exclude-from={IGNORE_FILE}"))
    included = [path.strip("/") for path in _includes(_project(root))]
    added = {
        path.relative_to(root).as_posix()
        for name in included
        for path in ([root / name] if (root / name).is_file() else (root / name).rglob("*"))
        if path.is_file()
    }
    return sorted((set(tracked) - ignored) | added)


def pack(root: Path, archive: Path) -> None:
    """Write the archive that the registry's client would send."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in published_files(root):
            packed.write(root / name, name)


def missing_fields(project: Mapping[str, Any]) -> list[str]:
    """Keys of pyproject.toml that are empty, or that should be an https address and are none.

    Args:
        project: the content of the file.
    """
    return [key for key in FIELDS if not _is_filled(key, _value(project, key))]


def faults(name: str, content: bytes) -> list[str]:
    """What of a published file must not be published.

    Args:
        name: its path in the archive.
        content: its bytes.
    """
    path = PurePosixPath(name)
    if path.suffix not in KINDS and path.name not in WITHOUT_ENDING:
        return [f"{name}: a kind of file that nothing here needs"]
    if path.suffix == ".py":
        found = list(python_faults(content.decode("utf-8")))
    elif path.suffix == ".js":
        found = list(_patterns(FORBIDDEN_SCRIPT, content.decode("utf-8")))
    elif path.suffix == ".md" and path.parts[0] == "web":
        found = list(_patterns(FORBIDDEN_DOCUMENT, content.decode("utf-8")))
    else:
        found = []
    return [f"{name}:{line}: {what}" for line, what in found]


def python_faults(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of what Python source must not use, under whatever name it was imported."""
    tree = ast.parse(source)
    names = dict(_imported_names(tree))
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            for path in _imports(node):
                if _is_forbidden(path):
                    yield line, path
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            path = _dotted(node, names)
            if node.attr in FORBIDDEN_ATTRIBUTES or (path and _is_forbidden(path)):
                yield line, path or node.attr
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield node.value.lineno, "allow_pickle"
        elif isinstance(node, ast.Subscript) and _dotted(node.value, names) == "sys.modules":
            yield line, "sys.modules[...]"
        elif isinstance(node, ast.Call):
            yield from ((line, what) for what in _reached_by_name(node, names))


def problems(root: Path) -> list[str]:
    """Everything that keeps the checkout from being published, in words.

    Raises:
        PublishingError: ``root`` is no checkout, or there is no git.
    """
    missing = [f"pyproject.toml lacks {key}" for key in missing_fields(_project(root))]
    found = (faults(name, (root / name).read_bytes()) for name in published_files(root))
    return missing + [fault for of_one in found for fault in of_one]


def _value(project: Mapping[str, Any], key: str) -> Any:
    value: Any = project
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _is_filled(key: str, value: Any) -> bool:
    if key.startswith(ADDRESSES):
        # No placeholder: a host with a dot that isn't one of those kept for examples.
        host = re.match(r"https://([\w-]+(?:\.[\w-]+)+)/", f"{value}/")
        return host is not None and not re.search(r"(^|\.)(example|invalid)(\.|$)", host[1])
    return bool(value.strip() if isinstance(value, str) else value)


def _reached_by_name(call: ast.Call, names: Mapping[str, str]) -> Iterator[str]:
    """Attributes that a call gets by a name that is a text."""
    function = getattr(call.func, "id", "")
    if function not in ("getattr", "vars", "setattr", "delattr") or not call.args:
        return
    path = _dotted(call.args[0], names)
    if function == "vars":
        if path:
            yield f"vars({path})"
    elif len(call.args) > 1:
        name = call.args[1]
        if isinstance(name, ast.Constant):
            whole = f"{path}.{name.value!s}" if path else ""
            if name.value in FORBIDDEN_ATTRIBUTES or (whole and _is_forbidden(whole)):
                yield whole or str(name.value)
        elif path:
            yield f"{function} of {path} by a name that isn't written out"


def _imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each name that stands for a module or for something of one, and its full path."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _imports(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if node.level == 0 else []


def _dotted(node: ast.AST, names: Mapping[str, str]) -> str:
    """The full path of a name or of a chain of attributes of a module; "" of anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value, names)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def _is_forbidden(path: str) -> bool:
    allowed = any(path == one or path.startswith(f"{one}.") for one in ALLOWED_OF_THEM)
    if allowed or path in ("importlib", "importlib.util"):  # how one gets to the allowed ones
        return False
    inside = any(path == one or path.startswith(one) for one in FORBIDDEN_PATHS)
    star = path.endswith(".*")
    return inside or star or path.split(".")[0] in FORBIDDEN_MODULES or ".__dict__" in path


def _patterns(patterns: Mapping[str, str], text: str) -> Iterator[tuple[int, str]]:
    for what, pattern in patterns.items():
        for found in re.finditer(pattern, text):
            yield text.count("\n", 0, found.start()) + 1, f"{what} ({found[0].strip()!r})"


def _git(root: Path, *arguments: str) -> list[str]:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PublishingError(
            f"git can't list the files of {root} ({error}). Run this in a clone, with git there."
        ) from error
    return [name for name in done.stdout.decode("utf-8").split("\0") if name]


def _project(root: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def _includes(project: Mapping[str, Any]) -> list[str]:
    return list(project.get("tool", {}).get("comfy", {}).get("includes", []))
