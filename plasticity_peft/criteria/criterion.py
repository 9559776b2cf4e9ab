"""What every criterion has in common: it looks at a model and a probe, and gives a number per component.

A criterion is one short file with a subclass of `Criterion`, and one line in `criteria/__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.images.sampler import Probe


class Observations(NamedTuple):
    """What a criterion saw in one pass, a column a component in the order of the architecture."""

    values: torch.Tensor
    """float64 of shape (observations, components), at least 0."""
    skipped: int = 0
    """Pairs that were left out because they have no value."""


class Criterion(ABC):
    """A rule that scores the components of a model: the higher, the rather a component should train.

    The score is mean(observations) ** power. The mean over observations, and over blocks for a kind, is taken first;
    so a power of -1 turns a ranking round exactly, and a power of 1/2 turns squares into a norm.
    """

    name: ClassVar[str]
    """What `PlasticityConfig(criterion=...)` calls it."""
    title: ClassVar[str]
    """What the scores are, for the head of a column."""
    observed: ClassVar[str] = "pairs"
    """What one observation is of: "pairs", "images", "batches" of images, or "weights" where no image is looked at."""
    protocols: ClassVar[bool] = False
    """True where `inputs` decides what components are fed."""
    power: ClassVar[float] = 1.0

    @abstractmethod
    def prepare(self, model: nn.Module, architecture: Architecture, probe: Probe) -> Callable[[Any], Observations]:
        """Returns the function that looks at a batch, with what is computed once a model behind it.

        It takes what the probe gives for `observed`: a `PairBatch` or an `ImageBatch` of any number of pairs or
        images, whose values must not depend on which others are in the batch; for "batches" an `ImageBatch` that makes
        one row; for "weights" None, and it returns one row, the same in every process. The model is in evaluation mode
        and records no gradients; a criterion that needs them turns them on for itself.
        """
