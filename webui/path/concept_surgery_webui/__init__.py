"""The checkout as a package, under a name that nothing else has.

These hosts run ``scripts/*.py`` as bare files and replace ``sys.path`` around each. The checkout's
folder is never on it, because half of its names are theirs, too. So this package lies in a folder
of its own, and what is in it is the checkout: ``concept_surgery_webui.webui``.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[3])]
