"""Graphs in the host's API format, put together from plain dicts.

Each function returns the nodes of one step, to be joined with ``|``. A node is named by the
caller, and an input is connected by a pair of node name and output number.
"""

from __future__ import annotations

from typing import Any

Graph = dict[str, dict[str, Any]]
Output = tuple[str, int]


def node(name: str, class_type: str, **inputs: Any) -> Graph:
    """One node; tuples among the inputs are connections."""
    plain = {
        key: list(value) if isinstance(value, tuple) else value for key, value in inputs.items()
    }
    return {name: {"class_type": class_type, "inputs": plain}}


def loader(checkpoint: str, name: str = "loader") -> Graph:
    """A checkpoint: MODEL, CLIP and VAE are its outputs 0, 1 and 2."""
    return node(name, "CheckpointLoaderSimple", ckpt_name=checkpoint)


def train(
    name: str = "train",
    *,
    erase: str,
    replace_with: str = "",
    keep: str = "",
    negative_prompts: str = "",
    kind: str = "object",
    preset: str = "balanced",
    training_seed: int = 0,
    model: Output = ("loader", 0),
    clip: Output = ("loader", 1),
    **settings: Any,
) -> Graph:
    """The trainer: ERASURE, LOSS_MAP and the report are its outputs 0, 1 and 2.

    ``settings`` are optional inputs, and expert values, such as ``steps`` or ``resolution``,
    which stand on the node itself in graphs of before there was Erasure Settings.
    """
    return node(
        name,
        "ConceptSurgeryTrain",
        model=model,
        clip=clip,
        erase=erase,
        replace_with=replace_with,
        keep=keep,
        negative_prompts=negative_prompts,
        kind=kind,
        preset=preset,
        training_seed=training_seed,
        **settings,
    )


def erasure_settings(name: str = "settings", **values: Any) -> Graph:
    """Expert values: output 0 goes into the trainer's input ``settings``."""
    return node(name, "ConceptSurgerySettings", **values)


def save(name: str = "save", *, filename: str = "erasure", erasure: Output = ("train", 0)) -> Graph:
    """Save an erasure among the host's LoRAs: output 0 is its path."""
    return node(name, "ConceptSurgerySave", erasure=erasure, filename=filename)


def load(name: str = "load", *, filename: str) -> Graph:
    """Load a saved erasure: ERASURE and the report are its outputs 0 and 1."""
    return node(name, "ConceptSurgeryLoad", filename=filename)


def take_out(name: str = "take", *, concepts: str, erasure: Output = ("train", 0)) -> Graph:
    """Take concepts out of an erasure: ERASURE and its report are its outputs 0 and 1."""
    return node(name, "ConceptSurgeryTakeOut", erasure=erasure, concepts=concepts)


def report(name: str = "report", *, erasure: Output = ("train", 0)) -> Graph:
    """Say what an erasure does: Markdown, JSON and a chart are its outputs 0, 1 and 2."""
    return node(name, "ConceptSurgeryReport", erasure=erasure)


def apply(
    name: str = "apply",
    *,
    strength: float = 1.0,
    mode: str | None = None,
    model: Output = ("loader", 0),
    erasure: Output = ("train", 0),
    clip: Output | None = None,
) -> Graph:
    """Apply an erasure: output 0 is the changed MODEL.

    Without ``mode`` the graph is one of before there was a choice: the erasure is merged.
    """
    given = {"mode": mode, "clip": clip}
    optional = {name: value for name, value in given.items() if value is not None}
    return node(
        name,
        "ConceptSurgeryApply",
        model=model,
        erasure=erasure,
        strength=strength,
        **optional,
    )


def compare(
    name: str = "compare",
    *,
    model: Output = ("loader", 0),
    erasure: Output = ("load", 0),
    clip: Output = ("loader", 1),
    vae: Output = ("loader", 2),
    **drawn: Any,
) -> Graph:
    """Compare without and with an erasure: sheet, before and after are its outputs 0, 1 and 2.

    ``drawn`` are optional inputs, such as ``prompts`` or ``strengths``.
    """
    return node(
        name, "ConceptSurgeryCompare", model=model, erasure=erasure, clip=clip, vae=vae, **drawn
    )


def prompt(name: str, text: str, *, clip: Output = ("loader", 1)) -> Graph:
    """A text as CONDITIONING."""
    return node(name, "CLIPTextEncode", text=text, clip=clip)


def picture(
    name: str,
    text: str,
    *,
    negative: str = "",
    seed: int = 0,
    size: int = 64,
    steps: int = 8,
    cfg: float = 4.0,
    sampler: str = "euler",
    scheduler: str = "normal",
    model: Output = ("loader", 0),
    clip: Output = ("loader", 1),
    vae: Output = ("loader", 2),
) -> Graph:
    """Text to image, from the prompt to the saved file; ``name`` itself is the SaveImage."""
    return (
        prompt(f"{name}-positive", text, clip=clip)
        | prompt(f"{name}-negative", negative, clip=clip)
        | node(f"{name}-latent", "EmptyLatentImage", width=size, height=size, batch_size=1)
        | node(
            f"{name}-sampler",
            "KSampler",
            model=model,
            positive=(f"{name}-positive", 0),
            negative=(f"{name}-negative", 0),
            latent_image=(f"{name}-latent", 0),
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler,
            scheduler=scheduler,
            denoise=1.0,
        )
        | node(f"{name}-decode", "VAEDecode", samples=(f"{name}-sampler", 0), vae=vae)
        | node(name, "SaveImage", images=(f"{name}-decode", 0), filename_prefix=name)
    )


def show(name: str, source: Output) -> Graph:
    """Put a text into the graph's outputs, under ``text``."""
    return node(name, "PreviewAny", source=source)


def prediction(
    name: str,
    *,
    conditioning: Output,
    model: Output = ("loader", 0),
    seed: int = 0,
    progress: float = 0.5,
    size: int = 64,
) -> Graph:
    """A model's noise prediction as numbers (needs the custom node ``tools/probe_pack``)."""
    return node(
        name,
        "ProbePrediction",
        model=model,
        conditioning=conditioning,
        seed=seed,
        progress=progress,
        size=size,
    )
