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
