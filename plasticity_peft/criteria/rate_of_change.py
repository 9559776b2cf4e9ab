"""The paper's measure: how far a component moves its outputs apart, against how far apart its inputs were.

    P(f) = E_(x,y) [ ||f(x) - f(y)||_F / ||x - y||_F ]        (arXiv 2602.06883)

x and y are the token sequences of two images, seen as matrices. A protocol says what the components are fed:

- "embedding", the paper's: every component of every block gets the tokens e that enter block 0. FC2, which takes a
  wider input, gets e padded with zeros. The distance of the inputs is ||e(x) - e(y)||_F for all.
- "activation": every component gets what it receives in the running network, and the distance is that of those inputs.

Both return distances, not ratios: the caller decides what becomes of a pair without a distance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from plasticity_peft.architectures import Architecture
from plasticity_peft.calls import Call, block_input, first_tensor, hooked, run
from plasticity_peft.components import Component
from plasticity_peft.errors import ModelError


class Distances(NamedTuple):
    """Distances of a batch of pairs, a column a component, float64 of shape (pairs, components)."""

    outputs: torch.Tensor
    """||f(x) - f(y)||_F"""
    inputs: torch.Tensor
    """||x - y||_F"""


Protocol = Callable[[nn.Module, Architecture, torch.Tensor, torch.Tensor], Distances]


def embedding_distances(model: nn.Module, architecture: Architecture, x: torch.Tensor, y: torch.Tensor) -> Distances:
    """Returns the distances of the paper's protocol for images `x` and `y`, each (pairs, channels, height, width)."""
    tokens, attention_call = block_input(model, architecture, torch.cat([x, y]))
    outputs = [
        _norm(_output_difference(model, component, tokens, attention_call)) for component in architecture.components
    ]
    inputs = _norm(_difference(tokens))
    return Distances(torch.stack(outputs, dim=1), inputs[:, None].expand(-1, len(outputs)))


def activation_distances(model: nn.Module, architecture: Architecture, x: torch.Tensor, y: torch.Tensor) -> Distances:
    """Returns the distances in the running network for images `x` and `y`, each (pairs, channels, height, width)."""
    outputs: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}

    def reduce(name: str, call: Call, output: Any) -> None:
        inputs[name] = _norm(_difference(call.tokens))
        outputs[name] = _norm(_difference(first_tensor(output)))

    with hooked({part.id: model.get_submodule(part.path) for part in architecture.components}, reduce):
        run(model, torch.cat([x, y]))
    order = [part.id for part in architecture.components]
    return Distances(*(torch.stack([found[name] for name in order], dim=1) for found in (outputs, inputs)))


PROTOCOLS: dict[str, Protocol] = {
    "embedding": embedding_distances,
    "activation": activation_distances,
}


def _output_difference(
    model: nn.Module, component: Component, tokens: torch.Tensor, attention_call: Call
) -> torch.Tensor:
    """Returns f(x) - f(y) of shape (pairs, tokens, features), for the tokens of all x followed by those of all y."""
    module = model.get_submodule(component.path)
    if component.kind == "MHA":
        call = attention_call.with_tokens(tokens)
        return _difference(first_tensor(module(*call.args, **call.kwargs)))
    if not component.features:
        return _difference(module(tokens))
    missing = component.features[0][0] - tokens.shape[-1]
    if missing < 0:
        raise ModelError(
            f"{component.id} takes {component.features[0][0]} features, fewer than the {tokens.shape[-1]} of a token: "
            'inputs="embedding" is not defined for it. Use inputs="activation".'
        )
    if type(module) is nn.Linear:
        # The bias cancels, and the zeros of the padding meet the last columns: W f(x) - W f(y) = W[:, :d] (x - y).
        weight = module.weight[:, : tokens.shape[-1]]
        return F.linear(_difference(tokens), weight.to(_precise(weight.dtype)))
    return _difference(module(F.pad(tokens, (0, missing))))


def _difference(pairs: torch.Tensor) -> torch.Tensor:
    """Returns x - y, at least in float32, for a batch that holds all x and then all y."""
    x, y = pairs.to(_precise(pairs.dtype)).chunk(2)
    return x - y


def _norm(difference: torch.Tensor) -> torch.Tensor:
    """Returns the Frobenius norm of each member of a batch, float64 of shape (pairs,)."""
    norms: torch.Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    return norms.double()


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
