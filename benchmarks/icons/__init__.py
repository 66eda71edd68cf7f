"""A second small model that really draws, other in kind than the first: see ``README.md``.

``python -m benchmarks.icons.train`` makes it from nothing. Nothing of the engine is tuned on it.
"""

from tools.pack import load_pack

load_pack()
