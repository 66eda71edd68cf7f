"""Ways into the two code bases without letting them meet on ``sys.path``.

The checkout has a package called ``nodes`` and the host a module of the same name, which half
of the host imports. So the checkout is reachable only as ``concept_surgery``, as it is inside
the host, where its folder is never on the path either.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tools.environment import HOST, ON_GPU, ROOT, STUBS

PACKAGE = "concept_surgery"


def load_pack() -> ModuleType:
    """Import the checkout as the package ``concept_surgery``, once."""
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT} cannot be imported as a package")
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[PACKAGE]
        raise
    return package


def use_host() -> None:
    """Make the host's modules importable in this process, on the CPU and with one thread.

    With ``HOST_ON_GPU=1`` in the environment it takes the GPU instead.

    Has to come before the first import of ``comfy``: the host reads its command line and picks
    its device while it is being imported.
    """
    taken = getattr(sys.modules.get("nodes"), "__file__", None)
    if taken is not None and not Path(taken).resolve().is_relative_to(HOST.resolve()):
        raise ImportError(f"'nodes' is already imported from {taken}; call use_host() earlier")
    for folder in (STUBS, HOST):
        while str(folder) in sys.path:
            sys.path.remove(str(folder))
        sys.path.insert(0, str(folder))
    importlib.import_module("comfy.options").enable_args_parsing(False)
    importlib.import_module("comfy.cli_args").args.cpu = not ON_GPU
    importlib.import_module("torch").set_num_threads(1)
