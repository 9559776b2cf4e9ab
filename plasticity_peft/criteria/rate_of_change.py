"""The paper's measure: how far a component moves its outputs apart, against how far apart its inputs were.

    P(f) = E_(x,y) [ ||f(x) - f(y)||_F / ||x - y||_F ]        (arXiv 2602.06883)

x and y are the token sequences of two images, seen as matrices. A protocol says what the components are fed:

- "embedding", the paper's: every component of every block gets the tokens e that enter block 0. FC2, which takes a
  wider input, gets e padded with zeros. The distance of the inputs is ||e(x) - e(y)||_F for all.
- "activation": every component gets what it receives in the running network, and the distance is that of those inputs.

A pair of identical inputs has no rate of change: it is left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from plasticity_peft.architectures import Architecture
from plasticity_peft.calls import Call, attention_call, block_input, first_tensor, hooked, run
from plasticity_peft.components import KINDS, Component
from plasticity_peft.criteria.criterion import Criterion, Observations
from plasticity_peft.errors import ModelError, NonFiniteError
from plasticity_peft.images import Inputs
from plasticity_peft.pairs import join
from plasticity_peft.probe import Probe


class Distances(NamedTuple):
    """Distances of a batch of pairs, a column a component, float64 of shape (pairs, components)."""

    outputs: torch.Tensor
    """||f(x) - f(y)||_F"""
    inputs: torch.Tensor
    """||x - y||_F"""


def euclidean(pairs: torch.Tensor) -> torch.Tensor:
    """Returns ||x - y||_F of each pair, float64 of shape (pairs,), for a batch that holds all x and then all y."""
    return _norm(_difference(pairs))


Distance = Callable[[torch.Tensor], torch.Tensor]


def embedding_distances(
    model: nn.Module, architecture: Architecture, x: Inputs, y: Inputs, distance: Distance = euclidean
) -> Distances:
    """Returns the distances of the paper's protocol for the images `x` and `y` of some pairs."""
    call = block_input(model, architecture, join(x, y))
    outputs = []
    for number, part in enumerate(architecture.components):
        if part.kind == "MHA":
            # Each block passes its attention what it would pass it in the network: a mask, positions, a bias.
            attend = attention_call(model, architecture, number // len(KINDS), call).with_tokens(call.tokens)
            attention = model.get_submodule(part.path)
            outputs.append(distance(first_tensor(attention(*attend.args, **attend.kwargs))))
        else:
            modules = [model.get_submodule(path) for path in part.modules]
            outputs.append(_together([_output_distance(module, part, call.tokens, distance) for module in modules]))
    return Distances(torch.stack(outputs, dim=1), distance(call.tokens)[:, None].expand(-1, len(outputs)))


def activation_distances(
    model: nn.Module, architecture: Architecture, x: Inputs, y: Inputs, distance: Distance = euclidean
) -> Distances:
    """Returns the distances in the running network for the images `x` and `y` of some pairs."""
    both = join(x, y)
    images = len(next(iter(both.values())))
    outputs: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}

    def reduce(name: str, call: Call, output: Any) -> None:
        inputs[name] = distance(_per_image(call.tokens, images))
        outputs[name] = distance(_per_image(first_tensor(output), images))

    paths = {part.id: (part.path,) if part.kind == "MHA" else part.modules for part in architecture.components}
    with hooked({path: model.get_submodule(path) for found in paths.values() for path in found}, reduce):
        run(model, architecture, both)
    return Distances(
        torch.stack([_together([outputs[path] for path in found]) for found in paths.values()], dim=1),
        torch.stack([inputs[found[0]] for found in paths.values()], dim=1),
    )


def _per_image(tokens: torch.Tensor, images: int) -> torch.Tensor:
    """Returns tokens with one row an image: windowed attention (Swin) takes the windows of an image as a batch."""
    if len(tokens) == images:
        return tokens
    if len(tokens) % images:
        raise ModelError(f"Tokens of shape {tuple(tokens.shape)} cannot be dealt out to {images} images.")
    return tokens.reshape(images, -1, *tokens.shape[1:])


def _together(distances: list[torch.Tensor]) -> torch.Tensor:
    """Returns the distance of what several modules return (a gated FC1 has two), seen as one matrix."""
    return distances[0] if len(distances) == 1 else torch.stack(distances).square().sum(dim=0).sqrt()


PROTOCOLS: dict[str, Callable[..., Distances]] = {
    "embedding": embedding_distances,
    "activation": activation_distances,
}


class RateOfChange(Criterion):
    """The paper's measure."""

    name = "rate_of_change"
    title = "rate of change"
    protocols = True

    def __init__(self, distance: Distance = euclidean) -> None:
        self.distance = distance

    def observe(self, model: nn.Module, architecture: Architecture, probe: Probe) -> Iterator[Observations]:
        """Yields the rate of change of each pair."""
        for x, y in probe.pairs():
            yield ratios(architecture, PROTOCOLS[probe.inputs](model, architecture, x, y, self.distance))


def ratios(architecture: Architecture, distances: Distances) -> Observations:
    """Returns outputs / inputs of the pairs whose inputs differ, and how many others there are.

    Raises:
        NonFiniteError: a distance is NaN or infinite; the message names the component.
    """
    for what, values in zip(("outputs", "inputs"), distances, strict=True):
        columns = (~torch.isfinite(values)).any(dim=0).nonzero().flatten().tolist()
        if columns:
            component = architecture.components[columns[0]]
            raise NonFiniteError(
                f"The {what} of {component.id} ({component.path}) hold NaN or infinity. In half precision this is "
                "often overflow: measure the model in float32 or bfloat16."
            )
    apart = (distances.inputs > 0).all(dim=1)
    return Observations(distances.outputs[apart] / distances.inputs[apart], int((~apart).sum()))


def _output_distance(module: nn.Module, part: Component, tokens: torch.Tensor, distance: Distance) -> torch.Tensor:
    """Returns the distance of f(x) and f(y) of each pair, for the tokens of all x followed by those of all y."""
    if not part.features:
        return distance(module(tokens))
    missing = part.features[0][0] - tokens.shape[-1]
    if type(module) is nn.Linear and distance is euclidean:
        # The bias cancels, and the zeros of the padding meet the last columns: W f(x) - W f(y) = W[:, :d] (x - y).
        weight = module.weight[:, : tokens.shape[-1]]
        return _norm(F.linear(_difference(tokens), weight.to(_precise(weight.dtype))))
    return distance(module(F.pad(tokens, (0, missing))))


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
