"""A second device on a machine that has only CPUs, and what is on it."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable

import torch
from torch import nn


@functools.cache
def second_device() -> torch.device:
    """Returns torch's lazy device. It computes with tensors of its own, which do not mix with those of the CPU.

    Its tensors have no storage, so they cannot be saved: `on_cpu` returns what can.
    """
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()
    return torch.device("lazy")


def on_cpu(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the state dict of a model with all tensors on the CPU."""
    return {name: value.cpu() for name, value in model.state_dict().items()}


def bytes_held(device: torch.device, make: Callable[[], object]) -> int:
    """Returns the size of all tensors on a device, and their gradients, that are held because of what `make` returns.

    Whatever holds them counts, also a reference that was forgotten.
    """
    gc.collect()
    gc.freeze()  # what there is already is not looked at
    try:
        made = make()
        gc.collect()
        found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
        found += [each.grad for each in found if each.is_leaf and each.grad is not None]
        held = {id(each): each for each in found if each.device.type == device.type}
        del made
        return sum(each.numel() * each.element_size() for each in held.values())
    finally:
        gc.unfreeze()
