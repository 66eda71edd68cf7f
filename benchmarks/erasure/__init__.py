"""Does it erase, and what else goes with it? Ours and the peers on the small emoji model."""

from tools.pack import load_pack, use_host

use_host()
load_pack()
