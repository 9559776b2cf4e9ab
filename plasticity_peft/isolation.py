"""A model, and the process around it, handed back as they were found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def left_as_found(model: nn.Module, seed: int, dtype: str | None = None) -> Iterator[None]:
    """Inside: evaluation mode, no gradients, random numbers from `seed`, autocast to `dtype` or to nothing.

    Afterwards all is as before.

    What is restored, on success and on failure: the mode of every module, and the random state of torch (CPU and the
    model's devices), numpy and python. Nothing else of the model may be changed inside; hooks remove themselves.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters()}
    accelerators = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=accelerators), torch.no_grad():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            model.eval()
            with _autocast({"cpu", *(device.type for device in devices if device.type != "meta")}, dtype):
                yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, training in modes.items():
            module.training = training


@contextmanager
def _autocast(device_types: set[str], dtype: str | None) -> Iterator[None]:
    if not device_types:
        yield
        return
    lower = None if dtype is None else getattr(torch, dtype)
    with torch.autocast(device_types.pop(), dtype=lower, enabled=lower is not None), _autocast(device_types, dtype):
        yield
