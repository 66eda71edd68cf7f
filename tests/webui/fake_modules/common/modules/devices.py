"""Fake of ``modules.devices``: the CPU, in single precision unless a test says otherwise."""

import contextlib

import torch

device = cpu = torch.device("cpu")
dtype = dtype_unet = torch.float32
fp8 = False


def autocast():
    """On the CPU with fp8 weights the host runs in bfloat16, else as it is."""
    if fp8:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=True)
    return contextlib.nullcontext()


def torch_gc():
    pass
