"""A rate of change without scale: relative change of the output per relative change of the input.

    E_(x,y) [ d(f(x), f(y)) / d(x, y) ],   d(x, y) = ||x - y||_F / ((||x||_F + ||y||_F) / 2)

It does not depend on the size of the tokens or on the size of a component's weights. The rate of change of a layer
norm is its gain divided by the spread of its input, so models with small tokens rank their norms first. Here a norm
scores near 1.
"""

from __future__ import annotations

import torch

from plasticity_peft.criteria.precision import precise
from plasticity_peft.criteria.protocols.distances import euclidean
from plasticity_peft.criteria.rate_of_change import RateOfChange


def relative(pairs: torch.Tensor) -> torch.Tensor:
    """Returns d(x, y) of each pair, float64 of shape (pairs,), for a batch that contains all x and then all y."""
    tokens = pairs.flatten(1).to(precise(pairs.dtype))
    x, y = torch.linalg.vector_norm(tokens, dim=1).double().chunk(2)
    distances: torch.Tensor = 2 * euclidean(pairs) / (x + y).clamp_min(torch.finfo(torch.float64).tiny)
    return distances


class RelativeRateOfChange(RateOfChange):
    """Rate of change of relative distances."""

    name = "relative_rate_of_change"
    title = "relative rate of change"

    def __init__(self) -> None:
        super().__init__(relative)
