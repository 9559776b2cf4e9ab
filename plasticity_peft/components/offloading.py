"""Models whose weights are not on one device: spread by a `device_map`, or kept in CPU memory or on disk.

Accelerate's hooks bring weights and inputs to the device that computes a module. Code that reads weights itself, or
ends a forward pass early, has to respect these hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


def execution_device(model: nn.Module) -> torch.device:
    """Returns the device on which the model takes its inputs."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if isinstance(device, (int, str, torch.device)):
            return torch.device(device)
    return next(parameter.device for parameter in model.parameters())


def offloaded(model: nn.Module) -> bool:
    """Returns whether weights of the model are on their device only while they are needed."""
    return any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Inside, the modules' own weights can be read."""
    from accelerate.utils import align_module_device

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(align_module_device(module))
        yield
