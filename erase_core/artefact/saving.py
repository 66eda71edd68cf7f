"""Saving an erasure under a name that a person chose, in a folder that others write to as well."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from safetensors import safe_open

from ..files.disk import has_mark, remove_abandoned
from ..files.filenames import path_problem
from .erasure import Erasure, ErasureFileError
from .formats import KOHYA, RECORD_KEY

SUFFIX = ".safetensors"
ADD_NUMBER, OVERWRITE = IF_TAKEN = ("add a number", "overwrite")


def save_erasure(
    erasure: Erasure,
    folder: Path,
    filename: str,
    names: str = KOHYA,
    *,
    if_taken: str = ADD_NUMBER,
) -> Path:
    """Write the erasure under a name in ``folder``; the same one twice gives one file.

    Several that save under one name at once each get a file. What other programs show of it is
    written by :func:`beside.write_beside`.

    Args:
        filename: with or without folders inside of ``folder`` before it, and / between them.
        if_taken: :data:`ADD_NUMBER` leaves what has the name as it is, :data:`OVERWRITE` replaces
            it if it is an erasure.

    Raises:
        ErasureFileError: a name that can't be one, a place outside of ``folder``, or one that can't
            be written, or a matrix that has no name of that kind, or another file than an erasure
            where one is to be replaced.
    """
    wanted = checked_name(filename)
    place = place_inside(folder, wanted)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ErasureFileError(
            f"The folder {str(place)!r} can't be made: {error.strerror or error}. Check its rights."
        ) from error
    place_inside(folder, wanted)  # another process may have put a link there meanwhile
    remove_abandoned(place, shared=True, mark=f'"{RECORD_KEY}"'.encode())
    for path in _names_in(place, wanted):
        if _is_written(erasure, path, names, if_taken):
            return path
    raise AssertionError("numbers don't end")


def planned_path(folder: Path, filename: str, if_taken: str = ADD_NUMBER) -> Path:
    """The file that a new erasure would now be saved to; nothing is written.

    Raises:
        ErasureFileError: as in :func:`save_erasure`.
    """
    wanted = checked_name(filename)
    for path in _names_in(place_inside(folder, wanted), wanted):
        if not os.path.lexists(path):
            return path
        if if_taken == OVERWRITE:
            _refuse_what_is_no_erasure(path)
            return path
    raise AssertionError("numbers don't end")


def is_erasure_file(path: Path) -> bool:
    """Whether a file says that it is an erasure; only its header is read."""
    return has_mark(path, RECORD_KEY)


def _names_in(place: Path, name: str) -> Iterator[Path]:
    """The file of a name, then the same with numbers from 2 on."""
    stem = name.rpartition("/")[2]
    yield place / (stem + SUFFIX)
    for number in count(2):
        yield place / f"{stem}_{number}{SUFFIX}"


def _is_written(erasure: Erasure, path: Path, names: str, if_taken: str) -> bool:
    """Whether a file holds the erasure now, because it did before or because it was free."""
    if not os.path.lexists(path):
        try:
            erasure.save_new(path, names)
        except FileExistsError:  # another saver was faster
            pass
        else:
            return True
    if _holds(path, erasure, names):
        return True
    if if_taken != OVERWRITE:
        return False
    _refuse_what_is_no_erasure(path)
    erasure.save(path, names)
    return True


def _refuse_what_is_no_erasure(path: Path) -> None:
    if not is_erasure_file(path):
        raise ErasureFileError(
            f"{path.name} is there already and is not an erasure, so it isn't overwritten. Choose "
            f"another file name, or {ADD_NUMBER!r}."
        )


def checked_name(filename: str) -> str:
    """The file's name without its ending, with the folders before it.

    Raises:
        ErasureFileError: it can't be a name on every system, or leads out of the folder.
    """
    ending = filename[-len(SUFFIX) :].lower() == SUFFIX
    name = filename[: -len(SUFFIX)] if ending else filename
    problem = path_problem(name)
    if problem:
        raise ErasureFileError(
            f"{_short(filename)} can't be a file name: {problem}. Give a name with or without "
            "folders before it, such as no_ink or styles/no_ink."
        )
    return name


def place_inside(folder: Path, name: str) -> Path:
    """The folder that a file goes into.

    Args:
        folder: that of all erasures.
        name: of the file, with the folders before it.

    Raises:
        ErasureFileError: a link on the way leads out of ``folder``, or a file is in the way.
    """
    place = folder.joinpath(*name.split("/")[:-1])
    try:
        outside = not place.resolve().is_relative_to(folder.resolve())
        in_the_way = [
            one for one in (place, *place.parents) if one.is_relative_to(folder) and one.is_file()
        ]
    except (OSError, RuntimeError) as error:  # no rights, or links that lead in a circle
        raise ErasureFileError(
            f"The folder {str(place)!r} can't be looked into: {error}. Check its rights."
        ) from error
    if outside:
        raise ErasureFileError(
            f"{_short(name)} would lie outside of {str(folder)!r}: a link on the way leads to "
            f"{str(place.resolve())!r}. Choose another folder."
        )
    if in_the_way:
        raise ErasureFileError(
            f"The folder {str(in_the_way[0])!r} can't be made: there is a file of that name. "
            "Check its rights, or choose another folder."
        )
    return place


def _short(text: str) -> str:
    """A text in quotes, of a long one the beginning."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _holds(path: Path, erasure: Erasure, names: str) -> bool:
    try:
        same = Erasure.load(path).identity == erasure.identity
    except ErasureFileError:
        return False
    if not same:
        return False
    with safe_open(str(path), framework="pt") as file:
        return set(file.keys()) == set(erasure.tensors(names))
