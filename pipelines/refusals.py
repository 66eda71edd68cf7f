"""Pipelines that can't be worked on as they are, in words."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .networks import PipelineError, network_of, slot_of

_OTHER_INPUTS = ("image", "control_image", "video", "num_frames", "controlnet_conditioning_scale")


def refuse_unfit(pipe: Any) -> None:
    """Whether a pipeline can be trained on.

    Raises:
        PipelineError: it can't; the message says why and what to do.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise PipelineError(
            f"This is {type(pipe).__name__!r}, not a pipeline of diffusers. Load one, for example "
            "with StableDiffusionPipeline.from_pretrained(...)."
        )
    refuse_another_kind(pipe)
    network = network_of(pipe)
    found = (_scheduled(pipe), _placed(pipe, network), _packed(network), _changed(network))
    for reason in found:
        if reason:
            raise PipelineError(f"{type(pipe).__name__} can't be worked on as it is: {reason}")


def refuse_another_kind(pipe: Any) -> None:
    """Raises :class:`PipelineError` for a pipeline that doesn't draw a picture from a text."""
    asked = inspect.signature(pipe.__call__).parameters
    network = network_of(pipe)
    needed = [getattr(pipe, name, None) for name in ("tokenizer", "text_encoder", "scheduler")]
    fits = isinstance(network, nn.Module) and None not in needed
    if not fits or "prompt" not in asked or any(name in asked for name in _OTHER_INPUTS):
        raise PipelineError(
            f"{type(pipe).__name__} doesn't draw pictures from a text alone, or lacks its "
            "text encoder. Load the pipeline of this model that does, whole, such as StableDiffusionPipeline, StableDiffusionXLPipeline, "
            "StableDiffusion3Pipeline or FluxPipeline."
        )
    given, said = network.config.get("in_channels"), network.config.get("out_channels")
    if slot_of(pipe) == "unet" and given != said:
        raise PipelineError(
            f"The U-Net of this {type(pipe).__name__} reads {given} channels and draws {said}: it "
            "is made for inpainting or for another picture beside the prompt. Load the model that "
            "it was made from."
        )


def flows(scheduler: Any) -> bool:
    """Whether a scheduler is for networks that predict a flow's velocity."""
    said = scheduler.config.get("prediction_type") == "flow_prediction"
    return said or type(scheduler).__name__.startswith("FlowMatch")


def _scheduled(pipe: Any) -> str:
    """What is amiss with the scheduler."""
    scheduler = pipe.scheduler
    predicted = scheduler.config.get("prediction_type", "epsilon")
    known = hasattr(scheduler, "alphas_cumprod") and predicted in ("epsilon", "v_prediction")
    if known or flows(scheduler):
        return ""
    return (
        f"what its network predicts isn't known by its scheduler, {type(scheduler).__name__} with "
        f"{predicted!r}. Give it an EulerDiscreteScheduler, or FlowMatchEulerDiscreteScheduler "
        "for a flow model."
    )


def _placed(pipe: Any, network: nn.Module) -> str:
    """What is amiss with where the weights lie."""
    tensors = [*network.parameters(), *network.buffers()]
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    hooked = [m for part in parts for m in part.modules() if hasattr(m, "_hf_hook")]
    moved = any(_moves(getattr(m, "_diffusers_hook", None)) for m in network.modules())
    if hooked or moved or getattr(pipe, "hf_device_map", None):
        return (
            "its parts are offloaded, so they aren't where they are needed. Load the pipeline "
            "again without enable_model_cpu_offload(), enable_sequential_cpu_offload() or group "
            "offloading and without device_map, and move it with pipe.to(...); on the CPU it fits "
            "wherever there is memory for the model."
        )
    if any(tensor.is_meta for part in parts for tensor in part.parameters()):
        return "its weights are on the device 'meta', so there are none. Load the pipeline again."
    if len({tensor.device for tensor in tensors}) > 1:
        return "its network lies on several devices. Move it to one with pipe.to(...)."
    return ""


def _moves(registry: Any) -> bool:
    """Whether a registry of diffusers' hooks has some that move or cast weights."""
    return any("cast" in name or "offload" in name for name in getattr(registry, "hooks", {}))


def _packed(network: nn.Module) -> str:
    """What is amiss with how the weights are kept."""
    kinds = {type(p) for p in network.parameters()} - {nn.Parameter}
    odd = {kind.__name__ for kind in kinds}
    for tensor in network.parameters():
        data = tensor.data
        plain = type(data) is Tensor and data.is_floating_point() and data.element_size() > 1
        odd |= set() if plain else {f"{type(data).__name__} of {data.dtype}"}
    quantised = getattr(network, "hf_quantizer", None) is not None
    if not (odd or quantised):
        return ""
    return (
        f"its network is quantised ({', '.join(sorted(odd)) or 'by a quantizer'}), and what is "
        "learned on rounded weights fits those alone. Load the pipeline without "
        "quantization_config or layerwise casting, in bf16, fp16 or fp32. The file that is saved "
        "then also works on the quantised pipeline."
    )


def _changed(network: Any) -> str:
    """What is amiss with what was put into the network."""
    from .applied import applied_to

    loras = sorted(getattr(network, "peft_config", None) or {})
    if loras:
        names = ", ".join(repr(name) for name in loras)
        return (
            f"LoRAs are loaded into it ({names}). To train on the model with them, call "
            "pipe.fuse_lora() and then pipe.unload_lora_weights(); to train without them, call "
            "pipe.unfuse_lora() where they are fused, and pipe.unload_lora_weights()."
        )
    applied = ", ".join(repr(one.concept) for one in applied_to(network))
    if applied:
        return (
            f"the erasure of {applied} is applied to it. Erase on the pipeline as it was, and "
            "apply both; call remove() of what applied() gave."
        )
    if any(getattr(module, "fused_projections", False) for module in network.modules()):
        return "its projections are fused. Call pipe.unfuse_qkv_projections() first."
    if getattr(network, "encoder_hid_proj", None) is not None:
        return "an IP adapter is loaded into it. Call pipe.unload_ip_adapter() first."
    return ""
