"""Pipelines from folders and single files, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import SafetensorError, safe_open

from .networks import PipelineError
from .refusals import refuse_another_kind

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A key that only this kind of checkpoint has, however it begins. The first that is there decides.
_TELLING = (
    ("double_blocks.0.img_attn.qkv.weight", FluxPipeline),
    ("joint_blocks.0.context_block.attn.qkv.weight", StableDiffusion3Pipeline),
    ("label_emb.0.0.weight", StableDiffusionXLPipeline),
    ("input_blocks.0.0.weight", StableDiffusionPipeline),
)
_WORDS = 300  # letters of what another package says


def load_pipeline(
    model: str, config: str | None = None, device: str | None = None, dtype: str | None = None
) -> Any:
    """A pipeline from what lies on this machine.

    Args:
        model: a folder of diffusers, a single .safetensors file, or the name of a model that the
            Hugging Face cache has.
        config: for a single file, a folder of diffusers of the same kind of model; its tokenizers
            and configurations are read. Without one, diffusers looks into its cache.
        device: where to; by default a GPU if there is one.
        dtype: a key of :data:`DTYPES`; by default float32 on the CPU and bfloat16 elsewhere.

    Raises:
        PipelineError: there is nothing, it can't be read, or it is no text-to-image model.
    """
    device = device or _best_device()
    kept = DTYPES[dtype or ("float32" if device == "cpu" else "bfloat16")]
    path = Path(model).expanduser()
    options: dict[str, Any] = {"local_files_only": True, "torch_dtype": kept}
    try:
        if path.is_file():
            kind, source = _kind_of(path), str(path)
            options |= {"config": config} if config else {}
            pipe = kind.from_single_file(source, **options)
        elif path.is_dir():
            _refuse_other_folder(path)
            pipe = DiffusionPipeline.from_pretrained(str(path), **options)
        elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
            raise PipelineError(f"There is no folder and no file {model!r}. Check the path.")
        else:
            pipe = DiffusionPipeline.from_pretrained(model, **options)
        pipe = pipe.to(device)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, PipelineError):
            raise
        raise PipelineError(_cannot_load(model, path.is_file(), error)) from error
    if not isinstance(pipe, DiffusionPipeline):
        raise PipelineError(f"{model!r} holds a {type(pipe).__name__}, which is no pipeline.")
    refuse_another_kind(pipe)
    return pipe


def _cannot_load(model: str, single: bool, error: Exception) -> str:
    """Why a model can't be loaded, with what to do; what diffusers says is cut to a sentence."""
    said = " ".join(str(error).split())[:_WORDS] or type(error).__name__
    if single:
        advice = (
            "A single file holds no tokenizer: name a diffusers folder of the same kind of model "
            "with --config (its weights aren't needed)."
        )
    else:
        advice = (
            "Nothing is downloaded here: a model of the Hub must be in the cache already, for "
            "example by 'hf download'; a folder must be one that diffusers saved."
        )
    return f"{model!r} can't be loaded. {advice} (diffusers: {said})"


def _refuse_other_folder(path: Path) -> None:
    if not (path / "model_index.json").is_file():
        raise PipelineError(
            f"{str(path)!r} is no model of diffusers: it has no model_index.json. Name the folder "
            "that the pipeline was saved in, or a single .safetensors file."
        )


def _kind_of(path: Path) -> Any:
    """The class of the pipeline that a single file is for."""
    if path.suffix != ".safetensors":
        raise PipelineError(
            f"{path.name!r} is no .safetensors file, and other kinds of checkpoints may run "
            "programs when they are read. Convert it first."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise PipelineError(f"{path.name!r} is damaged or no checkpoint: {error}.") from error
    for telling, kind in _TELLING:
        if any(name.endswith(telling) for name in names):
            return kind
    some = names[0] if names else "nothing"
    raise PipelineError(
        f"{path.name!r} is no checkpoint of SD1, SD2, SDXL, SD3 or Flux; it holds {some}, for "
        "example. Name a checkpoint, or a folder of diffusers."
    )


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
