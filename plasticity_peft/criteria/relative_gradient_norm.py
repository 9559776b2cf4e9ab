"""The norm of the gradient divided by the norm of the weights: the criterion of Auto-RGN.

    E_batch [ ||dL/dw||_2 / ||w||_2 ],   w: all weights and biases of a component

From *Surgical Fine-Tuning Improves Adaptation to Distribution Shifts* (ICLR 2023), which scales the learning rate of
each tensor by it. Here the tensors of a component are taken together. It needs labels.
"""

from __future__ import annotations

import torch
from torch import nn

from plasticity_peft.criteria.gradient_norm import GradientNorm


class RelativeGradientNorm(GradientNorm):
    """Norm of the gradient over norm of the weights."""

    name = "relative_gradient_norm"
    title = "relative gradient norm"

    def scale(self, norms: torch.Tensor, parameters: list[list[nn.Parameter]]) -> torch.Tensor:
        """Returns the norms of the gradients divided by those of the weights."""
        weights = [torch.cat([p.detach().flatten().double() for p in group]).norm() for group in parameters]
        return norms / torch.stack(weights)
