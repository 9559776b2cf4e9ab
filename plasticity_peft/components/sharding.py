"""Models whose weights are spread over processes: by FSDP, by DeepSpeed ZeRO-3, or by tensor parallelism.

In such a model, a process has only its part of a weight, and a forward pass is a conversation of all processes. To
read weights, or to run a model on images of its own, a process needs all weights. `whole` gathers them for a while.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from plasticity_peft.components.wrappers import bare
from plasticity_peft.errors import ModelError

HUNG_BETWEEN = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which torch keeps a module in a wrapper that it puts in the place of the module."""
SHARDING = ("torch.distributed.", "deepspeed.", "transformers.distributed.", "transformers.integrations.tensor")
"""Beginnings of the names of Python modules whose hooks gather weights, spread them, or exchange activations."""
MARKS = ("_is_hf_initialized",)
"""Attributes of a parameter that a gathered copy has too."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """Returns the shape of a whole weight, of which this process may have only a part.

    Examples:
        >>> shape_of(torch.zeros(2, 3))
        torch.Size([2, 3])
    """
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def is_spread(parameter: torch.Tensor) -> bool:
    """Returns whether this process has only a part of a weight, or may have from one moment to the next (ZeRO-3)."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_shape")


def is_sharded(model: nn.Module) -> bool:
    """Returns whether weights of a model are spread over processes."""
    flattened = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    return flattened or any(map(is_spread, model.parameters()))


def check_not_flattened(model: nn.Module) -> None:
    """Raises ModelError if FullyShardedDataParallel (FSDP1) has replaced weights by parts of flat ones."""
    for path, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ModelError(
                f"{path or 'The model'} is wrapped by FullyShardedDataParallel, which flattens weights and spreads "
                "them over the processes. Adapt the model before it is wrapped. measure_plasticity and fit_head take "
                "the model as it is; report=measure_plasticity(...) gives the result to a config."
            )


@contextmanager
def whole(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, this process has all weights of the model, as ordinary parameters, and runs it without the others.

    All processes must enter together, as they gather the weights from each other. Each needs memory for the whole
    model. Weights that are changed inside, by all processes alike, keep the change. Models that are not spread are
    yielded as they are.

    Args:
        model: a model that FSDP1, FSDP2, DeepSpeed ZeRO-3, `parallelize_module` or nothing has spread.

    Yields:
        The model without the wrappers around it (see `bare`) and around its modules.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> with whole(nn.DataParallel(model)) as inner:
        ...     inner is model
        True
    """
    with ExitStack() as stack:
        if not isinstance(model, nn.Module):  # who looks for components says so
            yield model
            return
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(model))
        model = bare(model)
        stack.enter_context(_without_wrappers_between(model))
        stack.enter_context(_linear_of_torch())
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what it gathered for a forward pass would not keep changes
        if any(is_spread(held) for held in (*model.parameters(), *model.buffers())):
            stack.enter_context(_without_hooks(model))
            stack.enter_context(_gathered(model))
        yield model


@contextmanager
def _without_wrappers_between(model: nn.Module) -> Iterator[None]:
    """Inside, modules that torch has wrapped are in the places of their wrappers."""
    found = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if name not in HUNG_BETWEEN and _inside(child) is not child
    ]
    try:
        for parent, name, child in found:
            parent._modules[name] = _inside(child)
        yield
    finally:
        for parent, name, child in found:
            parent._modules[name] = child


def _inside(module: nn.Module) -> nn.Module:
    """Returns the module in wrappers of torch, or the module itself."""
    inner = next((module._modules[name] for name in HUNG_BETWEEN if name in module._modules), None)
    return module if inner is None else _inside(inner)


@contextmanager
def _linear_of_torch() -> Iterator[None]:
    """Inside, `F.linear` is that of torch. ZeRO-3 replaces it in the whole process by one that saves other tensors."""
    found = F.linear
    if not _is_of_sharding(found):
        yield
        return
    try:
        F.linear = torch._C._nn.linear
        yield
    finally:
        F.linear = found


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, what gathers weights before a module runs, and spreads them afterwards, is gone: hooks and forwards."""
    tables: list[dict[int, Callable[..., Any]]] = [getattr(m, name) for m in model.modules() for name in HOOKS]
    before = [(table, dict(table)) for table in tables if any(map(_is_of_sharding, table.values()))]
    held = [(vars(m), vars(m)["forward"]) for m in model.modules() if _is_of_sharding(vars(m).get("forward"))]
    try:
        for attributes, _ in held:
            del attributes["forward"]
        for table, hooks in before:
            for key, hook in hooks.items():
                if _is_of_sharding(hook):
                    del table[key]
        yield
    finally:
        for attributes, forward in held:
            attributes["forward"] = forward
        for table, hooks in before:
            now = dict(table)
            table.clear()
            table.update({key: hook for key, hook in hooks.items() if key in now or _is_of_sharding(hook)})
            table.update(now)


def _is_of_sharding(hook: Any) -> bool:
    function = inspect.unwrap(getattr(hook, "func", hook))
    return str(getattr(function, "__module__", "")).startswith(SHARDING)


@contextmanager
def _gathered(model: nn.Module) -> Iterator[None]:
    """Inside, ordinary parameters with all values are in the places of those that are spread."""
    places = [
        (table, name, held)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, held in table.items()
        if held is not None and is_spread(held)
    ]
    spread = {id(held): held for _, _, held in places}
    copies = {key: _copy(held) for key, held in spread.items()}
    versions = {key: copied._version for key, copied in copies.items()}
    try:
        for table, name, held in places:
            table[name] = copies[id(held)]  # type: ignore[assignment]
        yield
    finally:
        for table, name, held in places:
            table[name] = held  # type: ignore[assignment]
        for key, copied in copies.items():
            if copied._version != versions[key]:
                _set(spread[key], copied.detach())


def _copy(held: torch.Tensor) -> torch.Tensor:
    """Returns all values of a weight, as a parameter if it is one."""
    with torch.no_grad():
        if isinstance(held, DTensor):
            values = held.full_tensor().detach().clone()
        else:
            with _zero3().GatheredParameters([held]):
                values = held.detach().clone()
    if not isinstance(held, nn.Parameter):
        return values
    copied = nn.Parameter(values, requires_grad=held.requires_grad)
    vars(copied).update({name: value for name, value in vars(held).items() if name in MARKS})
    return copied


def _set(held: torch.Tensor, values: torch.Tensor) -> None:
    """Sets all values of a weight, of which each process keeps its part."""
    with torch.no_grad():
        if isinstance(held, DTensor):
            held.copy_(distribute_tensor(values, held.device_mesh, held.placements))
        else:
            with _zero3().GatheredParameters([held], modifier_rank=0):
                held.copy_(values)


def _zero3() -> Any:
    from deepspeed import zero

    return zero
