"""Run by ComfyUI-Manager after installing, and by Automatic1111 and Forge before each start.

It checks what the pack needs and explains. It installs nothing.
"""

from importlib.util import find_spec

NEEDED = ("torch", "safetensors", "numpy")

missing = [name for name in NEEDED if find_spec(name) is None]
if missing:
    print(
        f"Concept Surgery needs {', '.join(missing)}, which ComfyUI, Automatic1111 and Forge bring "
        "themselves. Install the host's own requirements into the Python that runs it, then start "
        "it again."
    )
