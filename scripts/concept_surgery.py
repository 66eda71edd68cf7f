"""Where Automatic1111, Forge and their kin find the extension; all of it is in ``webui/``."""

import sys
from pathlib import Path

_FOLDER = str(Path(__file__).resolve().parents[1] / "webui" / "path")
sys.path.insert(0, _FOLDER)
try:
    from concept_surgery_webui.webui import training  # noqa: F401
finally:
    sys.path.remove(_FOLDER)
