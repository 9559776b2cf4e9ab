"""How far apart two sequences of tokens are, for batches that hold all x of some pairs and then all y."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from plasticity_peft.criteria.precision import precise

Distance = Callable[[torch.Tensor], torch.Tensor]
"""Maps a batch (2 * pairs, ...), all x and then all y, to the distance of each pair: float64 of shape (pairs,)."""


class Distances(NamedTuple):
    """Distances of a batch of pairs, a column a component, float64 of shape (pairs, components)."""

    outputs: torch.Tensor
    """||f(x) - f(y)||_F"""
    inputs: torch.Tensor
    """||x - y||_F"""


def euclidean(pairs: torch.Tensor) -> torch.Tensor:
    """Returns ||x - y||_F of each pair."""
    # cdist sums while it subtracts: half the time of `norm(difference(pairs))`, and nothing as large as the tokens is
    # allocated for each component, which on a CPU would scatter over the heap and stay there.
    x, y = (half.reshape(-1, 1, half.shape[-1]) for half in pairs.to(precise(pairs.dtype)).chunk(2))
    tokens = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").reshape(len(pairs) // 2, -1)
    distances: torch.Tensor = tokens.double().norm(dim=1)
    return distances


def difference(pairs: torch.Tensor) -> torch.Tensor:
    """Returns x - y, at least in float32, for a batch that holds all x and then all y."""
    x, y = pairs.to(precise(pairs.dtype)).chunk(2)
    return x - y


def norm(differences: torch.Tensor) -> torch.Tensor:
    """Returns the Frobenius norm of each member of a batch, float64 of shape (pairs,)."""
    # Token by token: one float32 sum over the whole of a large model's tokens is off in the sixth digit.
    tokens = differences.reshape(len(differences), -1, differences.shape[-1])
    norms: torch.Tensor = torch.linalg.vector_norm(tokens, dim=-1).double().norm(dim=1)
    return norms


def together(distances: list[torch.Tensor]) -> torch.Tensor:
    """Returns the distance of what several modules return (a gated FC1 has two), seen as one matrix."""
    return distances[0] if len(distances) == 1 else torch.stack(distances).square().sum(dim=0).sqrt()
