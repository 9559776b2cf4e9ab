"""Keeps the originals of modules that train in full in CPU memory, while the model is on another device.

PEFT's `ModulesToSaveWrapper` holds a module twice: the original, and a copy for each adapter. Only one of them
computes at a time. So the original is needed on the device only while no adapter replaces it. Otherwise it waits in
CPU memory, and training in full takes no more memory of the device than training the module without PEFT.

A module that waits is an attribute of its wrapper, but no child of it. So DistributedDataParallel, DataParallel,
DeepSpeed and `model.device` find no parameter on another device. State dicts have the same keys and values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from plasticity_peft.components.wrappers import ORIGINAL, in_use

SAME_MEMORY = ("cpu", "meta")
"""Types of device on which an original stays where PEFT has it: CPU memory would be no other place."""


class TrainedInFull(ModulesToSaveWrapper):
    """A `ModulesToSaveWrapper` whose original waits in CPU memory while an adapter computes in its place.

    It is on the device of the model if the adapters are disabled, or if none that is active contains this module.
    """

    _device = torch.device("cpu")
    """The device from which an original that waits was sent away."""

    def _get_name(self) -> str:
        return ModulesToSaveWrapper.__name__  # what PEFT's status of layers shows

    def settle(self) -> None:
        """Puts the original on the device if it computes, and into CPU memory if an adapter does."""
        if self._original_computes():
            self.bring_original()
        else:
            self._send_original_away()

    def bring_original(self) -> None:
        """Puts the original on the device of the model. No effect if it is there."""
        if not self._original_waits:
            return
        device = self._device_of_copies()
        _convert(self.original_module, lambda tensor: tensor.to(device))
        self._adopt_original()

    @contextmanager
    def original_in_place(self) -> Iterator[None]:
        """Inside, the original is on the device of the model, and a child of this wrapper, as PEFT has it."""
        waits = self._original_waits
        self.bring_original()
        try:
            yield
        finally:
            if waits:
                self.settle()

    @property
    def _original_waits(self) -> bool:
        return ORIGINAL not in self._modules

    def _original_computes(self) -> bool:
        return in_use(self) is self.original_module

    def _send_original_away(self) -> None:
        here, copies = _device_of(self.original_module), self._device_of_copies()
        if here is not None and here.type != "meta" and copies.type not in SAME_MEMORY:
            _convert(self.original_module, lambda tensor: tensor.to("cpu"))
            self._disown_original(copies)

    def _device_of_copies(self) -> torch.device:
        """Returns the device of the copies; if they are now sharded or offloaded, the one that they had before."""
        device = _device_of(self.modules_to_save)
        return self._device if device is None or device.type == "meta" else device

    def _adopt_original(self) -> None:
        """Makes the original the first child, as in PEFT, so that state dicts keep their order."""
        others = {name: child for name, child in self._modules.items() if name != ORIGINAL}
        original = self.original_module
        vars(self).pop(ORIGINAL, None)
        self._modules.clear()
        self._modules.update({ORIGINAL: original, **others})

    def _disown_original(self, device: torch.device) -> None:
        original = self.original_module
        self._modules.pop(ORIGINAL, None)
        vars(self).update({ORIGINAL: original, "_device": device})

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TrainedInFull:
        """Applies a change of device or dtype. An original that waits changes its dtype, and not its device."""
        original = self.original_module
        if not recurse or not _is_plain(original):
            return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]
        for child in self.children():
            if child is not original:
                child._apply(fn)  # type: ignore[no-untyped-call]
        copies = _device_of(self.modules_to_save)
        if copies is None or copies.type in SAME_MEMORY or self._original_computes():
            original._apply(fn)
            self._adopt_original()
        else:
            # One tensor at a time is on the device.
            _convert(original, lambda tensor: fn(tensor).to("cpu"))
            self._disown_original(copies)
        return self

    def train(self, mode: bool = True) -> TrainedInFull:
        """Sets the mode. The statistics of batch norms in the original do not change: it does not train."""
        super().train(mode)
        if self._original_waits:
            self.original_module.train(mode)
            for part in self.original_module.modules():
                if isinstance(part, _BatchNorm):
                    part.eval()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._original_waits:
            self.original_module.state_dict(
                destination=destination, prefix=f"{prefix}{ORIGINAL}.", keep_vars=keep_vars
            )

    def _load_from_state_dict(self, *args: Any) -> None:
        # torch loads the children next, and then calls `_settle_after_loading`.
        if self._original_waits:
            self._adopt_original()
        super()._load_from_state_dict(*args)

    def _forward_wrapped_passthrough(self, *args: Any, **kwargs: Any) -> Any:
        self.bring_original()
        return super()._forward_wrapped_passthrough(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _mixed_batch_forward(self, input: Any, *args: Any, adapter_names: list[str], **kwargs: Any) -> torch.Tensor:
        with self.original_in_place() if "__base__" in adapter_names else nullcontext():
            mixed: torch.Tensor = super()._mixed_batch_forward(input, *args, adapter_names=adapter_names, **kwargs)
        return mixed

    def update(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds the copy of a further adapter, on the device of the model."""
        with self.original_in_place():
            super().update(adapter_name, *args, **kwargs)  # type: ignore[no-untyped-call]

    def enable_adapters(self, enabled: bool) -> None:
        """Enables or disables the adapters."""
        super().enable_adapters(enabled)
        self.settle()

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Sets the active adapter."""
        super().set_adapter(*args, **kwargs)
        self.settle()

    def delete_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Deletes an adapter if this module is part of it."""
        super().delete_adapter(*args, **kwargs)
        self.settle()


def keep_originals_away(model: nn.Module) -> None:
    """Makes the originals of all modules that train in full wait in CPU memory; no effect on a model in CPU memory.

    These stay as PEFT has them: modules that share a tensor with another module, which needs it on the device, and
    modules with tensors that are not plain: quantized, or spread over processes.
    """
    uses = Counter(id(tensor) for tensor in _all_tensors(model))
    for module in model.modules():
        if type(module) is ModulesToSaveWrapper and all(uses[id(one)] == 1 for one in _all_tensors(_original(module))):
            module.__class__ = TrainedInFull
            module.register_load_state_dict_post_hook(_settle_after_loading)  # type: ignore[no-untyped-call]
        if isinstance(module, TrainedInFull):
            module.settle()


def _settle_after_loading(module: nn.Module, _: object) -> None:
    assert isinstance(module, TrainedInFull)
    module.settle()


def _original(wrapper: ModulesToSaveWrapper) -> nn.Module:
    original: nn.Module = wrapper.original_module
    return original


def _all_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yields parameters and buffers; those that are in several places, several times."""
    for named in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for _, tensor in named:
            yield tensor


def _is_plain(module: nn.Module) -> bool:
    return all(type(one) in (nn.Parameter, torch.Tensor) and not hasattr(one, "ds_id") for one in _all_tensors(module))


def _device_of(module: nn.Module) -> torch.device | None:
    """Returns the device of a module; None if its tensors are on several, are not plain, or if there are none."""
    devices = {tensor.device for tensor in _all_tensors(module)}
    return devices.pop() if len(devices) == 1 and _is_plain(module) else None


def _convert(module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replaces the tensors of a module. Those that a graph of autograd has saved for a backward pass stay as they are.

    If `convert` fails, nothing has changed.
    """
    places = [held for part in module.modules() for held in (part._parameters, part._buffers)]
    with torch.inference_mode(False), torch.no_grad():
        converted = [{name: _converted(one, convert) for name, one in held.items()} for held in places]
    for held, new in zip(places, converted, strict=True):
        held.update(new)  # type: ignore[arg-type]


def _converted(tensor: torch.Tensor | None, convert: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    if tensor is None:
        return None
    new = convert(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    vars(new).update(vars(tensor))
    if tensor.grad is not None:
        new.grad = convert(tensor.grad)
    return new
