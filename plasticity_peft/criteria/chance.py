"""Scores by the seed alone: what a criterion has to beat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.criteria.criterion import Criterion, Observations
from plasticity_peft.images.sampler import Probe


class Random(Criterion):
    """Uniform random numbers between 0 and 1."""

    name = "random"
    title = "random number"
    observed = "weights"

    def prepare(self, model: nn.Module, architecture: Architecture, probe: Probe) -> Callable[[None], Observations]:
        """Returns the function that gives one number a component, drawn from the seed."""
        scores = np.random.default_rng(probe.seed).random(len(architecture.components))
        found = Observations(torch.from_numpy(scores)[None])
        return lambda _: found
