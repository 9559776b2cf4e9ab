"""KappaTune's criterion: the condition number of the weights, lowest first.

This is the definition in PEFT (`peft.helpers.KappaTuneSelector`): kappa = s_max / (s_min + 1e-8) of the weight of each
linear layer, in float32. It needs no images. The value of attention is the mean over its projections. KappaTune is
defined for linear layers only; here a layer norm counts as the diagonal matrix of its gains.
"""

from __future__ import annotations

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture, matrices
from plasticity_peft.components.calls import Inputs
from plasticity_peft.criteria.criterion import WeightCriterion

EPSILON = 1e-8


class ConditionNumber(WeightCriterion):
    """1 / condition number."""

    name = "condition_number"
    title = "1 / condition number"
    power = -1.0

    def score(self, model: nn.Module, architecture: Architecture, *, image: Inputs, seed: int) -> torch.Tensor:
        """Returns the mean condition number of the weights of each component."""
        kappas = []
        for part in architecture.components:
            kappas.append(torch.stack([_condition_number(weight) for _, weight in matrices(model, part)]).mean())
        return torch.stack(kappas).double().cpu()


def _condition_number(weight: torch.Tensor) -> torch.Tensor:
    values = torch.linalg.svdvals(weight.float()) if weight.ndim > 1 else weight.float().abs()
    return values.max() / (values.min() + EPSILON)
