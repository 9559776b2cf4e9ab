"""Distances between two sequences of tokens, for batches that contain all x of some pairs and then all y."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from plasticity_peft.criteria.precision import precise

Distance = Callable[[torch.Tensor], torch.Tensor]
"""Maps a batch (2 * pairs, ...), all x and then all y, to the distance of each pair: float64 of shape (pairs,)."""


class Distances(NamedTuple):
    """Distances of a batch of pairs, one column per component: float64 of shape (pairs, components)."""

    outputs: torch.Tensor
    """||f(x) - f(y)||_F"""
    inputs: torch.Tensor
    """||x - y||_F"""


def euclidean(pairs: torch.Tensor) -> torch.Tensor:
    """Returns ||x - y||_F of each pair."""
    # cdist sums while it subtracts. It takes half the time of `norm(difference(pairs))`, and it allocates no copy of
    # the tokens for each component; on a CPU such copies fragment the heap and are not returned.
    x, y = (half.reshape(-1, 1, half.shape[-1]) for half in pairs.to(precise(pairs.dtype)).chunk(2))
    tokens = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").reshape(len(pairs) // 2, -1)
    distances: torch.Tensor = tokens.double().norm(dim=1)
    return distances


def difference(pairs: torch.Tensor) -> torch.Tensor:
    """Returns x - y, at least in float32, for a batch that contains all x and then all y."""
    x, y = pairs.to(precise(pairs.dtype)).chunk(2)
    return x - y


def norm(differences: torch.Tensor) -> torch.Tensor:
    """Returns the Frobenius norm of each member of a batch, float64 of shape (pairs,)."""
    # Token by token, because one float32 sum over all tokens of a large model is wrong in the sixth digit.
    tokens = differences.reshape(len(differences), -1, differences.shape[-1])
    norms: torch.Tensor = torch.linalg.vector_norm(tokens, dim=-1).double().norm(dim=1)
    return norms


def together(distances: list[torch.Tensor]) -> torch.Tensor:
    """Returns the distance between the outputs of several modules (a gated FC1 has two), taken as one matrix."""
    return distances[0] if len(distances) == 1 else torch.stack(distances).square().sum(dim=0).sqrt()
