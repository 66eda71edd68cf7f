"""A stand-in for ComfyUI-GGUF, which isn't on PyPI: what this pack relies on of it, and no more.

A layer's matrix is bytes in a tensor class of its own, whose ``shape`` is that of the numbers and
which carries the patches; the layer unpacks it with ``get_weight``, its state dict holds
placeholders without content, and the patcher hands patches to the tensor instead of computing a new
weight. The packing here is the simplest there is: a byte a number and a scale for each row.
"""

from __future__ import annotations

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import nn


class FakePackedTensor(torch.Tensor):
    """Bytes (rows, columns + 1); the last column only makes the packed shape another."""

    @classmethod
    def of(cls, matrix: torch.Tensor) -> FakePackedTensor:
        """Pack a matrix."""
        scale = matrix.abs().amax(1, keepdim=True) / 127
        numbers = (matrix / scale).round() + 127
        padded = nn.functional.pad(numbers, (0, 1)).to(torch.uint8)
        packed = padded.as_subclass(cls)
        packed.row_scale, packed.of_shape, packed.patches = scale, matrix.shape, []
        return packed

    @property
    def shape(self) -> torch.Size:
        """Of the numbers."""
        return getattr(self, "of_shape", None) or self.size()

    def detach(self) -> FakePackedTensor:
        """Itself: the bytes never have a gradient."""
        return self

    def to(self, *args, **keywords) -> FakePackedTensor:
        """Moved, with everything it knows."""
        moved = torch.Tensor.to(self, *args, **keywords)
        vars(moved).update(vars(self), patches=list(self.patches))
        return moved


class FakePackedOps(comfy.ops.manual_cast):
    """The host's layers, with linear ones that unpack while they run."""

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, state, prefix, *more):
            weight = state.get(f"{prefix}weight")
            if not isinstance(weight, FakePackedTensor):
                return super()._load_from_state_dict(state, prefix, *more)
            self.weight = nn.Parameter(weight, requires_grad=False)

        def _save_to_state_dict(self, state, prefix, keep_vars):
            super()._save_to_state_dict(state, prefix, keep_vars)
            if isinstance(self.weight, FakePackedTensor):
                size = torch.Tensor.size(self.weight)
                state[f"{prefix}weight"] = torch.empty(size, dtype=torch.uint8, device="meta")

        def get_weight(self, weight, dtype):
            numbers = weight.as_subclass(torch.Tensor)[:, :-1].to(dtype) - 127
            numbers = numbers * weight.row_scale.to(dtype)
            for patches, key in weight.patches:
                numbers = comfy.lora.calculate_weight(patches, numbers, key)
            return numbers

        def forward_comfy_cast_weights(self, x):
            if not isinstance(self.weight, FakePackedTensor):
                return super().forward_comfy_cast_weights(x)
            return nn.functional.linear(x, self.get_weight(self.weight, x.dtype), self.bias)


class FakePackedPatcher(comfy.model_patcher.ModelPatcher):
    """Hands patches to packed tensors."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, **more):
        weight = comfy.utils.get_attr(self.model, key)
        if not isinstance(weight, FakePackedTensor):
            return super().patch_weight_to_device(key, device_to, inplace_update, **more)
        weight.patches = [(self.patches[key], key)] if key in self.patches else []

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        for weight in self.model.parameters() if unpatch_weights else ():
            if isinstance(weight, FakePackedTensor):
                weight.patches = []
        return super().unpatch_model(device_to, unpatch_weights)


def load(tensors: dict[str, torch.Tensor], packed: tuple[str, ...]):
    """A MODEL from the tensors of a U-Net, those whose name ends with one of ``packed`` packed."""
    mixed = {
        key: FakePackedTensor.of(value.float()) if key.endswith(packed) else value
        for key, value in tensors.items()
    }
    options = {"custom_operations": FakePackedOps}
    model = comfy.sd.load_diffusion_model_state_dict(mixed, model_options=options)
    model.__class__ = FakePackedPatcher
    return model
