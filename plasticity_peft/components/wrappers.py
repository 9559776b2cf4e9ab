"""Looks through the wrappers that PEFT, torch and Accelerate put around the modules of a base model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

PIXELS = "pixel_values"
IMAGE_ARGUMENTS = ("x", "image", "images", "img", "imgs", "pixels", "video", "videos")
"""Names of the one argument of a user's forward pass that stands for `pixel_values`."""
PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
ORIGINAL = "original_module"
"""Name under which PEFT keeps the original of a module that trains in full."""
OF_NORMS = "ln_tuning_layers"
"""Name under which PEFT's LN tuning keeps the norms that train, beside their original."""
COMPILED = "_orig_mod"
"""Name under which `torch.compile` keeps the module that it compiled."""


def uncompiled(model: nn.Module) -> nn.Module:
    """Returns the model that torch.compile wrapped, or the model itself."""
    inner = getattr(model, "_modules", {}).get(COMPILED)
    return model if inner is None else inner


def bare(model: nn.Module) -> nn.Module:
    """Returns the model without the wrappers around it. It computes the same, and its modules have their own names.

    Known wrappers are `torch.compile`, DistributedDataParallel, DataParallel, FullyShardedDataParallel, the engine of
    DeepSpeed and PeftModel, in any order.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> bare(nn.DataParallel(model)) is model
        True
    """
    while isinstance(model, nn.Module):
        get_base_model = getattr(model, "get_base_model", None)
        inner = get_base_model() if callable(get_base_model) else _without_one_wrapper(model)
        if inner is model:
            break
        model = inner
    return model


def _without_one_wrapper(model: nn.Module) -> nn.Module:
    if isinstance(model, (*PARALLEL, FullyShardedDataParallel)) or type(model).__name__ == "DeepSpeedEngine":
        inner: nn.Module = model.module  # type: ignore[assignment]
        return inner
    return uncompiled(model)


def original_of(module: nn.Module) -> nn.Module | None:
    """Returns what PEFT keeps of a module that trains in full; None if `module` is not such a wrapper."""
    waiting = vars(module).get(ORIGINAL)  # in CPU memory, where it is no child of its wrapper
    return waiting if isinstance(waiting, nn.Module) else module._modules.get(ORIGINAL)


def in_use(module: nn.Module) -> nn.Module:
    """Returns what PEFT calls in the place of a module that trains in full: the copy of the active adapter, or the
    original if adapters are disabled or one that is active has no copy. Any other module is returned as it is.
    """
    wrapper: Any = module
    original, copies = original_of(module), getattr(wrapper, "modules_to_save", {})
    if original is None and OF_NORMS in module._modules:
        original, copies = wrapper.base_layer, {} if wrapper.merged else module._modules[OF_NORMS]
    if original is None:
        return module
    active = [] if wrapper.disable_adapters else wrapper.active_adapters
    copied: bool = bool(active) and all(name in copies for name in active)
    return copies[active[0]] if copied else original


@contextmanager
def originals_in_place(model: nn.Module) -> Iterator[None]:
    """Inside, originals that wait in CPU memory are on the device of the model, and children of their wrappers."""
    with ExitStack() as stack:
        for module in list(model.modules()):
            in_place = getattr(type(module), "original_in_place", None)
            if in_place is not None:
                stack.enter_context(in_place(module))
        yield


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the module of the base model behind `module`, which PEFT or torch.compile may have wrapped.

    Of a module that trains in full, this is what computes in its place.
    """
    while True:
        inner = in_use(module)
        if inner is module:
            children = dict(module.named_children())
            inner = children.get("base_layer", children.get(COMPILED, module))
        if inner is module:
            return module
        module = inner


def is_adapted(module: nn.Module) -> bool:
    """Returns whether PEFT adds something to what a layer computes, as LoRA does, so its weights are not all of it."""
    layer: Any = in_use(module)
    adapts = "base_layer" in layer._modules and bool(getattr(layer, "active_adapters", ()))
    return adapts and not (getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False))


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields (path, module) for the modules of the base model, as if no adapter had been put on it."""
    module = unwrap(module)
    yield path, module
    for name, child in module.named_children():
        yield from walk(child, f"{path}.{name}" if path else name)


def forward_parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Returns the arguments of a forward pass by name, without the decorators and Accelerate's wrappers around it.

    `inspect.signature` alone would lose the first argument: a method that wraps a method loses two "self".
    """
    forward = inspect.unwrap(module.forward)
    parameters = dict(inspect.signature(forward).parameters)
    if forward is inspect.unwrap(type(module).forward) and not inspect.ismethod(forward):
        parameters.pop(next(iter(parameters), ""), None)
    return parameters


def main_input(module: nn.Module) -> str:
    """Returns the name of the argument that takes images, usually "pixel_values". Items of data use the same name."""
    parameters = forward_parameters(module)
    names = (getattr(module, "main_input_name", PIXELS), PIXELS, f"{PIXELS}_videos")
    return next((name for name in names if str(name).startswith(PIXELS) and name in parameters), PIXELS)


def takes_anything(module: nn.Module) -> bool:
    """Returns whether a forward pass names none of its arguments: `forward(*args, **kwargs)`."""
    kinds = {parameter.kind for parameter in forward_parameters(module).values()}
    return bool(kinds) and kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def takes_images_alone(module: nn.Module) -> bool:
    """Returns False if a forward pass needs more than images: text, for a vision-language model."""
    parameters = forward_parameters(module)
    needed = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if any(name.endswith("input_ids") for name in parameters):
        return False
    if main_input(module) in parameters:
        return set(needed) <= {main_input(module)}
    first = next(iter(parameters), "")
    return first in IMAGE_ARGUMENTS and set(needed) <= {first}


@contextmanager
def as_written(module: nn.Module) -> Iterator[None]:
    """Inside, the module runs the forward pass that it had before Accelerate added mixed precision."""
    attributes = vars(module)
    original = attributes.get("_original_forward")
    if original is None:
        yield
        return
    wrapped = attributes.pop("forward", None)
    try:
        attributes["forward"] = original
        yield
    finally:
        del attributes["forward"]
        if wrapped is not None:
            attributes["forward"] = wrapped


def leaves(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the linear layers and norms of a block. Each must belong to exactly one component."""
    return [
        (name, module)
        for name, module in walk(block)
        if name and (isinstance(module, nn.Linear) or type(module).__name__.endswith("Norm"))
    ]


def leaf_names(block: nn.Module) -> str:
    """Returns the names of the leaves, as a message shows them."""
    return ", ".join(name for name, _ in leaves(block))
