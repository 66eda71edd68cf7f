"""What an erasure is on each family at its real size: matrices, values trained, file, cost.

Run as ``python -m benchmarks.families``. The architectures are built by the host's own classes on
the meta device, so that only shapes exist; nothing is downloaded and nothing is run. Writes
``benchmarks/results/families.json`` and prints the table of the README.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tools.environment import ROOT
from tools.pack import load_pack, use_host

use_host()
load_pack()

import comfy.model_patcher  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from concept_surgery.erase_core.artefact.formats import kohya_tensors  # noqa: E402
from concept_surgery.erase_core.run.erase import PLAIN_CAPTIONS  # noqa: E402
from concept_surgery.erase_core.run.plan import planned_cost  # noqa: E402
from concept_surgery.erase_core.settings.layers import reads_prompt  # noqa: E402
from concept_surgery.erase_core.settings.settings import EraseSettings, preset_settings  # noqa: E402
from concept_surgery.nodes.families import model_family  # noqa: E402
from concept_surgery.nodes.matrices import trained_keys  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "families.json"
META = torch.device("meta")
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_checkpoint": False,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "adm_in_channels": None,
}
FOUR_LEVELS = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
SDXL = {
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_heads": -1,
    "num_head_channels": 64,
}
ARCHITECTURES = {
    "SD1.5": (
        comfy.supported_models.SD15,
        FOUR_LEVELS
        | {"context_dim": 768, "use_linear_in_transformer": False}
        | {"num_heads": 8, "num_head_channels": -1},
    ),
    "SD2.1": (
        comfy.supported_models.SD20,
        FOUR_LEVELS
        | {"context_dim": 1024, "use_linear_in_transformer": True}
        | {"num_heads": -1, "num_head_channels": 64},
    ),
    "SDXL": (comfy.supported_models.SDXL, SDXL),
    "SD3 medium": (
        comfy.supported_models.SD3,
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 24,
            "input_size": None,
            "adm_in_channels": 2048,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 1536},
            },
            "num_patches": 192 * 192,
            "pos_embed_max_size": 192,
            "pos_embed_scaling_factor": None,
            "x_block_self_attn_layers": [],
        },
    ),
    "Flux dev": (
        comfy.supported_models.Flux,
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "mlp_ratio": 4.0,
            "num_heads": 24,
            "depth": 19,
            "depth_single_blocks": 38,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
        },
    ),
}


def in_half_precision(config_class, unet: dict):
    """The host's configuration of an architecture."""
    config = config_class({**UNET, **unet} if "num_res_blocks" in unet else unet)
    config.set_inference_dtype(torch.float16, None)
    return config


def on_meta(config_class, unet: dict):
    """The host's MODEL of an architecture, shapes only."""
    config = in_half_precision(config_class, unet)
    return comfy.model_patcher.ModelPatcher(config.get_model({}, "", device=META), META, META)


def row(name: str, model, form: str, layers: str) -> dict:
    """One line of the table: the balanced preset for one concept and four prompts to keep."""
    family = model_family(model)
    settings = preset_settings(
        "balanced",
        family=family.defaults,
        concepts="cat => dog",
        keep=("a", "b", "c", "d"),
        form=form,
        layers=layers,
    )
    weights = model.model.state_dict()
    shapes = {n: tuple(weights[key].shape) for n, key in trained_keys(model, layers).items()}
    plain = 0 if any(map(reads_prompt, shapes)) else PLAIN_CAPTIONS
    return {
        "model": name,
        "family": family.name,
        "form": form,
        "layers": layers,
        "matrices": len(shapes),
        "rank": settings.rank,
        "values_trained": values_trained(shapes, settings),
        "file_mb": round(file_bytes(shapes, settings.rank) / 1e6, 1),
        "resolution": settings.resolution,
        "forward_equivalents": sum(planned_cost(settings, family.pooled, plain).values()),
    }


def values_trained(shapes: dict[str, tuple[int, int]], settings: EraseSettings) -> int:
    """B alone in the hard form, B and R in the soft one."""
    rank = settings.rank
    widths = 0 if settings.form == "hard" else sum(width for _, width in shapes.values())
    return rank * (sum(out for out, _ in shapes.values()) + widths)


def file_bytes(shapes: dict[str, tuple[int, int]], rank: int) -> int:
    """Bytes of the tensors that are saved."""
    bases = {name: torch.empty(width, rank, device=META) for name, (_, width) in shapes.items()}
    factors = {name: torch.empty(out, rank, device=META) for name, (out, _) in shapes.items()}
    return sum(tensor.nbytes for tensor in kohya_tensors(bases, factors).values())


def main() -> None:
    """Compute, print and write the table."""
    rows = []
    for name, (config, unet) in ARCHITECTURES.items():
        model = on_meta(config, unet)
        family = model_family(model)
        own = family.defaults.get("layers", EraseSettings.layers)
        assert {n for n in trained_keys(model) if not reads_prompt(n)} <= {family.pooled_matrix}
        wider = "text-stream" if own == "text-input" else "cross-attention"
        rows += [row(name, model, *what) for what in (("hard", own), ("soft", own))]
        rows.append(row(name, model, "soft", wider))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=2) + "\n")
    print("| model | form | layers | matrices | values trained | file | forward-equivalents |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['model']} | {r['form']} | {r['layers']} | {r['matrices']} | "
            f"{r['values_trained']:,} | {r['file_mb']:.1f} MB | {r['forward_equivalents']:,} |"
        )


if __name__ == "__main__":
    main()
