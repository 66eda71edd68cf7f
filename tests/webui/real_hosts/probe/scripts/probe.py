"""Tells tests what can't be asked of the host over HTTP; never part of what is published."""

import functools
import hashlib
import os
import sys
import time

import torch
from modules import script_callbacks, script_loading, scripts, shared

_EXTENSION = os.path.realpath(
    os.path.join(shared.cmd_opts.data_dir, "extensions", "concept-surgery")
)
# Of a processor, and on the clock; what the scripts took is in them already, see preload.py.
_SECONDS, _ELAPSED = script_loading.concept_surgery_seconds


def _modules():
    """The loaded model's U-Net and text encoder, by name, whatever kind of host this is."""
    model = shared.sd_model
    objects = getattr(model, "forge_objects", None)
    if objects is None:
        return {"unet": model.model.diffusion_model, "text": model.cond_stage_model}
    encoder = getattr(objects.clip, "cond_stage_model", None) or objects.clip.patcher.model
    return {"unet": objects.unet.model.diffusion_model, "text": encoder}


def _digest(module):
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            raw = value.detach().cpu().contiguous().flatten()
            digest.update(raw.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights():
    """SHA-256 of the weights as they are now, patched or not."""
    if "FakeInitialModel" in type(shared.sd_model).__name__:
        return {"unet": "not loaded", "text": "not loaded"}
    return {name: _digest(module) for name, module in _modules().items()}


def state():
    """What an extension may leave behind: hooks, gradients, LoRAs, the job."""
    found = {}
    for name, module in _modules().items():
        parts = list(module.modules())
        found[name] = {
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in parts),
            "instance forwards": sum("forward" in vars(m) for m in parts),
            "gradients": sum(p.requires_grad for p in module.parameters()),
            "held": sum(p.grad is not None for p in module.parameters()),
            "training": sum(m.training for m in parts),
        }
    found["job"] = shared.state.job
    found["checkpoint"] = shared.sd_model.sd_checkpoint_info.name
    found["grad enabled"] = torch.is_grad_enabled()
    return found


def modules():
    """Top-level names of what is imported, to see what an extension brings along."""
    return sorted({name.split(".")[0] for name in sys.modules})


def costs():
    """Seconds that the scripts, the callbacks and the parts of the page of the extension took.

    Those of a processor don't depend on what else the computer does.
    """
    return {"processor": _SECONDS, "clock": _ELAPSED}


def _timed(name, call):
    @functools.wraps(call)
    def timed(*given, **named):
        began, clock = time.thread_time(), time.perf_counter()
        try:
            return call(*given, **named)
        finally:
            _SECONDS[name] = _SECONDS.get(name, 0.0) + time.thread_time() - began
            _ELAPSED[name] = _ELAPSED.get(name, 0.0) + time.perf_counter() - clock

    return timed


def _is_its(path):
    return os.path.realpath(path).startswith(_EXTENSION + os.sep)


def _time_the_extension():
    """Extensions load in the order of their names, so it has loaded before this one."""
    for kind, callbacks in script_callbacks.callback_map.items():
        for number, entry in enumerate(callbacks):
            if not _is_its(entry.script):
                continue
            timed = _timed(kind, entry.callback)
            if hasattr(entry, "_replace"):
                callbacks[number] = entry._replace(callback=timed)
            else:
                entry.callback = timed
    for entry in scripts.scripts_data:
        if _is_its(entry.path):
            entry.script_class.ui = _timed("ui", entry.script_class.ui)


def _add_routes(_page, app):
    for route in (weights, state, modules, costs):
        app.add_api_route(f"/probe/{route.__name__}", route, methods=["GET"])


_time_the_extension()
script_callbacks.on_app_started(_add_routes)
