"""``python -m tools setup|demo|test|lint|publishable|templates``: each sets up what it needs first.

Runs with any Python from 3.10 on and the standard library; all but setup then run again in
``build/venv``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.environment import (
    BUILD,
    HOST,
    ROOT,
    VENV,
    ToolError,
    ensure_environment,
    inside_venv,
)

INTERRUPTED = 130
SHARED = ("--dist", "loadfile", "--no-loadscope-reorder")  # how the tests are shared among them
PROCESSES = min(2, os.cpu_count() or 1)  # for the tests; each holds a host and its models


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options, rest = _parse(arguments)
    try:
        python = str(ensure_environment())
        if options.command == "setup":
            print(f"Ready: packages in {VENV}, host in {HOST}")
            return 0
        if options.command == "test":
            return _test(python, rest)
        if options.command == "lint":
            return _lint(python)
        if not inside_venv():
            return _call([python, "-m", "tools", *(arguments or sys.argv[1:])])
        if options.command == "publishable":
            return _publishable()
        if options.command == "templates":
            return _templates(options.pictures)
        from tools.demo import run_demo

        run_demo(options.threads)
        return 0
    except ToolError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m tools", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup", help="make build/venv and build/host")
    demo = commands.add_parser("demo", help="train an erasure and draw before and after")
    demo.add_argument("--threads", type=int, default=2, help="processor threads for the host")
    commands.add_parser("lint", help="check style, format and types")
    commands.add_parser("publishable", help="say what keeps the pack from being published")
    templates = commands.add_parser("templates", help="write the example workflows")
    templates.add_argument("--pictures", action="store_true", help="draw thumbnails, for minutes")
    commands.add_parser("test", help="run the tests; further arguments go to pytest")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "test":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options, [argument for argument in rest if argument != "--"]


def _publishable() -> int:
    from tools.published import problems, published_files

    found = problems(ROOT)
    for problem in found:
        print(problem)
    if found:
        print("Not publishable yet: mend or fill in what is listed above.")
        return 1
    print(f"Publishable: {len(published_files(ROOT))} files, nothing missing.")
    return 0


def _templates(pictures: bool) -> int:
    from tools.templates import FOLDER, write

    write()
    if pictures:
        from tools.pack import load_pack

        load_pack()
        from tools.thumbnails import draw

        draw()
    print(f"Written: {FOLDER}")
    return 0


def _lint(python: str) -> int:
    """All of them, whatever the first ones find; the exit code is that of the worst."""
    # The checkout is a package under another name than that of its folder, and on no path: its
    # ``nodes`` would be taken for the host's.
    typed = BUILD / "typed"
    typed.mkdir(exist_ok=True)
    for name, place in (("concept_surgery", ROOT), ("tools", ROOT / "tools")):
        link = typed / name
        if link.resolve() != place.resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(place, target_is_directory=True)
    found = [
        _call([python, "-m", "ruff", "check", "."]),
        _call([python, "-m", "ruff", "format", "--check", "."]),
        _call([python, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")], cwd=typed),
    ]
    return max(found)


def _test(python: str, arguments: Sequence[str]) -> int:
    # More than one thread makes these many small operations slower, not faster; more than one
    # process doesn't. A file's tests share what they trained, so they stay together.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    side_by_side = () if arguments else ("-n", str(PROCESSES), *SHARED)
    status = _call([python, "-m", "pytest", *side_by_side, *arguments], environment)
    print(f"Logs of the hosts that the tests started: {BUILD / 'logs'}", flush=True)
    return status


def _call(
    command: Sequence[str], environment: dict[str, str] | None = None, cwd: Path = ROOT
) -> int:
    """Run a command in the checkout; on Ctrl-C let it clean up, as it got the signal too."""
    with subprocess.Popen(command, cwd=cwd, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
