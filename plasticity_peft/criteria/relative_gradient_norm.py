"""The norm of the gradient divided by the norm of the weights: the criterion of Auto-RGN.

    E_batch [ ||dL/dw||_2 / ||w||_2 ],   w: all weights and biases of a component

From *Surgical Fine-Tuning Improves Adaptation to Distribution Shifts* (ICLR 2023), which scales the learning rate of
each tensor by it. Here the tensors of a component are taken together. It needs labels.
"""

from __future__ import annotations

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture, matrices, weights_of
from plasticity_peft.components.component import Component
from plasticity_peft.criteria.gradient_norm import GradientNorm


class RelativeGradientNorm(GradientNorm):
    """Norm of the gradient over norm of the weights."""

    name = "relative_gradient_norm"
    title = "relative gradient norm"

    def divisors(self, model: nn.Module, architecture: Architecture) -> torch.Tensor:
        """Returns the norm of the weights of each component."""
        return torch.stack([_norm(model, part) for part in architecture.components])


def _norm(model: nn.Module, part: Component) -> torch.Tensor:
    """Returns the norm of all weights and biases of a component: float64."""
    weights = [weight for _, weight in matrices(model, part)]
    modules = weights_of(model, part)
    biases = [p for module in modules for name, p in module.named_parameters(recurse=False) if name != "weight"]
    values = torch.cat([each.detach().flatten().double() for each in (*weights, *biases)])
    norm: torch.Tensor = torch.linalg.vector_norm(values)
    return norm.cpu()
