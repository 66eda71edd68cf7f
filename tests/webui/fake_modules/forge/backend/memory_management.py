"""Fake of ``backend.memory_management``: loading a patcher merges its patches into the weights."""

import sys

import torch

current_loaded_models = []


class LoadedModel:
    def __init__(self, model):
        self.model = model


def load_models_gpu(models, memory_required=0, hard_memory_preservation=0):
    if not torch.is_inference_mode_enabled():
        raise RuntimeError("weights were moved outside of inference mode")
    for patcher in models:
        if all(one.model is not patcher for one in current_loaded_models):
            alike = [one for one in current_loaded_models if one.model.model is patcher.model]
            for one in alike:  # clones share one module
                current_loaded_models.remove(one)
            current_loaded_models.insert(0, LoadedModel(patcher))
        patcher.refresh_loras()


def load_model_gpu(model):
    load_models_gpu([model])


def free_memory(memory_required, device, keep_loaded=()):
    if not torch.is_inference_mode_enabled():
        raise RuntimeError("weights were moved outside of inference mode")
    for one in list(current_loaded_models):
        if one not in keep_loaded:
            current_loaded_models.remove(one)


def get_free_memory(device=None):
    return sys.maxsize
