"""A model, and the process around it, handed back as they were found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from plasticity_peft.components.offloading import execution_device
from plasticity_peft.images.seeding import seed_cpu


@contextmanager
def left_as_found(model: nn.Module, seed: int, dtype: str | None = None) -> Iterator[None]:
    """Inside: evaluation mode, no gradients, random numbers from `seed`, autocast to `dtype` or to nothing.

    Afterwards all is as before. What torch.compile made of the model, or of its blocks, is passed over: compiled code
    does not look for the hooks that are set here.

    What is restored, on success and on failure: the mode of every module, and the random state of torch (CPU and the
    model's devices), numpy and python. Nothing else of the model may be changed inside; hooks remove themselves. The
    generators of other devices are not touched.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters()} | {execution_device(model)}
    accelerators = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=accelerators),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            seed_cpu(seed)
            for index in accelerators:
                torch.cuda.default_generators[index].manual_seed(seed)
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
