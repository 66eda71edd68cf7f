"""Results as JSON lines: one line for each erasure, method and seed, found again by its key."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
LINES = RESULTS / "erasure.jsonl"


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of any JSON value; the order of keys doesn't matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest(paths: Iterable[Path]) -> str:
    """Of the text of source files, without what decides no result."""
    texts = sorted(hashlib.sha256(_decisive(path)).hexdigest() for path in paths)
    return digest(texts)


def _decisive(path: Path) -> bytes:
    """A file's lines but, in Python, imports and those that hold nothing or a comment alone.

    So a comment may explain a choice, and what a file uses may move, without everything being
    measured again; a comment behind code counts.
    """
    text = path.read_bytes()
    if path.suffix != ".py":
        return text
    tokens = tokenize.tokenize(io.BytesIO(text).readline)
    comments = {token.start for token in tokens if token.type == tokenize.COMMENT}
    imports: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(keepends=True), start=1)
    return b"".join(
        line
        for row, line in lines
        if line.strip()
        and row not in imports
        and (row, len(line) - len(line.lstrip())) not in comments
    )


class Cache:
    """The lines of a file by their key.

    The key is the digest of everything that matters, which is kept beside it: two runs that differ
    in any of it have different lines.

    Args:
        path: the file; made when the first line is added.

    Raises:
        ValueError: a line whose key isn't that of what it says it was made from.
    """

    def __init__(self, path: Path = LINES) -> None:
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        for line in _read(path):
            if line["key"] != digest(line["of"]):
                raise ValueError(
                    f"{path.name} has a line ({line['key']}) that doesn't belong to what it says "
                    "it was made from. It was edited; take it out to measure it again."
                )
            self._lines[line["key"]] = line

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._lines.values())

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, of: Mapping[str, Any]) -> dict[str, Any] | None:
        """The line made from ``of``, or None."""
        return self._lines.get(digest(of))

    def add(self, of: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Append a line and return it."""
        line = {"key": digest(of), "of": dict(of), **result}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n")
        self._lines[line["key"]] = line
        return line

    def keep_only(self, model: str) -> int:
        """Drop the lines of every other model; how many went."""
        kept = {key: line for key, line in self._lines.items() if line["of"]["model"] == model}
        gone = len(self._lines) - len(kept)
        if gone:
            text = "".join(
                json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n"
                for line in kept.values()
            )
            partial = self.path.with_name(f".{self.path.name}.part")
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.path)
            self._lines = kept
        return gone


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines only: a run that was cut off may leave half a line at the end."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    *lines, rest = text.split("\n")
    if rest:  # cut off; the next line must not be glued to it
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for line in lines:
        if line:
            yield json.loads(line)
