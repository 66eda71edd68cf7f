"""The host's modules, for what draws with them; methods do without."""

from tools.pack import use_host

use_host()
