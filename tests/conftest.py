"""The checkout as the package ``concept_surgery`` and the host's modules, for every test."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `tools`; use_host() puts the host's folder in front of it
from tools.pack import load_pack, use_host  # noqa: E402

use_host()
load_pack()
