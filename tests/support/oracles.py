"""The paper's two protocols and its measure from their definitions: with torch's hooks, image by image.

Of the package under test these use where the components are, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture, find_architecture
from plasticity_peft.components.component import Component

Inputs = Mapping[str, torch.Tensor]
"""What a model takes for some images."""
Distance = Callable[[torch.Tensor, torch.Tensor], float]


class Sides(NamedTuple):
    """What a component gets, x, and what it makes of it, f(x)."""

    x: torch.Tensor
    fx: torch.Tensor


class Called(NamedTuple):
    """One call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def tokens(self) -> torch.Tensor:
        """What the module maps."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def with_tokens(self, module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Returns what the module makes of other tokens, called as it was."""
        if self.args:
            return tensor(module(tokens, *self.args[1:], **self.kwargs))
        return tensor(module(**{**self.kwargs, "hidden_states": tokens}))


def tensor(value: Any) -> torch.Tensor:
    """Returns the tokens in what a module returned."""
    return value[0] if isinstance(value, tuple) else value


def layers(component: Component) -> tuple[str, ...]:
    """Returns the modules whose outputs together are the component's: a gated FC1 has two."""
    return (component.path,) if component.kind == "MHA" else component.modules


@contextmanager
def watching(model: nn.Module, paths: tuple[str, ...]) -> Iterator[dict[str, Called]]:
    """Collects how modules are called inside."""
    seen: dict[str, Called] = {}

    def hook(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: seen.update({path: Called(args, kwargs, output)})

    with ExitStack() as stack:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True)
            stack.callback(handle.remove)
        yield seen


def tokens_of(model: nn.Module, architecture: Architecture, image: Inputs) -> torch.Tensor:
    """Returns the tokens that enter the first block."""
    with torch.no_grad(), watching(model, architecture.blocks[:1]) as seen:
        model(**image)
    return seen[architecture.blocks[0]].tokens


@contextmanager
def entering(model: nn.Module, architecture: Architecture, tokens: torch.Tensor | None) -> Iterator[None]:
    """Inside, these tokens enter the first block, whatever the images are."""
    with ExitStack() as stack:
        if tokens is not None:

            def replace(_: nn.Module, args: Any, kwargs: Any) -> Any:
                return ((tokens, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": tokens})

            block = model.get_submodule(architecture.blocks[0])
            stack.callback(block.register_forward_pre_hook(replace, with_kwargs=True).remove)
        yield


def activation(
    model: nn.Module, architecture: Architecture, image: Inputs, tokens: torch.Tensor | None = None
) -> list[Sides]:
    """Returns what each component gets and makes of it in the running network.

    Args:
        model: the model, in evaluation mode.
        architecture: where its components are.
        image: what it takes for one image.
        tokens: what enters the first block, if not what the image makes.
    """
    paths = tuple(path for component in architecture.components for path in layers(component))
    with torch.no_grad(), entering(model, architecture, tokens), watching(model, paths) as seen:
        model(**image)
    return [
        Sides(seen[own[0]].tokens, _flat([tensor(seen[path].output) for path in own]))
        for own in map(layers, architecture.components)
    ]


def embedding(
    model: nn.Module, architecture: Architecture, image: Inputs, tokens: torch.Tensor | None = None
) -> list[Sides]:
    """Returns what each component makes of the tokens that enter the first block, padded with zeros where it is wide.

    Args:
        model: the model, in evaluation mode.
        architecture: where its components are.
        image: what it takes for one image.
        tokens: what enters the first block, if not what the image makes.
    """
    paths = tuple(path for component in architecture.components for path in layers(component))
    found = []
    with torch.no_grad():
        with watching(model, (*paths, architecture.blocks[0])) as seen:
            model(**image)
        x = seen[architecture.blocks[0]].tokens if tokens is None else tokens
        for own in map(layers, architecture.components):
            wide = torch.zeros(*x.shape[:-1], seen[own[0]].tokens.shape[-1], dtype=x.dtype)
            wide[..., : x.shape[-1]] = x
            outputs = [seen[path].with_tokens(model.get_submodule(path), wide) for path in own]
            found.append(Sides(x, _flat(outputs)))
    return found


PROTOCOLS = {"embedding": embedding, "activation": activation}


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([one.flatten() for one in tensors])


def frobenius(x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns ||x - y||_F."""
    return float((x - y).double().norm())


def change(one: list[Sides], other: list[Sides], distance: Distance = frobenius) -> np.ndarray:
    """Returns d(f(x), f(y)) / d(x, y) of each component."""
    return np.array([distance(a.fx, b.fx) / distance(a.x, b.x) for a, b in zip(one, other, strict=True)])


def rates(model: nn.Module, protocol: str, x: Inputs, y: Inputs, distance: Distance = frobenius) -> np.ndarray:
    """Returns the rates of change of pairs of images: shape (pairs, components)."""
    architecture, sides = find_architecture(model), PROTOCOLS[protocol]
    one, other = ([sides(model, architecture, image) for image in each_image(batch)] for batch in (x, y))
    return np.stack([change(*pair, distance) for pair in zip(one, other, strict=True)])


def each_image(inputs: Inputs) -> Iterator[Inputs]:
    """Yields the images of a batch as batches of one."""
    for number in range(len(next(iter(inputs.values())))):
        yield {name: values[number : number + 1] for name, values in inputs.items()}
