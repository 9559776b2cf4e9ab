"""Gradients with respect to the components' parameters. `.grad` and `requires_grad` are left as they were."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from plasticity_peft.components.architecture import Architecture, weights_of
from plasticity_peft.components.calls import Call, Inputs, first_tensor, hooked, per_image, run
from plasticity_peft.components.component import Component
from plasticity_peft.components.hooks import ReplacedForward, before_calls, put_back_forward, working_for
from plasticity_peft.components.quantized import holds_plain_weights
from plasticity_peft.components.wrappers import in_use, is_adapted, unwrap
from plasticity_peft.criteria.precision import full_precision, precise
from plasticity_peft.errors import ModelError

_DETACHED = (
    "has no gradient with respect to the tokens that enter the first block. A hook or a forward pass detaches them "
    "or runs under torch.no_grad(). Remove that, or use a criterion without gradients, such as 'rate_of_change'."
)

_WHOLE: dict[str, Any] = {"early_stop": False} if "early_stop" in signature(checkpoint).parameters else {}
"""Options of `checkpoint` to recompute the whole block. Older releases of torch have only a setting of all threads."""

MOST_ELEMENTS = 2**24
"""Largest number of elements of the gradients of one layer, image by image, that are held at a time."""


def differentiable(model: nn.Module, architecture: Architecture) -> Differentiable:
    """Returns a context in which gradients with respect to all components' weights and biases are recorded.

    Raises:
        ModelError: the weights of a component have no gradient, as when they are quantized.
    """
    return Differentiable(model, architecture)


class Differentiable:
    """Context in which gradients with respect to the weights and biases of all components are recorded.

    Entering returns the parameters of each component, in the order of the architecture. Leaving restores
    `requires_grad` of every parameter.

    Raises:
        ModelError: the weights of a component have no gradient, as when they are quantized.
    """

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        """Prepares the model that `architecture` describes."""
        self._parameters = [_own_parameters(model, part) for part in architecture.components]
        self._before = [(parameter, parameter.requires_grad) for own in self._parameters for parameter in own]
        self._recording = torch.enable_grad()

    def __enter__(self) -> list[list[nn.Parameter]]:
        """Starts recording gradients."""
        for parameter, _ in self._before:
            parameter.requires_grad_(True)
        self._recording.__enter__()
        return self._parameters

    def __exit__(self, *error: Any) -> None:
        """Restores everything."""
        self._recording.__exit__(*error)
        for parameter, required in self._before:
            parameter.requires_grad_(required)


def _own_parameters(model: nn.Module, part: Component) -> list[nn.Parameter]:
    own = [p for module in weights_of(model, part) for p in module.parameters(recurse=False)]
    if not all(map(holds_plain_weights, weights_of(model, part))):
        raise ModelError(
            f"{part.id}: its weights are quantized ({type(own[0]).__name__}, {own[0].dtype}), and have no "
            "gradient. Use another criterion, such as 'parameter_plasticity'."
        )
    if any(parameter.is_meta for parameter in own):
        raise ModelError(
            f"{part.id}: its weights are offloaded, and have no gradient there. Use another criterion, such as "
            "'parameter_plasticity', or keep the model on one device."
        )
    for path in part.modules:
        _check_gradient_of_merged(path, model.get_submodule(path))
    return own


def _check_gradient_of_merged(path: str, module: nn.Module) -> None:
    """Raises ModelError if the gradient by a layer's weight is not that of the merged one: LoRA adds to it."""
    if not is_adapted(module):
        return
    layer: Any = in_use(module)
    variants = getattr(layer, "lora_variant", {})
    kinds = [type(variants[name]).__name__ for name in layer.active_adapters if name in variants]
    if kinds or "lora_A" not in layer._modules:
        kind = kinds[0] if kinds else type(layer).__name__
        raise ModelError(
            f"{path}: its adapter ({kind}) changes the gradient of the weights, so it is not that of the merged "
            "layer. Measure copy.deepcopy(model).merge_and_unload(), or use another criterion, such as "
            "'parameter_plasticity'."
        )


def check_records_gradients(model: nn.Module) -> None:
    """Raises ModelError if the model was made in inference mode, in which torch makes tensors without gradients."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ModelError(
                f"{type(model).__name__} was made in torch.inference_mode(), so {name} cannot have a gradient. Make "
                "or load the model outside of inference mode, or use torch.no_grad() there. copy.deepcopy(model) "
                "outside of inference mode returns a model that can be trained."
            )


def squared_norms(scalar: torch.Tensor, parameters: Sequence[Sequence[nn.Parameter]]) -> torch.Tensor:
    """Returns the squared norm of the gradient of `scalar` for each group of parameters: float64 (groups,)."""
    flat = [parameter for group in parameters for parameter in group]
    gradients = iter(torch.autograd.grad(scalar, flat, allow_unused=True, materialize_grads=True))
    return torch.stack([torch.stack([_square(next(gradients)) for _ in group]).sum() for group in parameters])


def _square(gradient: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=precise(gradient.dtype))
    return norm.double() ** 2


Reduce = Callable[[str, nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""Makes something of the gradient of a layer, image by image, from its path, the layer, its input and the gradient at
its output."""


def _with_last(values: torch.Tensor) -> list[tuple[torch.Tensor, bool]]:
    """Returns each of the values, and whether it is the last one."""
    return [(value, number == len(values) - 1) for number, value in enumerate(values)]


class GradientsByImage:
    """Squared norms of each image's gradient with respect to the parameters of each component.

    One forward and one backward pass serve all images of a batch. The gradient of a layer for one image follows from
    the input of the layer and the gradient at its output: for a linear layer it is their product. So the gradient of
    the batch is never formed. The parameters are unchanged, and do not need to require gradients.
    """

    def __init__(self, model: nn.Module, architecture: Architecture, example: Inputs) -> None:
        """Prepares the model that `architecture` describes, in evaluation mode, with one image as an example."""
        check_records_gradients(model)
        self._model, self._architecture = model, architecture
        self._layers = {path: model.get_submodule(path) for part in architecture.components for path in part.modules}
        self._dimensions = self._find_dimensions(example)

    def __call__(self, images: int, scalar: Callable[[], torch.Tensor], recompute: bool = False) -> torch.Tensor:
        """Returns the squared norms: float64 of shape (images, components).

        Args:
            images: number of images in the pass.
            scalar: function that runs the model and returns a sum over the images. Each term depends on one image
                only.
            recompute: True recomputes each block in the backward pass instead of keeping all activations. The result
                is the same; it takes less memory and a third more time.
        """
        (squares,) = self.reduced(images, lambda: scalar()[None], _squares_of, recompute)
        # For a layer that the scalar does not depend on.
        none = torch.zeros(images, dtype=torch.float64, device="cpu")
        device = next(iter(squares.values()), none).device
        columns = [
            [squares.get(path, none).to(device) for path in component.modules]
            for component in self._architecture.components
        ]
        return torch.stack([torch.stack(own).sum(dim=0) for own in columns], dim=1)

    def reduced(
        self, images: int, scalars: Callable[[], torch.Tensor], reduce: Reduce, recompute: bool = False
    ) -> list[dict[str, torch.Tensor]]:
        """Returns what `reduce` makes of the gradient of each layer, by path, for each of some sums over the images.

        One forward pass serves all sums, and each takes a backward pass. A layer on which a sum does not depend is
        missing.

        Args:
            images: number of images in the pass.
            scalars: function that runs the model and returns the sums: a tensor of shape (sums,).
            reduce: function of the path of a layer, the layer, its input (images, tokens, inputs) and the gradient at
                its output (images, tokens, outputs).
            recompute: as in `__call__`.
        """
        taps = _Taps(self._layers, lambda path, values: self._rows(path, values, images), reduce, recompute)
        # If no parameter requires gradients, none are recorded. This is 0, and makes torch record them.
        root = torch.zeros((), requires_grad=True, device="cpu", dtype=torch.float32)

        def enter(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            call = Call(args, kwargs)
            return call.with_tokens(call.tokens + root.to(call.tokens))

        blocks = [self._model.get_submodule(path) for path in self._architecture.blocks]
        with (
            torch.enable_grad(),
            before_calls(blocks[0], enter),
            hooked(self._layers, taps.forward),
            recomputed(blocks if recompute else ()),
        ):
            totals = scalars()
            return [self._backward(total, root, taps, last) for total, last in _with_last(totals)]

    def _backward(self, total: torch.Tensor, root: torch.Tensor, taps: _Taps, last: bool) -> dict[str, torch.Tensor]:
        """Runs one backward pass, and returns what the taps made of it."""
        taps.start(last)
        reached = total.requires_grad and (
            torch.autograd.grad(total, root, allow_unused=True, retain_graph=not last)[0] is not None
        )
        taps.settle()
        if not reached:
            raise ModelError(f"{type(self._model).__name__}: its output {_DETACHED}")
        taps.check_complete()
        return taps.reduced

    def _find_dimensions(self, example: Inputs) -> dict[str, int]:
        """Returns the dimension of the images in the input of each layer: the one that grows with their number.

        It is usually the first, with the windows or tokens of an image one after the other. Some attention modules put
        the tokens first.
        """
        shapes: dict[str, list[torch.Size]] = {path: [] for path in self._layers}
        with hooked(self._layers, lambda path, call, _: shapes[path].append(call.tokens.shape)):
            for copies in (1, 2):
                images = {name: torch.cat([value] * copies) for name, value in example.items()}
                run(self._model, self._architecture, images)
        found = {}
        for path, (one, two) in shapes.items():
            grown = [dim for dim, (size, larger) in enumerate(zip(one, two, strict=True)) if larger != size]
            if len(grown) != 1 or two[grown[0]] != 2 * one[grown[0]]:
                raise ModelError(
                    f"{type(self._model).__name__}: {path} gets {tuple(one)} for one image and {tuple(two)} for two, "
                    "so the images cannot be separated there. Use another criterion."
                )
            found[path] = grown[0]
        return found

    def _rows(self, path: str, values: torch.Tensor, images: int) -> torch.Tensor:
        """Returns a layer's input, or the gradient at its output, as (images, tokens, features) in float32 or more."""
        first = values.movedim(self._dimensions[path], 0)
        return per_image(first, images).flatten(1, -2).to(precise(values.dtype))


class _Taps:
    """Collects the input of each layer and the gradient at its output, and reduces them as soon as it has both.

    In a block that is recomputed in the backward pass, the gradient may come before the tokens.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rows: Callable[[str, torch.Tensor], torch.Tensor],
        reduce: Reduce,
        recompute: bool,
    ) -> None:
        """Prepares the layers, by path. `rows` reshapes the tensors of a layer to (images, tokens, features)."""
        self.reduced: dict[str, torch.Tensor] = {}
        """What `reduce` made of the gradient of each layer, by path, in the present backward pass."""
        self._layers, self._rows, self._reduce, self._recompute = layers, rows, reduce, recompute
        self._given: dict[str, torch.Tensor] = {}
        self._back: dict[str, torch.Tensor] = {}
        self._calls = dict.fromkeys(layers, 0)
        self._last = True

    def start(self, last: bool) -> None:
        """Prepares for a backward pass. Before the last one, the inputs of the layers are kept for the next."""
        self.reduced, self._last = {}, last

    def forward(self, path: str, call: Call, output: Any) -> None:
        """Collects one call of a layer; this is the hook for `hooked`."""
        self._calls[path] += 1
        if self._calls[path] == 1:
            returned = first_tensor(output)
            if not returned.requires_grad:
                raise ModelError(f"{path}: its output {_DETACHED}")
            returned.register_hook(partial(self._backward, path))  # type: ignore[no-untyped-call]
        if self._calls[path] == 1 + self._recompute:  # later calls are those of `reduce`
            self._given[path] = call.tokens.detach()

    def _backward(self, path: str, gradient: torch.Tensor) -> None:
        self._back[path] = gradient
        self.settle()

    def settle(self) -> None:
        """Reduces the layers whose input and gradient were both collected."""
        for path in self._back.keys() & self._given.keys():
            back, given = self._back.pop(path), self._given.pop(path) if self._last else self._given[path]
            with torch.no_grad(), full_precision(back):
                tokens, gradients = self._rows(path, given), self._rows(path, back)
                self.reduced[path] = self._reduce(path, unwrap(self._layers[path]), tokens, gradients)

    def check_complete(self) -> None:
        """Raises ModelError if there is a layer whose gradient came, and whose input did not."""
        for path in self._back.keys() - self._given.keys():
            raise ModelError(
                f"{path}: its block was not recomputed as far as this layer. Another thread, or the code around this "
                "call, uses torch.utils.checkpoint.set_checkpoint_early_stop. Measure outside of it."
            )


def _squares_of(path: str, layer: nn.Module, tokens: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return _squares(layer, tokens, gradients)


def _squares(layer: nn.Module, tokens: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Returns the squared norm of the gradient of a layer's parameters, image by image: float64 of shape (images,).

    Args:
        layer: a linear layer, quantized or not, or any other module with weights of its own.
        tokens: input of the layer, (images, tokens, inputs).
        gradients: gradient at the output of the layer, (images, tokens, outputs).
    """
    if isinstance(layer, nn.Linear):
        found = _product_squares(tokens, gradients)
        return found if layer.bias is None else found + _sums(gradients.sum(dim=1))
    if type(layer) is nn.LayerNorm and layer.elementwise_affine:
        normalised = F.layer_norm(tokens, layer.normalized_shape, eps=layer.eps)
        found = _sums((normalised * gradients).sum(dim=1))
        return found if layer.bias is None else found + _sums(gradients.sum(dim=1))
    each = gradients_of_rows(layer, tokens, gradients)
    return torch.stack([torch.stack([_square(slope) for slope in slopes]).sum() for slopes in each])


def gradients_of_rows(
    layer: nn.Module, tokens: torch.Tensor, gradients: torch.Tensor
) -> list[tuple[torch.Tensor, ...]]:
    """Returns the gradients of the parameters of any layer, image by image. Arguments are those of `_squares`."""
    own = {name: parameter.detach() for name, parameter in layer.named_parameters(recurse=False)}
    if not all(parameter.is_floating_point() for parameter in own.values()):
        raise ModelError(f"{type(layer).__name__}: its weights are not floating-point numbers, and have no gradient.")
    return [_by_autograd(layer, own, *rows) for rows in zip(tokens, gradients, strict=True)]


def _product_squares(tokens: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Returns ||G^T X||_F^2, image by image, with X of shape (tokens, inputs) and G of shape (tokens, outputs).

    It equals <X X^T, G G^T>, which has one number per pair of tokens. This is less work if there are few tokens.
    """
    images, count, inputs = tokens.shape
    outputs = gradients.shape[-1]
    by_tokens = count * (inputs + outputs) < inputs * outputs
    size = max(1, MOST_ELEMENTS // (count**2 if by_tokens else inputs * outputs))
    found = []
    for start in range(0, images, size):
        given, back = tokens[start : start + size], gradients[start : start + size]
        if by_tokens:
            products = (given @ given.mT).double() * (back @ back.mT)
            found.append(products.sum(dim=(1, 2)).clamp_min(0))
        else:
            found.append(_sums((back.mT @ given).flatten(1)))
    return torch.cat(found)


def _by_autograd(
    layer: nn.Module, parameters: dict[str, torch.Tensor], tokens: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    with torch.enable_grad():
        copies = {name: parameter.to(tokens.dtype).requires_grad_() for name, parameter in parameters.items()}
        output = torch.func.functional_call(layer, copies, (tokens[None],))
        return torch.autograd.grad(output, list(copies.values()), gradient[None].to(output.dtype))


def _sums(values: torch.Tensor) -> torch.Tensor:
    return values.square().sum(dim=1, dtype=torch.float64)


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, each of the blocks keeps only its inputs for the backward pass (activation checkpointing).

    The blocks' modules, and the hooks on them, are called twice, the second time in the backward pass. The whole block
    is called again, including its last layer, whose output torch would not need.
    """
    with ExitStack() as stack:
        stack.enter_context(_recomputed_whole())
        for block in blocks:
            stack.enter_context(_recomputed(block))
        yield


def _recomputed_whole() -> AbstractContextManager[Any]:
    return nullcontext() if _WHOLE else set_checkpoint_early_stop(False)


class Recomputed(ReplacedForward):
    """The forward pass of a block that is recomputed in the backward pass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the block, and recomputes it for its gradient. Calls from other threads are unchanged."""
        if threading.get_ident() != self._thread:
            return self._forward(*args, **kwargs)
        return checkpoint(self._compute, *args, use_reentrant=False, preserve_rng_state=False, **_WHOLE, **kwargs)

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        with working_for(self._thread):  # a backward pass on a GPU runs in its own thread
            return self._forward(*args, **kwargs)


@contextmanager
def _recomputed(block: nn.Module) -> Iterator[None]:
    block.forward = Recomputed(block)
    try:
        yield
    finally:
        put_back_forward(block)
