"""A model, and the process around it, handed back as they were found."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from plasticity_peft.components.offloading import execution_device


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


def seed_cpu(*numbers: int) -> None:
    """Seeds python, numpy and torch's generator on the CPU by these numbers.

    `torch.manual_seed` would seed every accelerator of the machine too, whether a model is on it or not.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint32)
    random.seed(int(state[0]))
    np.random.seed(int(state[0]))
    torch.default_generator.manual_seed(int(state[0]))


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Inside, an exception puts the modules of `model` back together as they were.

    Children, parameters, hooks, modes and every other attribute are restored, and whether parameters train; numbers
    in them are not. Random numbers are drawn as if nothing had been.
    """
    restore_random_state = _random_state(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = []
    for module in model.modules():
        held = [value for value in vars(module).values() if type(value) in (dict, OrderedDict, list, set)]
        before.append((vars(module), vars(module).copy(), [(value, value.copy()) for value in held]))
    try:
        yield
    except BaseException:
        for attributes, old, containers in before:
            for container, content in containers:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
            attributes.clear()
            attributes.update(old)
        for parameter, required in flags:
            parameter.requires_grad_(required)
        restore_random_state()
        raise


def _random_state(model: nn.Module) -> Callable[[], None]:
    """Returns a function that puts back the random state of torch, numpy and python as it is."""
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


@contextmanager
def _autocast(device_types: set[str], dtype: str | None) -> Iterator[None]:
    if not device_types:
        yield
        return
    lower = None if dtype is None else getattr(torch, dtype)
    with torch.autocast(device_types.pop(), dtype=lower, enabled=lower is not None), _autocast(device_types, dtype):
        yield
