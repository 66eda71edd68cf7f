"""Tensors in files: whole or not there, read without trust, cleared up after processes that died.

What lies on a disk may be damaged, unreadable, removed by another process while it is read, or no
file at all. So a file is read in one go, and everything that can be amiss is said by one of two
kinds of error: :class:`OSError` where it can't be read, :class:`DamagedFileError` where it can.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

# A file under a temporary name that is older than this was left by a process that died.
ABANDONED_SECONDS = 24 * 3600
LONGEST_HEADER = 100_000_000  # as the format's own library has it
LONGEST_LISTED = 8_000_000  # bytes, of files that are only looked at; ours have far below 1 MB
LONGEST_REASON = 200  # letters: names that stand in the file are quoted
METADATA, ALIGNMENT = "__metadata__", 8  # bytes: the format's
NUMBERS = frozenset({"F16", "F32", "F64"})  # of the tensors that this pack writes

_TEMPORARY = ".concept-surgery-{}.tmp"
# The second was this pack's until version 0.7.
_OURS = re.compile(r"\.concept-surgery-\w+\.tmp|\..+\.safetensors\.[0-9a-f]{32}\.tmp")
_ANY_TEMPORARY = re.compile(r"\..*\.tmp")
# What the format's library wrote under until version 0.7, for this pack and for others.
_LIBRARYS = re.compile(r"\.tmp[A-Za-z0-9]{6}")


class DamagedFileError(ValueError):
    """A file that isn't what it was when it was written; says what is wrong with it."""


def has_mark(path: Path, mark: str) -> bool:
    """Whether a file's metadata have a key, without reading any of its tensors.

    Of what can't be read, is damaged or has a header larger than any that this pack writes, it
    says no.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= LONGEST_LISTED:
                return False
            header = file.read(length)
        # Most files of a folder are others', and looking for bytes is quicker than reading JSON.
        if json.dumps(mark).encode() not in header:
            return False
        metadata = _entries(header).get(METADATA)
    except (OSError, DamagedFileError):
        return False
    return isinstance(metadata, dict) and mark in metadata


def read_safetensors(path: Path, mark: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file.

    Args:
        mark: a key of the metadata that tells one's own files. Of others no tensors are read,
            however large they are.

    Raises:
        OSError: it can't be read, or is no ordinary file: opening a pipe would wait forever.
        DamagedFileError: it can be read and isn't whole, or holds other things than numbers.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not an ordinary file", str(path))
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(LONGEST_HEADER, os.fstat(file.fileno()).st_size - 8):
            raise DamagedFileError("it ends before its header does")
        header = file.read(length)
        entries = _entries(header)
        metadata = entries.pop(METADATA, {})
        if not isinstance(metadata, dict) or mark not in metadata:
            return {}, {}
        rest = file.read()
    if not all(isinstance(text, str) for text in metadata.values()):
        raise DamagedFileError("its metadata are not texts")
    for entry in entries.values():
        if not isinstance(entry, dict) or str(entry.get("dtype")) not in NUMBERS:
            raise DamagedFileError("it holds other things than numbers")
    try:
        return metadata, load(start + header + rest)
    except SafetensorError as error:
        raise DamagedFileError(str(error)[:LONGEST_REASON]) from error


def _entries(header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header, parse_int=str)  # whose length nobody has looked at
    except (ValueError, RecursionError) as error:
        raise DamagedFileError("its header can't be read") from error
    if not isinstance(entries, dict):
        raise DamagedFileError("its header can't be read")
    return entries


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], info: dict[str, str]) -> None:
    """Write under a temporary name beside ``path``, then rename: never a half-written file.

    Raises:
        OSError: the folder can't be written, or the disk is full; nothing is left behind.
    """
    write_whole(path, _bytes_of(tensors, info))


def create_safetensors(path: Path, tensors: Mapping[str, Tensor], info: dict[str, str]) -> None:
    """The same for a name that nothing has yet: of several that write it at once, one does.

    Raises:
        FileExistsError: the name is taken.
        OSError: as there.
    """
    create_whole(path, _bytes_of(tensors, info))


def write_whole(path: Path, data: bytes) -> None:
    """The same of any bytes.

    Raises:
        OSError: as there.
    """
    with _whole_file(path.parent, data) as temporary:
        os.replace(temporary, path)


def create_whole(path: Path, data: bytes) -> None:
    """The same for a name that nothing has yet.

    Raises:
        FileExistsError: the name is taken.
        OSError: as there.
    """
    with _whole_file(path.parent, data) as temporary:
        _name_if_free(temporary, path)


def _bytes_of(tensors: Mapping[str, Tensor], info: dict[str, str]) -> bytes:
    # The library can write files, too, but under names that nobody could clear up after, and
    # readable by their owner alone.
    return save(dict(tensors), metadata=info) if tensors else _no_tensors(info)


def _no_tensors(info: dict[str, str]) -> bytes:
    """A file with metadata alone; version 0.4.2 of the library writes its header in two pieces."""
    header = json.dumps({METADATA: info}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


@contextmanager
def _whole_file(folder: Path, data: bytes) -> Iterator[Path]:
    """A file with these bytes under a temporary name, which is gone at the end."""
    # A number of one's own, as containers all have process 1.
    temporary = folder / _TEMPORARY.format(uuid.uuid4().hex)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _name_if_free(temporary: Path, path: Path) -> None:
    """Give a file its name unless something has it.

    Raises:
        FileExistsError: something has it.
        OSError: no file can be named there.
    """
    if os.name == "nt":
        os.rename(temporary, path)  # which overwrites nothing there
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except (OSError, AttributeError):  # file systems, and systems, without a second name
        _rename_if_free(temporary, path)


def _rename_if_free(temporary: Path, path: Path) -> None:
    """The same where renaming overwrites: whoever holds the claim on a name may look and rename."""
    name = hashlib.sha256(path.name.casefold().encode()).hexdigest()[:32]
    claim = path.with_name(_TEMPORARY.format(f"claim_{name}"))
    claim.open("xb").close()
    try:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.rename(temporary, path)
    finally:
        claim.unlink(missing_ok=True)


def remove_abandoned(folder: Path, shared: bool, mark: bytes = b"") -> None:
    """Remove what processes that died while writing have left in a folder.

    Args:
        shared: whether others write there, too. Then only what is known to be this pack's goes.
        mark: bytes in the beginning of this pack's files, to tell them in a shared folder.
    """
    for entry in _scanned(folder):
        try:
            old = entry.stat(follow_symlinks=False).st_mtime < time.time() - ABANDONED_SECONDS
            if old and entry.is_file(follow_symlinks=False) and _is_left(entry, shared, mark):
                os.unlink(entry.path)
        except OSError:  # another process was faster, or it isn't ours to remove
            continue


def _scanned(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.name.startswith(".")]
    except OSError:
        return []


def _is_left(entry: os.DirEntry, shared: bool, mark: bytes) -> bool:
    if _LIBRARYS.fullmatch(entry.name):
        return not shared or _begins_with(Path(entry.path), mark)
    return bool((_OURS if shared else _ANY_TEMPORARY).fullmatch(entry.name))


def _begins_with(path: Path, mark: bytes) -> bool:
    """Whether a mark stands in the header of what may be half a file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return bool(mark) and mark in file.read(min(length, LONGEST_HEADER))
