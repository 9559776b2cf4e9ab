"""Gradients by the components' parameters, without touching `.grad` or leaving `requires_grad` changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from plasticity_peft.architectures import Architecture, weights_of
from plasticity_peft.errors import ModelError


@contextmanager
def differentiable(model: nn.Module, architecture: Architecture) -> Iterator[list[list[nn.Parameter]]]:
    """Inside, gradients are recorded, and the weights and biases of all components take part.

    Yields the parameters of each component, in the order of the architecture. Afterwards every parameter requires
    gradients as it did before.

    Raises:
        ModelError: the weights of a component are no floating-point numbers, as when they are quantised.
    """
    parameters = []
    for part in architecture.components:
        own = [p for module in weights_of(model, part) for p in module.parameters(recurse=False)]
        if not all(parameter.is_floating_point() for parameter in own):
            raise ModelError(
                f"{part.id}: its weights are {own[0].dtype}, which have no gradient. Use a criterion that needs none, "
                "such as 'rate_of_change'."
            )
        parameters.append(own)
    before = [(parameter, parameter.requires_grad) for own in parameters for parameter in own]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield parameters
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def squared_norms(scalar: torch.Tensor, parameters: Sequence[Sequence[nn.Parameter]]) -> torch.Tensor:
    """Returns the squared norm of the gradient of `scalar` by each group of parameters: float64 of shape (groups,)."""
    flat = [parameter for group in parameters for parameter in group]
    gradients = iter(torch.autograd.grad(scalar, flat, allow_unused=True, materialize_grads=True))
    return torch.stack([torch.stack([_square(next(gradients)) for _ in group]).sum() for group in parameters])


def _square(gradient: torch.Tensor) -> torch.Tensor:
    precise = torch.promote_types(gradient.dtype, torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(gradient, dtype=precise)
    return norm.double() ** 2
