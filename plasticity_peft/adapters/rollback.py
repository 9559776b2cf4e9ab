"""Restores the modules of a model if an injection fails."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Inside, an exception restores the modules of `model`.

    Children, parameters, hooks, modes, `requires_grad`, classes and all other attributes are restored, and so are the
    random states. The values of parameters are not.
    """
    restore_random_state = _random_state(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = []
    for module in model.modules():
        held = [value for value in vars(module).values() if type(value) in (dict, OrderedDict, list, set)]
        before.append((module, type(module), vars(module).copy(), [(value, value.copy()) for value in held]))

    def restore() -> None:
        for module, kind, old, containers in before:
            for container, content in containers:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
            vars(module).clear()
            vars(module).update(old)
            module.__class__ = kind
        for parameter, required in flags:
            parameter.requires_grad_(required)
        restore_random_state()

    try:
        yield
    except BaseException:
        try:
            restore()
        except BaseException:
            restore()  # an interrupt cut the first one short
            raise
        raise


def _random_state(model: nn.Module) -> Callable[[], None]:
    """Returns a function that restores the present random state of torch, numpy and python."""
    python_state, numpy_state, state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = [device for device in {parameter.device for parameter in model.parameters()} if device.type == "cuda"]
    device_states = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(state)
        for device, of_device in device_states:
            torch.cuda.set_rng_state(of_device, device)

    return restore
