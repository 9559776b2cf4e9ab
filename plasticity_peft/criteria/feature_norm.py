"""PLoP's criterion: how well the weights are aligned with their inputs, lowest first.

The normalized feature norm (NFN) of a linear layer W with inputs z_i is

    mean_i ||W z_i|| / mean_i ||W g_i||,   z_i and the Gaussian g_i scaled to norm 1

as in PLoP's `calculate_nfn_scores` (its division of W by the root mean square of its entries cancels). A low value
means that the layer has not adapted to its input. The value is averaged over batches, over the layers of a component
and over blocks. PLoP is defined for linear layers only; here a layer norm counts as the diagonal matrix of its gains,
and z is the standardized tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from plasticity_peft.components.architecture import Architecture, matrices
from plasticity_peft.components.calls import Call, hooked, run
from plasticity_peft.criteria.criterion import Criterion, Observations
from plasticity_peft.criteria.precision import full_precision
from plasticity_peft.images.sampler import Batches, ImageBatch


class FeatureNorm(Criterion):
    """1 / normalized feature norm."""

    name = "feature_norm"
    title = "1 / feature norm"
    sampler = Batches
    power = -1.0

    def prepare(
        self, model: nn.Module, architecture: Architecture, sampler: Batches
    ) -> Callable[[ImageBatch], Observations]:
        """Returns the function from a batch of images to the normalized feature norm of each component."""
        parts = [matrices(model, part) for part in architecture.components]
        weights = dict(matrix for part in parts for matrix in part)
        numbers = {path: number for number, path in enumerate(weights)}

        def observe(batch: ImageBatch) -> Observations:
            found: dict[str, torch.Tensor] = {}

            def keep(name: str, call: Call, output: Any) -> None:
                # One generator per layer, because the order in which a model calls its projections changes between
                # releases.
                generator = sampler.generator(batch.numbers[0], numbers[name])
                found[name] = feature_norm(weights[name], call.tokens, generator)

            with hooked({path: model.get_submodule(path) for path in weights}, keep):
                run(model, architecture, batch.images)
            values = [torch.stack([found[path] for path, _ in part]).mean() for part in parts]
            return Observations(torch.stack(values)[None])

        return observe


def feature_norm(weight: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns the normalized feature norm of a matrix, or of the diagonal matrix of a vector, for its input tokens.

    Args:
        weight: (outputs, inputs), or (inputs,) for the gains of a norm.
        tokens: (..., inputs).
        generator: generator on the CPU of the Gaussian inputs that the tokens are compared with.
    """
    tokens = tokens.flatten(0, -2).float()
    gaussian = torch.randn(tokens.shape, generator=generator, device="cpu", dtype=torch.float32).to(tokens.device)
    if weight.ndim == 1:
        tokens = F.layer_norm(tokens, tokens.shape[-1:])

    def mean_norm(inputs: torch.Tensor) -> torch.Tensor:
        inputs = F.normalize(inputs, dim=-1)
        with full_precision(inputs):
            outputs = inputs * weight.float() if weight.ndim == 1 else F.linear(inputs, weight.float())
        norms: torch.Tensor = torch.linalg.vector_norm(outputs, dim=-1)
        return norms.double().mean()

    return mean_norm(tokens) / mean_norm(gaussian)
