"""Tensors of a model: their whole shapes, their names, whether they are finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor, also where ZeRO-3 left an empty placeholder."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under their state_dict names, as references.

    Unlike `state_dict()` it runs no hooks: bitsandbytes packs the state of every quantized layer in one.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = tensor
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; true of integers.

    NaN and infinity survive a sum, so one reduction without temporaries clears nearly every tensor; only a sum that
    overflowed is looked at value by value.
    """
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() > 1 and bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return True
    return bool(torch.isfinite(tensor.float()).all())
