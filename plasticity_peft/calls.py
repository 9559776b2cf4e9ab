"""What a forward pass really does: which modules it calls, and what it passes to them.

Every hook here lives inside a context manager, so that none outlasts an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from plasticity_peft.architectures import Architecture
from plasticity_peft.components import KINDS
from plasticity_peft.errors import DataError, ModelError, PlasticityError


class Call(NamedTuple):
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tokens(self) -> torch.Tensor:
        """The tensor that the module maps: its first argument, positional or `hidden_states`."""
        value = self.args[0] if self.args else self.kwargs["hidden_states"]
        if not isinstance(value, torch.Tensor):
            raise ModelError(f"A module was expected to take tokens first. It got {type(value).__name__}.")
        return value

    def with_tokens(self, tokens: torch.Tensor) -> Call:
        """Returns the same call on other tokens."""
        if self.args:
            return Call((tokens, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, "hidden_states": tokens})


def first_tensor(output: Any) -> torch.Tensor:
    """Returns the tokens in what a module returned: attention returns a tensor, or a tuple that starts with it."""
    tensor = output[0] if isinstance(output, tuple) else output
    if not isinstance(tensor, torch.Tensor):
        raise ModelError(f"A component was expected to return tokens. It returned {type(tensor).__name__}.")
    return tensor


class _StopForwardError(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def hooked(modules: dict[str, nn.Module], hook: Callable[[str, Call, Any], None]) -> Iterator[None]:
    """Calls `hook(name, call, output)` after each call of the named modules; the hooks go when the block ends."""
    with ExitStack() as stack:
        for name, module in modules.items():

            def forward_hook(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                hook(name, Call(args, kwargs), output)

            stack.callback(module.register_forward_hook(forward_hook, with_kwargs=True).remove)
        yield


def run(model: nn.Module, pixel_values: torch.Tensor) -> None:
    """Runs the model on images of shape (n, channels, height, width), and says so if it refuses them."""
    try:
        model(pixel_values=pixel_values)
    except (PlasticityError, torch.OutOfMemoryError):
        raise
    except (ValueError, RuntimeError, TypeError) as error:
        raise DataError(
            f"{type(model).__name__} refused pixel_values of shape {tuple(pixel_values.shape[1:])} (channels, height, "
            f"width) and type {pixel_values.dtype}: {error}"
        ) from error


def block_input(model: nn.Module, architecture: Architecture, pixel_values: torch.Tensor) -> tuple[torch.Tensor, Call]:
    """Returns the tokens e that enter block 0, shape (n, tokens, features), and the call of block 0's attention.

    The call holds what the block passes to its attention beside the tokens (a mask, position embeddings), for exactly
    these images. The pass ends there.
    """
    seen: list[Call] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(Call(args, kwargs))
        if len(seen) == 2:
            raise _StopForwardError

    attention = next(component.path for component in architecture.components if component.kind == "MHA")
    with ExitStack() as stack:
        for path in (architecture.blocks[0], attention):
            handle = model.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
        try:
            run(model, pixel_values)
        except _StopForwardError:
            return seen[0].tokens, seen[1]
    raise ModelError(f"{type(model).__name__} ran without calling its first block, {architecture.blocks[0]}.")


def check_calls(model: nn.Module, architecture: Architecture, pixel_values: torch.Tensor) -> None:
    """Raises ModelError unless a forward pass calls every layer of every component once, in a pre-norm block's order.

    This is what names and widths cannot tell: a projection whose weight is used without calling it would take no
    LoRA, and norms that follow their layer make another kind of block.
    """
    order: list[str] = []
    names = {path: model.get_submodule(path) for part in architecture.components for path in part.modules}
    with hooked(names, lambda name, call, output: order.append(name)):
        run(model, pixel_values)
    for name in names:
        if order.count(name) != 1:
            raise ModelError(
                f"{type(model).__name__}: a forward pass calls {name} {order.count(name)} times, and a component's "
                "layers must be called once each: to adapt a layer that is not called does nothing."
            )
    stage = {path: KINDS.index(part.kind) for part in architecture.components for path in part.modules}
    block = {path: part.block for part in architecture.components for path in part.modules}
    places = [(block[name], stage[name]) for name in order]
    if places != sorted(places):
        wrong = next(name for name, place, due in zip(order, places, sorted(places), strict=True) if place != due)
        raise ModelError(
            f"{type(model).__name__}: {wrong} is called out of the order {', '.join(KINDS)} of a pre-norm block."
        )
