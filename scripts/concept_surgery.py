"""Where Automatic1111, Forge and their kin find the extension; all of it is in ``webui/``."""

import sys
from pathlib import Path

# The hosts put sys.path back after each script, so the package is made and imported here.
_FOLDER = str(Path(__file__).resolve().parents[1] / "webui" / "path")
sys.path.insert(0, _FOLDER)
try:
    from concept_surgery_webui.webui import extension
finally:
    sys.path.remove(_FOLDER)

ConceptSurgeryScript = extension.ConceptSurgeryScript  # found by being a name of this module
extension.register()
