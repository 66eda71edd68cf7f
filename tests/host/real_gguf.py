"""The real ComfyUI-GGUF, where ``COMFYUI_GGUF_FOLDER`` names a checkout of it.

It needs ``gguf`` from PyPI. Without either this module can't be imported, and its tests are
skipped; ``fake_gguf`` stands in.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import folder_paths
import numpy as np
import torch

if "COMFYUI_GGUF_FOLDER" not in os.environ:
    raise ImportError("COMFYUI_GGUF_FOLDER is not set")

import gguf

FOLDER = Path(os.environ["COMFYUI_GGUF_FOLDER"])
BLOCK = 32  # numbers that share a scale


def load(tensors: dict[str, torch.Tensor], kind: str, folder: Path):
    """A MODEL from a GGUF file whose matrices are packed in that way, by the pack's own loader."""
    _write(tensors, getattr(gguf.GGMLQuantizationType, kind), folder / f"{kind}.gguf")
    for name in ("unet", "diffusion_models"):
        folder_paths.add_model_folder_path(name, str(folder))
    (model,) = _nodes().UnetLoaderGGUF().load_unet(f"{kind}.gguf")
    return model


def _write(tensors: dict[str, torch.Tensor], kind, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "sd1")
    for name, tensor in tensors.items():
        numbers = tensor.float().numpy()
        if numbers.ndim == 2 and numbers.shape[1] % BLOCK == 0:
            writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, numbers.astype(np.float16) if numbers.ndim > 1 else numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _nodes():
    """The pack's nodes, imported as the host imports a custom node."""
    if "real_gguf_pack" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "real_gguf_pack", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["real_gguf_pack"] = module
        spec.loader.exec_module(module)
    return importlib.import_module("real_gguf_pack.nodes")
