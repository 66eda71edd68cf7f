"""Saving an erasure under a name that a person chose, in a folder that others write to as well."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import safe_open

from ..files.disk import remove_abandoned
from ..files.filenames import path_problem
from .erasure import Erasure, ErasureFileError
from .formats import KOHYA, RECORD_KEY

SUFFIX = ".safetensors"


def save_erasure(erasure: Erasure, folder: Path, filename: str, names: str = KOHYA) -> Path:
    """Write the erasure under a free name in ``folder``; the same one twice gives one file.

    Several that save under one name at once each get a file.

    Args:
        filename: with or without folders inside of ``folder`` before it, and / between them.

    Raises:
        ErasureFileError: a name that can't be one, a place outside of ``folder``, or one that can't
            be written, or a matrix that has no name of that kind.
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
    stem, number = wanted.rpartition("/")[2], 0
    while True:
        number += 1
        path = place / (f"{stem}_{number}{SUFFIX}" if number > 1 else stem + SUFFIX)
        if not os.path.lexists(path):
            try:
                erasure.save_new(path, names)
            except FileExistsError:  # another saver was faster
                pass
            else:
                return path
        if _holds(path, erasure, names):
            return path


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
