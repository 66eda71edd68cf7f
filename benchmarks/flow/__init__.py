"""A small transformer that really draws: Z-Image's kind, see ``README.md``.

``python -m benchmarks.flow.train`` makes it from nothing, on the second model's pictures
(``benchmarks.icons``), whose judge judges it.
"""

from tools.pack import load_pack

load_pack()
