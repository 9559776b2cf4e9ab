"""The base classes of criteria. A criterion scores each component; components with high scores should train.

A criterion is one short file with a subclass of `Criterion`, which looks at images, or of `WeightCriterion`, which
reads only weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.calls import Inputs
from plasticity_peft.images.sampler import Sampler


class Observations(NamedTuple):
    """The observations of one pass."""

    values: torch.Tensor
    """At least 0; float64 of shape (samples, components), the components in the order of the architecture."""
    skipped: int = 0
    """Number of samples that were left out because they have no value."""


class _Named(ABC):
    """The common part of both kinds of criteria.

    The score of a component is mean(observations) ** power. The mean over observations, and over blocks for a kind, is
    taken first: a power of -1 reverses a ranking exactly, and a power of 1/2 turns squares into a norm.
    """

    name: ClassVar[str]
    """The value of `PlasticityConfig(criterion=...)`."""
    title: ClassVar[str]
    """Name of the scores, as the heading of a column."""
    power: ClassVar[float] = 1.0
    protocols: ClassVar[bool] = False
    """True if `inputs` decides what components are fed. Always False for a criterion that reads only weights."""


class Criterion(_Named):
    """A criterion that looks at images.

    The score of a component is mean(observations) ** power. The mean over observations, and over blocks for a kind, is
    taken first.

    Examples:
        >>> import torch
        >>> from plasticity_peft.components.calls import first_tensor, hooked, run
        >>> from plasticity_peft.images.sampler import SingleImages
        >>> class OutputNorm(Criterion):
        ...     name = "output_norm"
        ...     title = "norm of the output"
        ...     sampler = SingleImages
        ...
        ...     def prepare(self, model, architecture, sampler):
        ...         modules = {part.id: model.get_submodule(part.path) for part in architecture.components}
        ...
        ...         def observe(batch):
        ...             norms = {}
        ...             def keep(name, call, output):
        ...                 norms[name] = first_tensor(output).double().flatten(1).norm(dim=1)
        ...             with hooked(modules, keep):
        ...                 run(model, architecture, batch.images)
        ...             return Observations(torch.stack([norms[name] for name in modules], dim=1))
        ...
        ...         return observe
    """

    sampler: ClassVar[type[Sampler]]
    """The sampler: `Pairs`, `SingleImages` or `Batches` of `plasticity_peft.images`. Each sample is observed once."""
    protocols: ClassVar[bool] = False
    """True if the criterion has protocols, which `inputs` selects."""

    @abstractmethod
    def prepare(self, model: nn.Module, architecture: Architecture, sampler: Any) -> Callable[[Any], Observations]:
        """Returns the function that observes a batch. Computations that are needed once per model belong here.

        The model is in evaluation mode and records no gradients. A criterion that needs gradients enables them itself.

        Args:
            model: the model that `architecture` describes.
            architecture: paths of the components, the blocks and the head.
            sampler: an instance of the class attribute `sampler`.

        Returns:
            A function that takes the return value of `sampler.load` for any samples, and returns `Observations`. The
            value of a sample must not depend on the other samples in a pass.
        """


class WeightCriterion(_Named):
    """A criterion that reads only weights. Its scores are exact, and the same in every process."""

    @abstractmethod
    def score(self, model: nn.Module, architecture: Architecture, *, image: Inputs, seed: int) -> torch.Tensor:
        """Returns one number per component, before `power`: float64 of shape (components,).

        Args:
            model: the model that `architecture` describes, in evaluation mode.
            architecture: paths of the components, the blocks and the head.
            image: a blank image of the size that the model is run with: tensors of shape (1, ...).
            seed: seed of random numbers.
        """


AnyCriterion = Criterion | WeightCriterion
