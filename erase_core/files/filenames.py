"""Names for files and folders that every system takes."""

from __future__ import annotations

import re

# Systems take 255 bytes for a name, and to what a person chooses come ending and number.
LONGEST_NAME = 255 - len(".safetensors") - len("_9999999")
LONGEST_PATH = 1000
_FORBIDDEN = re.compile(r'[\\:*?"<>|\x00-\x1f\x7f-\x9f]')
# Windows means devices by these, with any ending.
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$"}
_DEVICES |= {f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789¹²³"}


def name_problem(name: str) -> str:
    """Why a name, of a file without its ending or of a folder, can't be one; "" if it can."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "it has half of a character in it"
    if not name:
        return "a name is empty"
    if name.startswith("."):
        return "a name begins with a dot"
    if name != name.strip() or name.endswith("."):
        return "a name begins or ends with a blank, or ends with a dot"
    if _FORBIDDEN.search(name):
        return 'some systems forbid \\ : * ? " < > | and control characters in names'
    if name.split(".")[0].rstrip().upper() in _DEVICES:
        return f"{name!r} is a device on Windows"
    if length > LONGEST_NAME:
        return f"a name has {length} bytes (a letter has up to four) and at most {LONGEST_NAME} fit"
    return ""


def path_problem(path: str) -> str:
    """The same of a name that may have folders before it, with / between them."""
    problems = (problem for name in path.split("/") if (problem := name_problem(name)))
    problem = next(problems, "")
    if not problem and len(path.encode()) > LONGEST_PATH:
        return f"it has {len(path.encode())} bytes with its folders, and at most {LONGEST_PATH} fit"
    return problem
