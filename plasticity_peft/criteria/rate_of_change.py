"""The paper's measure: how far apart the outputs of a component are, relative to how far apart its inputs are.

    P(f) = E_(x,y) [ ||f(x) - f(y)||_F / ||x - y||_F ]        (arXiv 2602.06883)

x and y are the token sequences of two images, as matrices. The protocol decides what the components are fed. With
"embedding", the paper's protocol, all components get the tokens that enter block 0 (`protocols/embedding.py`). With
"activation", each component gets its own input in the running network (`protocols/activation.py`).

A pair of identical inputs has no rate of change. It is skipped and counted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.calls import Inputs
from plasticity_peft.criteria.criterion import Criterion, Observations
from plasticity_peft.criteria.protocols.activation import ActivationProtocol
from plasticity_peft.criteria.protocols.distances import Distance, Distances, euclidean
from plasticity_peft.criteria.protocols.embedding import EmbeddingProtocol
from plasticity_peft.errors import NonFiniteError
from plasticity_peft.images.sampler import PairBatch, Pairs, Sampler

_PROTOCOLS: dict[str, Callable[..., Callable[[Inputs], Distances]]] = {
    "embedding": EmbeddingProtocol,
    "activation": ActivationProtocol,
}


def protocol_of(sampler: Sampler) -> Callable[..., Callable[[Inputs], Distances]]:
    """Returns the class of the protocol of this measurement."""
    return _PROTOCOLS[sampler.inputs or "embedding"]


class RateOfChange(Criterion):
    """The paper's measure."""

    name = "rate_of_change"
    title = "rate of change"
    sampler = Pairs
    protocols = True

    def __init__(self, distance: Distance = euclidean) -> None:
        self.distance = distance

    def prepare(
        self, model: nn.Module, architecture: Architecture, sampler: Pairs
    ) -> Callable[[PairBatch], Observations]:
        """Returns the function from pairs to their rates of change."""
        distances = protocol_of(sampler)(model, architecture, self.distance)
        return lambda batch: ratios(architecture, distances(batch.both))


def ratios(architecture: Architecture, distances: Distances) -> Observations:
    """Returns outputs / inputs of the pairs whose inputs differ, and the number of the other pairs.

    Raises:
        NonFiniteError: a distance is NaN or infinite; the message names the component.
    """
    for what, values in zip(("outputs", "inputs"), distances, strict=True):
        columns = (~torch.isfinite(values)).any(dim=0).nonzero().flatten().tolist()
        if columns:
            component = architecture.components[columns[0]]
            raise NonFiniteError(
                f"The {what} of {component.id} ({component.path}) contain NaN or infinity. In half precision this is "
                "often overflow: measure the model in float32 or bfloat16."
            )
    apart = (distances.inputs > 0).all(dim=1)
    return Observations(distances.outputs[apart] / distances.inputs[apart], int((~apart).sum()))
