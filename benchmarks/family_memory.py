"""What a step keeps in memory at a family's own size: ``python -m benchmarks.family_memory``

The architectures of ``benchmarks.families`` on the meta device in half precision, one picture at
the resolution that the family trains at. Counted as the node counts it before a run, with attention
that keeps its inputs, its result and one number a row, as the fused kernels of GPUs do. Nothing is
computed: this is the estimate at real size, not a measurement. Writes
``benchmarks/results/family_memory.json``.
"""

from __future__ import annotations

import json

from benchmarks.families import ARCHITECTURES, META, on_meta  # first: it loads the host

import torch  # isort: skip
from concept_surgery.erase_core.model.activations import SavedBytes
from concept_surgery.erase_core.model.blocks import blocks_run_by
from concept_surgery.erase_core.model.out_of_place import OutOfPlace
from concept_surgery.erase_core.settings.settings import EraseSettings, preset_settings
from concept_surgery.nodes.families import model_family
from concept_surgery.nodes.matrices import trained_keys
from torch import Tensor, nn

from tools.environment import ROOT

RESULT = ROOT / "benchmarks" / "results" / "family_memory.json"
HALF, TWO_BYTES = torch.float16, 2
# Tokens of a prompt, their width, the width of the pooled vector.
PROMPTS = {
    "SD1.5": (77, 768, 0),
    "SD2.1": (77, 1024, 0),
    "SDXL": (77, 2048, 2816),
    "SD3 medium": (154, 4096, 2048),
    "Flux dev": (256, 4096, 768),
}


class FusedAttention(torch.autograd.Function):
    """Shapes of attention (B, heads, n, d) that doesn't keep its n x n weights."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = q.new_empty((*q.shape[:3], v.shape[-1]))
        ctx.save_for_backward(q, k, v, result, q.new_empty(q.shape[:3], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx, *_grads):
        raise NotImplementedError("Only counted, never run backwards.")


def attention(_chosen, q, k, v, heads, *_more, skip_reshape=False, skip_output_reshape=False, **_):
    """In the place of the host's, with its arguments."""
    if not skip_reshape:
        rows = (t.flatten(2) if t.dim() == 4 else t for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in rows)
    result = FusedAttention.apply(q, k, v)
    return result if skip_output_reshape else result.transpose(1, 2).flatten(2)


def counted(name: str, model, layers: str, resolution: int) -> SavedBytes:
    """What one picture's forward keeps when the matrices of a rule are trained."""
    network, (tokens, width, pooled) = model.model.diffusion_model, PROMPTS[name]
    channels = model.model.latent_format.latent_channels
    for key in trained_keys(model, layers).values():
        network.get_parameter(key.removeprefix("diffusion_model.")).requires_grad_()
    side = resolution // 8
    given = {"context": _half(1, tokens, width)}
    given["transformer_options"] = {"optimized_attention_override": attention}
    if pooled:
        given["y"] = _half(1, pooled)
    if name.startswith("Flux"):
        given["guidance"] = torch.empty(1, device=META)
    saved = SavedBytes([*network.parameters(), *network.buffers()])
    in_place = OutOfPlace(True)
    with in_place, blocks_run_by(network, saved, lambda: OutOfPlace), saved.counting():
        network(_half(1, channels, side, side), torch.empty(1, device=META), **given)
    return saved


def _half(*shape: int) -> Tensor:
    return torch.empty(shape, device=META, dtype=HALF)


def weight_bytes(network: nn.Module) -> int:
    """Of the network in half precision."""
    return TWO_BYTES * sum(parameter.numel() for parameter in network.parameters())


def main() -> None:
    """Count, print and write."""
    rows = []
    for name, (config, unet) in ARCHITECTURES.items():
        model = on_meta(config, unet)
        family = model_family(model)
        layers = family.defaults.get("layers", EraseSettings.layers)
        settings = preset_settings("balanced", family=family.defaults, concepts="cat => dog")
        saved = counted(name, model, layers, settings.resolution)
        sizes = {
            "weights": weight_bytes(model.model.diffusion_model),
            "step": saved.needed,
            "step_checkpointed": saved.needed_checkpointed,
        }
        gigabytes = {name: round(size / 2**30, 2) for name, size in sizes.items()}
        rows.append(
            {"model": name, "layers": layers, "resolution": settings.resolution} | gigabytes
        )
        print(rows[-1], flush=True)
    RESULT.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
