"""Times how the host loads the extension's scripts; run before any script is."""

import functools
import os
import time

from modules import script_loading


def _timed(load_module):
    @functools.wraps(load_module)
    def timed(path):
        began, clock = time.thread_time(), time.perf_counter()
        try:
            return load_module(path)
        finally:
            if os.path.basename(path) == "concept_surgery.py":
                seconds["scripts"] = time.thread_time() - began
                elapsed["scripts"] = time.perf_counter() - clock

    return timed


if not hasattr(script_loading, "concept_surgery_seconds"):
    seconds, elapsed = {}, {}
    script_loading.concept_surgery_seconds = (seconds, elapsed)
    script_loading.load_module = _timed(script_loading.load_module)
