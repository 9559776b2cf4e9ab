"""Counts the work and the memory of a training step, from which `plasticity_peft.report.cost` has all costs.

One image passes through the whole model with all parameters trainable, and forward and backward through each different
kind of block with frozen parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.utils import logging

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.calls import Call, Inputs, first_tensor, hooked, run
from plasticity_peft.components.component import KINDS, Component
from plasticity_peft.components.hooks import before_calls
from plasticity_peft.components.offloading import offloaded
from plasticity_peft.errors import ModelError
from plasticity_peft.report.cost import WORK_PER_ELEMENT, BlockCost, ComponentCost, Costs

# A child of the logger of transformers, so that its verbosity applies here too.
logger = logging.get_logger(f"transformers.{__name__}")


def costs_of(model: nn.Module, architecture: Architecture, example: Inputs) -> Costs | None:
    """Returns what training costs, counted on one image; None if it cannot be counted, with the reason in the log.

    Args:
        model: the model that `architecture` describes, in evaluation mode.
        architecture: see `model`.
        example: the inputs of the model for one image, tensors of shape (1, ...).
    """
    if offloaded(model):
        logger.info("The costs of training are not counted, because weights of the model are offloaded.")
        return None
    try:
        return _counted(model, architecture, example)
    except (ModelError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        logger.info("The costs of training could not be counted. %s: %s", type(error).__name__, error)
        return None


def _counted(model: nn.Module, architecture: Architecture, example: Inputs) -> Costs:
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    seen = _Pass(model, architecture)
    with torch.enable_grad():
        seen.run(example, weights)
        blocks = _Blocks(model, seen).counted()
    components = tuple(
        ComponentCost(
            block=number // len(KINDS),
            weights=_weights_work(part, [seen.tokens[path] for path in part.modules]),
            saved=seen.saved.of(*part.modules),
            tokens=tuple(seen.tokens[path] for path in part.modules),
        )
        for number, part in enumerate(architecture.components)
    )
    return Costs(
        image=tuple(next(iter(example.values())).shape[1:]),
        number_bytes=weights[0].element_size(),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        weights=architecture.parameters,
        blocks=blocks,
        components=components,
        outside_forward=max(0, seen.work.total - sum(block.forward for block in blocks)),
        outside_saved=seen.saved.of(""),
    )


def _weights_work(part: Component, tokens: Sequence[int]) -> int:
    """Returns the operations of the gradient of a component's weights: for a layer, of an outer product per token."""
    products = sum(
        2 * count * inputs * outputs for count, (inputs, outputs) in zip(tokens, part.features, strict=False)
    )
    matrices = sum(inputs * outputs for inputs, outputs in part.features)
    return products + WORK_PER_ELEMENT * max(0, part.parameters - matrices)


class _Pass:
    """What is seen in one forward pass of the whole model, in which everything is trainable."""

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        """Prepares the model that `architecture` describes."""
        self._model, self._architecture = model, architecture
        self._matrices = {path for part in architecture.components if part.features for path in part.modules}
        self.calls: dict[str, Call] = {}
        """The call of each block, by path."""
        self.tokens: dict[str, int] = {}
        """Number of tokens that pass each layer, by path."""
        self.work, self.saved = _Work(), _Bytes()

    def run(self, example: Inputs, weights: Iterable[nn.Parameter]) -> None:
        """Runs the model on one image."""
        blocks = {path: self._model.get_submodule(path) for path in self._architecture.blocks}
        inside = [path for part in self._architecture.components for path in part.modules]
        layers = {path: self._model.get_submodule(path) for path in inside}
        self.saved.pass_over([*self._model.parameters(), *self._model.buffers(), *example.values()])
        with ExitStack() as stack:
            for path, module in (blocks | layers).items():
                stack.enter_context(before_calls(module, partial(self._before, path)))
            stack.enter_context(hooked(blocks | layers, lambda path, *_: self.saved.leave(path)))
            stack.enter_context(_training(self._model, weights))
            stack.enter_context(self.work)
            stack.enter_context(self.saved)
            run(self._model, self._architecture, example)

    def _before(self, path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(args, kwargs)
        if path in self._architecture.blocks:
            self.calls[path] = recursively_apply(torch.Tensor.detach, call)
            self.saved.enter(path)
        else:
            self.tokens[path] = math.prod(call.tokens.shape[:-1])
            if path in self._matrices:
                self.saved.enter(path)


class _Blocks:
    """Counts each block alone. Blocks of the same class and shapes are counted once."""

    def __init__(self, model: nn.Module, seen: _Pass) -> None:
        """Takes the pass in which the blocks were called."""
        self._model, self._seen = model, seen
        self._known: dict[Any, tuple[int, int]] = {}

    def counted(self) -> tuple[BlockCost, ...]:
        """Returns the cost of each block."""
        return tuple(self._block(path, call) for path, call in self._seen.calls.items())

    def _block(self, path: str, call: Call) -> BlockCost:
        block = self._model.get_submodule(path)
        shapes = tuple(tuple(parameter.shape) for parameter in block.parameters())
        key = (type(block), shapes, str(recursively_apply(lambda tensor: tensor.shape, call)))
        if key not in self._known:
            self._known[key] = _work_of(block, call)
        return BlockCost(*self._known[key], saved=self._seen.saved.of(path))


def _work_of(block: nn.Module, call: Call) -> tuple[int, int]:
    """Returns the work of a forward pass of a block with frozen parameters, and of the gradient of its input."""
    tokens = call.tokens.clone().requires_grad_()
    given = call.with_tokens(tokens)
    with _training(block, ()):
        with _Work() as forward:
            output = first_tensor(block(*given.args, **given.kwargs))
        with _Work() as backward:
            torch.autograd.grad(output, tokens, torch.ones_like(output))
    return forward.total, backward.total


class _Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations inside."""

    def __init__(self) -> None:
        """Starts at 0."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.total += _operations(func, args, kwargs or {}, output)
        return output


def _operations(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Returns the operations of one call."""
    name = func._schema.name
    if "scaled_dot_product" in name:  # not all of them have a formula in torch
        backward = "backward" in name
        query, key = args[backward : backward + 2]
        pairs = math.prod(query.shape[:-1]) * key.shape[-2]
        return int((2.5 if backward else 1) * pairs * (4 * query.shape[-1] + WORK_PER_ELEMENT))
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=output))
    views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
    if views or name in ("aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided"):
        return 0
    written: list[int] = []
    recursively_apply(lambda tensor: written.append(tensor.numel()), output)
    return WORK_PER_ELEMENT * sum(written)


class _Bytes(torch.autograd.graph.saved_tensors_hooks):
    """Inside, counts the bytes that are kept for gradients, by the innermost module that was entered."""

    def __init__(self) -> None:
        """Starts with nothing."""
        super().__init__(self._keep, lambda tensor: tensor)
        self.by_module: dict[str, int] = {}
        """Bytes by path; "" is outside of all. A linear layer keeps its input, a block all that the others do not."""
        self._inside = [""]
        self._seen: set[int] = set()
        self._held: list[torch.Tensor] = []

    def pass_over(self, tensors: Iterable[torch.Tensor]) -> None:
        """Excludes tensors that are there in any case."""
        self._seen |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def enter(self, path: str) -> None:
        """Starts the call of a module."""
        self._inside.append(path)

    def leave(self, path: str) -> None:
        """Ends the call of a module, if it was entered."""
        if self._inside[-1] == path:
            self._inside.pop()

    def of(self, *paths: str) -> int:
        """Returns the bytes that some modules keep."""
        return sum(self.by_module.get(path, 0) for path in paths)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor.detach())  # or its address would be given to another
            self.by_module[self._inside[-1]] = self.of(self._inside[-1]) + storage.nbytes()
        return tensor


@contextmanager
def _training(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, only these parameters of the module require gradients."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    wanted = set(map(id, parameters))
    try:
        for parameter, _ in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
