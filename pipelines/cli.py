"""The command ``concept-surgery``: erase, show, check, merge."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..erase_core import (
    KINDS,
    PRESETS,
    EraseSettings,
    Erasure,
    ErasureFileError,
    GradientError,
    NothingLearnedError,
    PredictionError,
    SettingsError,
    SubspaceError,
    TrainingError,
    report_text,
)
from ..erase_core.artefact.formats import DIFFUSERS, NAMINGS
from ..erase_core.artefact.stack import STRONGEST
from ..erase_core.settings.layers import LayerRuleError
from .networks import PipelineError

# What the command ends with, beside argparse's own 2.
DONE, REFUSED, FITS_BADLY, INTERRUPTED = 0, 1, 3, 130
SUFFIX = ".safetensors"
_NO_DIFFUSERS = (
    "This command needs diffusers, which isn't installed. Run: "
    'pip install "concept-surgery[diffusers]"'
)


class CommandError(ValueError):
    """What was typed can't work."""


_SAID = (
    CommandError,
    PipelineError,
    ErasureFileError,
    SettingsError,
    LayerRuleError,
    NothingLearnedError,
    SubspaceError,
    GradientError,
    TrainingError,
    PredictionError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Its exit code: 0 done, 1 refused (the reason is on stderr), 2 typed wrongly, 3 an erasure
        that fits and was made on another model, 130 stopped by Ctrl-C.
    """
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given))
    except KeyboardInterrupt:
        return _say("Stopped. Nothing was written.", INTERRUPTED)
    except BrokenPipeError:  # whoever reads the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return REFUSED
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("diffusers", "transformers", "tqdm"):
            raise
        return _say(_NO_DIFFUSERS, REFUSED)
    except _SAID as error:
        return _say(str(error), REFUSED)


def _say(text: str, code: int) -> int:
    print(f"concept-surgery: {text}", file=sys.stderr)
    return code


def _erase(given: argparse.Namespace) -> int:
    """Train an erasure and write its file."""
    path = _new_file(given.out, given.overwrite)
    settings = _settings(given)
    from .erasing import erase, settings_for
    from .loading import load_pipeline

    # What the model's own family decides isn't known before it is loaded.
    early = {name: value for name, value in settings.items() if name not in ("form", "layers")}
    settings_for({}, given.erase, given.replace_with, given.keep, given.preset, **early)
    pipe = load_pipeline(given.model, given.config, given.device, given.dtype)
    erasure = erase(
        pipe,
        given.erase,
        given.replace_with,
        given.keep,
        given.preset,
        progress=not given.quiet,
        cache=given.cache,
        **settings,
    )
    erasure.save(path, given.names, overwrite=given.overwrite)
    print(f"{erasure.report}\n\nSaved {path}")
    return DONE


def _show(given: argparse.Namespace) -> int:
    """Print the report of a file."""
    print(report_text(Erasure.load(Path(given.file)).record))
    return DONE


def _check(given: argparse.Namespace) -> int:
    """Say whether an erasure fits a model."""
    erasure = Erasure.load(Path(given.file))
    from .applied import misfits
    from .loading import load_pipeline

    pipe = load_pipeline(given.model, given.config, given.device, given.dtype)
    found = misfits(pipe, erasure)
    for text in found:
        print(text)
    if found:
        return FITS_BADLY
    print(f"The erasure of {erasure.concept!r} was made on this model and fits.")
    return DONE


def _merge(given: argparse.Namespace) -> int:
    """Write a model with an erasure in its weights."""
    path, model = Path(given.out), Path(given.model).expanduser()
    if not path.parent.is_dir():
        raise CommandError(f"There is no folder {str(path.parent)!r} to write {path.name!r} into.")
    if os.path.lexists(path):
        raise CommandError(f"{str(path)!r} is there already. Choose another name.")
    if not -STRONGEST <= given.strength <= STRONGEST:
        raise CommandError(
            f"--strength must be between {-STRONGEST:g} and {STRONGEST:g}, not {given.strength:g}."
        )
    erasure = Erasure.load(Path(given.file))
    from .applied import merged
    from .loading import load_pipeline
    from .merging import merge_into_file, write_new

    if model.is_file():
        _new_file(given.out, False)
        merge_into_file(erasure, model, path, given.strength)
    else:
        pipe = merged(load_pipeline(given.model, None, "cpu", given.dtype), erasure, given.strength)
        write_new(path, pipe.save_pretrained)
    print(f"Saved {path}")
    return DONE


def _new_file(out: str, overwrite: bool) -> Path:
    """The path of a file to write, looked at before anything takes time.

    Raises:
        CommandError: nothing can be written there, or something is there already.
    """
    path = Path(out).expanduser()
    if path.suffix != SUFFIX:
        raise CommandError(f"--out must end in {SUFFIX}, and is {out!r}.")
    if not path.parent.is_dir():
        raise CommandError(f"There is no folder {str(path.parent)!r} to write {path.name!r} into.")
    if path.is_dir() or (os.path.lexists(path) and not overwrite):
        raise CommandError(f"{out!r} is there already. Choose another name, or add --overwrite.")
    return path


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """What was typed of the settings, None left out.

    Raises:
        CommandError: a name after --set that isn't one, or a value of another kind.
    """
    chosen = {
        "negative_prompts": tuple(given.negative),
        "kind": given.kind,
        "seed": given.seed,
        "resolution": given.resolution,
        "distilled": given.distilled,
    }
    kinds = {field.name: str(field.type) for field in dataclasses.fields(EraseSettings)}
    for pair in given.set:
        name, separator, value = pair.partition("=")
        if not separator or name not in kinds or name in ("concepts", "keep"):
            known = ", ".join(sorted(set(kinds) - {"concepts", "keep"}))
            raise CommandError(f"--set {pair!r} isn't NAME=VALUE with a name among: {known}.")
        chosen[name] = _value(name, value, kinds[name])
    return {name: value for name, value in chosen.items() if value is not None}


def _value(name: str, text: str, kind: str) -> Any:
    if kind.startswith("tuple"):
        return tuple(text.splitlines())
    if kind == "bool":
        if text not in ("true", "false"):
            raise CommandError(f"--set {name}={text!r} must be true or false.")
        return text == "true"
    try:
        return int(text) if kind == "int" else float(text) if kind.startswith("float") else text
    except ValueError as error:
        wanted = "a whole number" if kind == "int" else "a number"
        raise CommandError(f"--set {name} must be {wanted}, not {text!r}.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="concept-surgery",
        description="Erase a concept from a diffusion model, and keep the rest as it was.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model = "a diffusers folder, a single .safetensors file, or a model in the Hugging Face cache"
    erase = _command(commands, "erase", _erase, "train an erasure and save it as a LoRA file")
    erase.add_argument("model", metavar="MODEL", help=model)
    _what_to_erase(erase)
    _how_to_load(erase)
    show = _command(commands, "show", _show, "print the report of an erasure")
    check = _command(commands, "check", _check, "say whether an erasure fits a model")
    merge = _command(commands, "merge", _merge, "write a model with an erasure in its weights")
    for command in (show, check, merge):
        command.add_argument("file", metavar="FILE", help="the file of an erasure")
    for command in (check, merge):
        command.add_argument("model", metavar="MODEL", help=model)
    _how_to_load(check)
    merge.add_argument("--out", required=True, help="the file or folder to write, a new one")
    merge.add_argument("--strength", type=float, default=1.0, help="1 erases as trained")
    merge.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="of a folder")
    return parser


def _command(commands: Any, name: str, run: Callable[..., int], what: str) -> Any:
    command = commands.add_parser(name, help=what, description=f"{what.capitalize()}.")
    command.set_defaults(run=run)
    return command


def _what_to_erase(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--erase", action="append", required=True, help='"cat" or "cat => dog"; may be repeated')
    add("--replace-with", default="", help="what is drawn instead, for all that don't say it")
    add("--keep", action="append", default=[], help="a prompt that must not change; repeatable")
    add("--negative", action="append", default=[], help="a negative prompt you use; repeatable")
    add("--kind", choices=KINDS, help="a thing, a style, a person, or tags")
    add("--preset", choices=list(PRESETS), default="balanced", help="default: balanced")
    add("--seed", type=int, help="of the training")
    add("--resolution", type=int, help="side of the training pictures; default: the model's own")
    add("--distilled", action="store_true", help="for Turbo, Lightning, LCM and the like")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting")
    add("--out", required=True, help="the .safetensors file to write")
    add("--overwrite", action="store_true", help="write over a file that is there")
    add("--names", choices=NAMINGS, default=DIFFUSERS, help="of the matrices; default: diffusers")
    add("--cache", help="a folder for finished erasures and what was read of the language")
    add("--quiet", action="store_true", help="no progress bar")


def _how_to_load(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--config", help="for a single file: a diffusers folder of the same kind of model")
    add("--device", help="cpu, cuda, mps; default: a GPU if there is one")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="default: as the device likes")
