"""Scores by the seed alone: what a criterion has to beat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from plasticity_peft.architectures import Architecture
from plasticity_peft.criteria.criterion import Criterion, Observations
from plasticity_peft.probe import Probe


class Random(Criterion):
    """Uniform random numbers between 0 and 1."""

    name = "random"
    title = "random number"
    observed = "weights"

    def observe(self, model: nn.Module, architecture: Architecture, probe: Probe) -> Iterator[Observations]:
        """Yields one number a component, drawn from the seed."""
        scores = np.random.default_rng(probe.seed).random(len(architecture.components))
        yield Observations(torch.from_numpy(scores)[None])
