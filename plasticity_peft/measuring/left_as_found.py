"""Leaves a model, and the process around it, as they were, at whichever moment measuring ends.

An interrupt (Ctrl-C) may come between any two steps, for example just after a hook was set, or during the restoring.
So the state is recorded before anything changes, hooks of this library are recognized by their type, and restoring can
be done twice.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from plasticity_peft.components.hooks import put_back_forward, remove_own_hooks
from plasticity_peft.components.offloading import execution_device
from plasticity_peft.components.quantized import trainable_after
from plasticity_peft.components.wrappers import originals_in_place
from plasticity_peft.errors import ModelError
from plasticity_peft.images.loaders import state_of
from plasticity_peft.images.seeding import seed_cpu

T = TypeVar("T")

_ONE_AT_A_TIME = threading.RLock()


class LeftAsFound:
    """Inside: evaluation mode, no gradients, random numbers from a seed, autocast to `dtype` or to nothing, and 4-bit
    weights stay as they are.

    Afterwards everything is as before. Code compiled by torch.compile is not used inside, because it ignores the hooks
    that are set here. One thread is inside at a time, because all threads share random states and the mode of a model.

    On success and on failure, these are restored: the mode of every module, `requires_grad` of the parameters, the
    problem type that a loss sets in a config, and the random states of torch (CPU and the model's devices), numpy,
    python and the generators of datasets and DataLoaders. Hooks of this library are removed. The generators of other
    devices are not touched. Other threads may run the model meanwhile, in evaluation mode. If they change its weights,
    an error is raised.

    An interrupt may cut `__exit__` short. `run_left_as_found` does the rest.
    """

    def __init__(self, model: nn.Module, seed: int, dtype: str | None = None, *data: Any) -> None:
        """Notes what to leave as found, and changes nothing.

        Args:
            model: the model to restore.
            seed: seed of random numbers inside.
            dtype: "bfloat16" or "float16" for autocast to it.
            data: datasets and DataLoaders whose random generators are restored.
        """
        self._model, self._seed, self._dtype, self._data = model, seed, dtype, data
        self._contexts = ExitStack()
        self._undo: list[Callable[[], None]] = []
        self._versions: list[tuple[str, nn.Parameter, int]] = []
        self._locked = False

    def __enter__(self) -> None:
        """Waits for other threads, records the state, and then changes the model and the process."""
        self._locked = True  # before it is: an interrupt in between must not leave a lock that nobody releases
        _ONE_AT_A_TIME.acquire()
        model = self._model
        self._undo = [self._contexts.close]
        self._contexts.enter_context(originals_in_place(model))
        devices = {parameter.device for parameter in model.parameters()} | {execution_device(model)}
        kinds = sorted({"cpu", *filter(torch.amp.is_autocast_available, {device.type for device in devices})})
        accelerators = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        self._versions = [(name, p, p._version) for name, p in _plain_parameters(model)]
        self._undo = [
            _modes(model),
            self._contexts.close,
            *_random_states(accelerators),
            *map(state_of, self._data),
            *_problem_types(model),
            *_packings(model),
            *_settings_of_torch(kinds),
        ]
        lower = None if self._dtype is None else getattr(torch, self._dtype)
        enter = self._contexts.enter_context
        enter(trainable_after(model))
        enter(torch.inference_mode(False))
        enter(torch.no_grad())
        enter(torch.compiler.set_stance("force_eager"))
        for kind in kinds:
            enter(torch.autocast(kind, dtype=lower, enabled=lower is not None))
        if torch.get_default_device().type != "cpu":
            enter(execution_device(model))
        seed_cpu(self._seed)
        for index in accelerators:
            torch.cuda.default_generators[index].manual_seed(self._seed)
        model.eval()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Restores everything. Raises ModelError if the weights have changed meanwhile."""
        self.put_back()
        if kind is None:
            self._check_weights()

    def put_back(self) -> None:
        """Restores everything. A second call has no effect."""
        for undo in self._undo:
            undo()
        self._undo = []  # before the lock is released: another thread may measure the model then
        if self._locked:
            with suppress(RuntimeError):  # it was never acquired, or is already released
                _ONE_AT_A_TIME.release()
            self._locked = False

    def _check_weights(self) -> None:
        for name, parameter, version in self._versions:
            if parameter._version != version:
                raise ModelError(
                    f"{name} was changed while {type(self._model).__name__} was measured, so its scores would mix two "
                    "models. Do not train a model in another thread while it is measured."
                )


def run_left_as_found(work: Callable[[], T], model: nn.Module, seed: int, dtype: str | None = None, *data: Any) -> T:
    """Returns what `work` returns inside of `LeftAsFound`, and restores everything also after an interrupt."""
    found = LeftAsFound(model, seed, dtype, *data)
    try:
        with found:
            return work()
    finally:
        found.put_back()


def _modes(model: nn.Module) -> Callable[[], None]:
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back() -> None:
        remove_own_hooks(model)
        for module, training in modes:
            module.training = training
            put_back_forward(module)
        for parameter, required in flags:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)

    return put_back


def _plain_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters whose changes torch counts, by name."""
    named = model.named_parameters()
    return [(name, p) for name, p in named if type(p) is nn.Parameter and not (p.is_inference() or p.is_meta)]


def _random_states(accelerators: list[int]) -> list[Callable[[], None]]:
    python_state, numpy_state, state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    states = [(torch.cuda.default_generators[index], torch.cuda.get_rng_state(index)) for index in accelerators]

    def put_back() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(state)
        for generator, of_device in states:
            generator.set_state(of_device)

    return [put_back]


def _problem_types(model: nn.Module) -> list[Callable[[], None]]:
    """Returns functions that restore `problem_type` of each config, which a loss of transformers may set."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    noted = [(config, config.problem_type) for config in configs if hasattr(config, "problem_type")]

    def put_back() -> None:
        for config, problem in noted:
            if config.problem_type != problem:
                config.problem_type = problem

    return [put_back]


def _packings(model: nn.Module) -> list[Callable[[], None]]:
    """Returns functions that restore whether bitsandbytes packs weights, which `trainable_after` changes."""
    name = "support_avx512bf16_for_cpu"
    return [partial(setattr, module, name, vars(module)[name]) for module in model.modules() if name in vars(module)]


def _settings_of_torch(device_types: list[str]) -> list[Callable[[], None]]:
    """Returns functions that restore settings of torch whose contexts an interrupt may have left open."""
    from torch._dynamo import eval_frame

    recording, stance = torch.is_grad_enabled(), getattr(eval_frame, "_stance", None)
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in device_types]

    def put_back() -> None:
        torch.set_grad_enabled(recording)
        for kind, enabled, dtype in autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        if stance is not None and eval_frame._stance is not stance:
            eval_frame._set_stance(stance)

    return [put_back]
