"""Run by ComfyUI-Manager after installing: checks what the pack needs and explains, no more."""

from importlib.util import find_spec

NEEDED = ("torch", "safetensors", "numpy")

missing = [name for name in NEEDED if find_spec(name) is None]
if missing:
    print(
        f"Concept Surgery needs {', '.join(missing)}, which ComfyUI normally brings. Install "
        "ComfyUI's own requirements.txt into the Python that runs it, then start it again."
    )
