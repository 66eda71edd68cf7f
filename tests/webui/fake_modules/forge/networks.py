"""Fake of Forge's Lora extension: a clone of the patcher has the patches, by file and strength."""

import os
from types import SimpleNamespace

from safetensors import safe_open
from safetensors.torch import load_file

loaded_networks, available_networks, available_network_aliases = [], {}, {}
forbidden_network_aliases = {}
listed = 0


def list_available_networks():
    from modules import shared

    global listed
    listed += 1
    available_networks.clear()
    available_network_aliases.clear()
    for folder, _, names in os.walk(shared.cmd_opts.lora_dir):
        for file in names:
            name, ending = os.path.splitext(file)
            if ending == ".safetensors":
                path = os.path.join(folder, file)
                with safe_open(path, framework="pt") as opened:
                    alias = (opened.metadata() or {}).get("ss_output_name", name)
                entry = SimpleNamespace(name=name, alias=alias, filename=path)
                available_networks[name] = entry
                available_network_aliases[name] = available_network_aliases[alias] = entry


def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    from modules import sd_models

    sd_model = sd_models.model_data.get_sd_model()
    if any(name not in available_network_aliases for name in names):
        list_available_networks()
    entries = [available_network_aliases.get(name) for name in names]
    targets = [
        (entry.filename, strength)
        for entry, strength in zip(entries, unet_multipliers or [], strict=True)
        if entry is not None
    ]
    loaded_networks[:] = [entry for entry in entries if entry is not None]
    if sd_model.current_lora_hash == str(targets):
        return
    sd_model.current_lora_hash = str(targets)
    patcher = sd_model.forge_objects_original.unet
    for filename, strength in targets:
        patcher = patcher.clone()
        patcher.lora_patches[(filename, strength)] = load_file(filename)
    sd_model.forge_objects.unet = patcher
    sd_model.forge_objects_after_applying_lora = sd_model.forge_objects.shallow_copy()
