"""Fake of Automatic1111's Lora extension: it merges into the weights and keeps a copy of them."""

import os
from types import SimpleNamespace

import torch
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


def changes_of(network, layer_name):
    """dW of one layer, from a kohya file."""
    values = load_file(network.filename)
    down = values.get(f"{layer_name}.lora_down.weight")
    if down is None:
        return None
    up, alpha = (values[f"{layer_name}.{name}"] for name in ("lora_up.weight", "alpha"))
    return up.float() @ down.float() * (float(alpha) / len(down))


def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    if any(name not in available_network_aliases for name in names):
        list_available_networks()
    loaded_networks.clear()
    for name, multiplier in zip(names, unet_multipliers or [], strict=True):
        entry = available_network_aliases.get(name)
        if entry is not None:
            network = SimpleNamespace(**vars(entry), unet_multiplier=multiplier)
            network.te_multiplier = multiplier
            loaded_networks.append(network)


def network_apply_weights(self):
    """Puts the networks that are loaded into a layer's weight, once."""
    name = getattr(self, "network_layer_name", None)
    if name is None:
        return
    wanted = tuple((one.name, one.unet_multiplier) for one in loaded_networks)
    if getattr(self, "network_current_names", ()) == wanted:
        return
    if getattr(self, "network_weights_backup", None) is None:
        self.network_weights_backup = self.weight.to("cpu", copy=True)
    with torch.no_grad():
        self.weight.copy_(self.network_weights_backup)
        for one in loaded_networks:
            change = changes_of(one, name)
            if change is not None:
                self.weight += one.unet_multiplier * change.to(self.weight.dtype)
    self.network_current_names = wanted
