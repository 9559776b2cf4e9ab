"""The modules of a base model, seen through what PEFT and torch.compile put around them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

PIXELS = "pixel_values"


def uncompiled(model: nn.Module) -> nn.Module:
    """Returns the model that torch.compile wrapped, or the model itself."""
    inner = getattr(model, "_modules", {}).get("_orig_mod")
    return model if inner is None else inner


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the module of the base model behind `module`, which PEFT may have wrapped once or more."""
    while True:
        children = dict(module.named_children())
        inner = children.get("base_layer", children.get("original_module"))
        if inner is None:
            return module
        module = inner


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields (path, module) for the modules of the base model, as if no adapter had been put on it."""
    module = unwrap(module)
    yield path, module
    for name, child in module.named_children():
        yield from walk(child, f"{path}.{name}" if path else name)


def main_input(module: nn.Module) -> str:
    """Returns the name of the argument in which a model takes images: "pixel_values", as a rule."""
    parameters = inspect.signature(module.forward).parameters
    names = (getattr(module, "main_input_name", PIXELS), PIXELS, f"{PIXELS}_videos")
    return next((name for name in names if str(name).startswith(PIXELS) and name in parameters), PIXELS)


def leaves(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the linear layers and norms of a block: what must belong to exactly one component."""
    return [
        (name, module)
        for name, module in walk(block)
        if isinstance(module, nn.Linear) or type(module).__name__.endswith("Norm")
    ]


def leaf_names(block: nn.Module) -> str:
    """Returns the names of the leaves, as a message shows them."""
    return ", ".join(name for name, _ in leaves(block))
