"""Fake of ``modules.extra_networks``: tags in prompts, and what they switch on."""

import re
from collections import defaultdict

_TAG = re.compile(r"<(\w+):([^>]+)>")
extra_network_registry = {}


class ExtraNetworkParams:
    def __init__(self, items=None):
        self.items = items or []
        self.positional, self.named = [], {}
        for item in self.items:
            name, is_named, value = str(item).partition("=")
            if is_named:
                self.named[name] = value
            else:
                self.positional.append(item)


def parse_prompt(prompt):
    found = defaultdict(list)

    def take(match):
        found[match[1]].append(ExtraNetworkParams(items=match[2].split(":")))
        return ""

    return _TAG.sub(take, prompt), found


def activate(p, extra_network_data):
    """As the hosts' Lora extension: what a prompt doesn't name is taken out."""
    import networks

    found = extra_network_data.get("lora", [])
    names = [params.positional[0] for params in found]
    strengths = [
        float(params.positional[1]) if len(params.positional) > 1 else 1.0 for params in found
    ]
    networks.load_networks(names, strengths, strengths, [None] * len(names))
    objects = getattr(p.sd_model, "forge_objects_after_applying_lora", None)
    if objects is not None:
        p.sd_model.forge_objects = objects.shallow_copy()
