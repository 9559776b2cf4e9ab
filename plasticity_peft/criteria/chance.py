"""Random scores, which depend only on the seed. Every other criterion has to beat them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.calls import Inputs
from plasticity_peft.criteria.criterion import WeightCriterion


class Random(WeightCriterion):
    """Uniform random numbers between 0 and 1."""

    name = "random"
    title = "random number"

    def score(self, model: nn.Module, architecture: Architecture, *, image: Inputs, seed: int) -> torch.Tensor:
        """Returns one number per component, drawn from the seed."""
        return torch.from_numpy(np.random.default_rng(seed).random(len(architecture.components)))
