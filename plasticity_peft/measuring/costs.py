"""Counts the work and the memory of a training step, from which `plasticity_peft.report.cost` has all costs.

One image passes through the whole model with all parameters trainable, and forward and backward through each different
kind of block with frozen parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
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
    seen = _Pass(model, architecture, example)
    with torch.enable_grad():
        with _training(model, weights):
            seen.run()
        found = _Blocks(model, architecture, seen.calls).counted()
    blocks = tuple(block for block, _ in found)
    saved = [bytes_ for _, of_parts in found for bytes_ in of_parts]
    components = []
    for number, part in enumerate(architecture.components):
        tokens = tuple(seen.tokens[path] for path in part.modules)
        components.append(ComponentCost(number // len(KINDS), _weights_work(part, tokens), saved[number], tokens))
    return Costs(
        image=tuple(next(iter(example.values())).shape[1:]),
        number_bytes=weights[0].element_size(),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        weights=architecture.parameters,
        blocks=blocks,
        components=tuple(components),
        outside_forward=max(0, seen.work.total - sum(block.forward for block in blocks)),
        outside_saved=max(0, seen.saved.total - sum(block.saved for block in blocks) - sum(saved)),
    )


def _weights_work(part: Component, tokens: Sequence[int]) -> int:
    """Returns the operations of the gradient of a component's weights: for a layer, of an outer product per token."""
    products = sum(
        2 * count * inputs * outputs for count, (inputs, outputs) in zip(tokens, part.features, strict=False)
    )
    matrices = sum(inputs * outputs for inputs, outputs in part.features)
    return products + WORK_PER_ELEMENT * max(0, part.parameters - matrices)


class _Pass:
    """What is seen in one forward pass of the whole model."""

    def __init__(self, model: nn.Module, architecture: Architecture, example: Inputs) -> None:
        """Takes the model that `architecture` describes, and one image."""
        self._model, self._architecture, self._example = model, architecture, example
        self.calls: dict[str, Call] = {}
        """The call of each block, by path."""
        self.tokens: dict[str, int] = {}
        """Number of tokens that pass each layer, by path."""
        self.work, self.saved = _Work(), _Bytes(model.parameters(), model.buffers(), example.values())

    def run(self) -> None:
        """Runs the model on the image."""
        inside = [path for part in self._architecture.components for path in part.modules]
        with ExitStack() as stack:
            for path in (*self._architecture.blocks, *inside):
                stack.enter_context(before_calls(self._model.get_submodule(path), partial(self._before, path)))
            stack.enter_context(self.work)
            stack.enter_context(self.saved)
            run(self._model, self._architecture, self._example)

    def _before(self, path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        call = Call(args, kwargs)
        if path in self._architecture.blocks:
            self.calls[path] = recursively_apply(torch.Tensor.detach, call)
        else:
            self.tokens[path] = math.prod(call.tokens.shape[:-1])


class _Blocks:
    """Counts each block alone. Blocks of the same class and shapes are counted once."""

    def __init__(self, model: nn.Module, architecture: Architecture, calls: dict[str, Call]) -> None:
        """Takes the call of each block, by path."""
        self._model, self._calls = model, calls
        parts = architecture.components
        starts = range(0, len(parts), len(KINDS))
        self._parts = {path: parts[n : n + len(KINDS)] for path, n in zip(architecture.blocks, starts, strict=True)}
        self._known: dict[Any, tuple[BlockCost, list[int]]] = {}

    def counted(self) -> list[tuple[BlockCost, list[int]]]:
        """Returns the cost of each block, and the bytes that each of its components adds."""
        return [self._block(path, own) for path, own in self._parts.items()]

    def _block(self, path: str, parts: Sequence[Component]) -> tuple[BlockCost, list[int]]:
        block, call = self._model.get_submodule(path), self._calls[path]
        shapes = tuple(tuple(parameter.shape) for parameter in block.parameters())
        key = (type(block), shapes, str(recursively_apply(lambda tensor: tensor.shape, call)))
        if key not in self._known:
            self._known[key] = _frozen(block, call), self._added(block, call, parts)
        return self._known[key]

    def _added(self, block: nn.Module, call: Call, parts: Sequence[Component]) -> list[int]:
        """Returns the bytes that linear layers keep if all components train: their inputs, unless others keep them."""
        layers = {path: self._model.get_submodule(path) for part in parts for path in part.modules if part.features}
        norms = [self._model.get_submodule(path) for part in parts for path in part.modules if not part.features]
        weights = [weight for module in (*layers.values(), *norms) for weight in module.parameters()]
        saved = _Bytes(block.parameters(), block.buffers(), _shared(call))
        with ExitStack() as stack:
            for path, layer in layers.items():
                stack.enter_context(before_calls(layer, partial(saved.enter, path)))
            stack.enter_context(hooked(layers, lambda *_: saved.enter("")))
            stack.enter_context(_training(block, [weight for weight in weights if weight.is_floating_point()]))
            stack.enter_context(saved)
            given = call.with_tokens(call.tokens.clone().requires_grad_())
            block(*given.args, **given.kwargs)
        return [saved.of(*part.modules) for part in parts]


def _shared(call: Call) -> list[torch.Tensor]:
    """Returns the tensors that a block gets beside its tokens, such as a mask. All blocks share them."""
    found: list[torch.Tensor] = []
    recursively_apply(found.append, call.extras)
    return found


def _frozen(block: nn.Module, call: Call) -> BlockCost:
    """Returns the cost of a block, which runs with frozen parameters forward, and backward to its input."""
    tokens = call.tokens.clone().requires_grad_()
    given = call.with_tokens(tokens)
    saved = _Bytes(block.parameters(), block.buffers(), _shared(call))
    with _training(block, ()):
        with _Work() as forward, saved:
            output = first_tensor(block(*given.args, **given.kwargs))
        with _Work() as backward:
            torch.autograd.grad(output, tokens, torch.ones_like(output))
    return BlockCost(forward.total, backward.total, saved.total)


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
    if "scaled_dot_product" in func.name():  # not all of them have a formula in torch
        backward = "backward" in func.name()
        query, key = args[backward : backward + 2]
        pairs = math.prod(query.shape[:-1]) * key.shape[-2]
        return int((2.5 if backward else 1) * pairs * (4 * query.shape[-1] + WORK_PER_ELEMENT))
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=output))
    if _computes_nothing(func):
        return 0
    written: list[int] = []
    recursively_apply(lambda tensor: written.append(tensor.numel()), output)
    return WORK_PER_ELEMENT * sum(written)


@cache
def _computes_nothing(func: Any) -> bool:
    """Returns whether an operation of torch makes a view, or memory whose contents do not matter."""
    schema = func._schema
    views = any(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns)
    return views or schema.name in ("aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided")


class _Bytes(torch.autograd.graph.saved_tensors_hooks):
    """Inside, counts the bytes that are kept for gradients, by the linear layer that keeps them."""

    def __init__(self, *known: Iterable[torch.Tensor]) -> None:
        """Takes the tensors that are not counted."""
        super().__init__(self._keep, lambda tensor: tensor)
        self._by_layer: dict[str, int] = {}
        self._layer = ""
        self._seen = {tensor.untyped_storage()._cdata for tensors in known for tensor in tensors}
        self._held: list[torch.Tensor] = []

    def enter(self, path: str, *_: Any) -> None:
        """Starts the call of a layer; "" ends it."""
        self._layer = path

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self._by_layer.values())

    def of(self, *paths: str) -> int:
        """Returns the bytes that some layers keep."""
        return sum(self._by_layer.get(path, 0) for path in paths)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor.detach())  # or its address would be given to another
            self._by_layer[self._layer] = self.of(self._layer) + storage.nbytes()
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
