"""Hooks on the modules of a model that act only in the thread that sets them.

Another thread may run the model while it is measured; its calls do not trigger the hooks. `remove_own_hooks`
recognizes and removes hooks that an interrupt left behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_WORKING_FOR = threading.local()


class OwnHook:
    """A hook of this library, which acts in the thread that makes it."""

    def __init__(self, act: Callable[..., Any]) -> None:
        """Takes the function that the hook calls."""
        self._act, self._thread = act, threading.get_ident()

    def __call__(self, *arguments: Any) -> Any:
        """Acts if the call comes from its own thread, or from one that works for it."""
        return self._act(*arguments) if is_of(self._thread) else None


def is_of(thread: int) -> bool:
    """Returns whether the running thread is `thread`, or works for it."""
    return thread in (threading.get_ident(), getattr(_WORKING_FOR, "thread", None))


@contextmanager
def working_for(thread: int) -> Iterator[None]:
    """Inside, the running thread works for another one, as the threads of a backward pass on a GPU do."""
    before = getattr(_WORKING_FOR, "thread", None)
    _WORKING_FOR.thread = thread
    try:
        yield
    finally:
        _WORKING_FOR.thread = before


@contextmanager
def before_calls(module: nn.Module, act: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Calls `act(module, args, kwargs)` before each call of the module; what it returns replaces both arguments."""
    handle = module.register_forward_pre_hook(OwnHook(act), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_calls(module: nn.Module, act: Callable[[nn.Module, Any, Any, Any], Any]) -> Iterator[None]:
    """Calls `act(module, args, kwargs, output)` after each call of the module."""
    handle = module.register_forward_hook(OwnHook(act), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def remove_own_hooks(model: nn.Module) -> None:
    """Removes the hooks of this library from all modules of a model, and no others."""
    for module in model.modules():
        kinds = (
            (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        )
        for hooks, *flags in kinds:
            for key in [key for key, hook in hooks.items() if isinstance(hook, OwnHook)]:
                for held in (hooks, *flags):
                    held.pop(key, None)  # type: ignore[attr-defined]
