"""A rate of change without scale: relative change of the output per relative change of the input.

    E_(x,y) [ d(f(x), f(y)) / d(x, y) ],   d(x, y) = ||x - y||_F / ((||x||_F + ||y||_F) / 2)

Neither the size of the tokens nor the size of a component's weights enters. The rate of change of a layer norm is its
gain over the spread of its input, so that models with small tokens rank their norms first; here a norm scores near 1.
"""

from __future__ import annotations

import torch

from plasticity_peft.criteria.precision import precise
from plasticity_peft.criteria.protocols.distances import euclidean
from plasticity_peft.criteria.rate_of_change import RateOfChange


def relative(pairs: torch.Tensor) -> torch.Tensor:
    """Returns d(x, y) of each pair, float64 of shape (pairs,), for a batch that holds all x and then all y."""
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
