"""Training runs that go on at once: their parameters are stacked, and `torch.func.vmap` maps each step over them.

The recipe is that of the Trainer: AdamW without weight decay, a linear warm-up in the first tenth of the steps, a
cosine schedule, and gradients whose norm is clipped to 1. A small model leaves most of a GPU idle; several runs of it
take hardly longer than one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

BATCH_SIZE = 32
EVALUATED = 100
"""Number of images in one pass of the evaluation."""


class Part(NamedTuple):
    """Images of one split, on the device of the model."""

    images: torch.Tensor
    """Pixel values, (images, channels, height, width)."""
    labels: torch.Tensor
    """Whole numbers, (images,)."""


class StackedRuns:
    """Copies of a model that train at once, each at its own rates."""

    def __init__(self, models: Sequence[nn.Module], rates: Sequence[Mapping[str, float]]) -> None:
        """Takes a model for each run, and its rates by the names of the parameters that train.

        The models differ in these parameters only, are in evaluation mode, and use eager attention, which vmap can
        batch. They stay as they are.
        """
        self.model, self.count = models[0], len(models)
        self.names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        by_run = [dict(model.named_parameters()) for model in models]
        self.values = {name: torch.stack([own[name].detach() for own in by_run]) for name in self.names}
        self.rates = {name: self._column(name, [own[name] for own in rates]) for name in self.names}
        self.first = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.values.items()}

    def _column(self, name: str, numbers: Sequence[float]) -> torch.Tensor:
        """Returns a number for each run, in a shape that is multiplied with the values of a parameter."""
        values = self.values[name]
        return torch.tensor(numbers, device=values.device, dtype=values.dtype).reshape(-1, *[1] * (values.ndim - 1))

    def logits(self, values: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        """Returns the logits of one run."""
        return functional_call(self.model, values, kwargs={"pixel_values": images}).logits

    def step(self, number: int, steps: int, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Trains one step, and returns the norm of the gradient of each run, before it is clipped.

        Args:
            number: number of the step, from 0.
            steps: number of all steps.
            images: a batch for each run, (runs, batch, channels, height, width).
            labels: (runs, batch).
        """

        def loss(values: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.logits(values, images), labels)

        gradients, _ = vmap(grad_and_value(loss))(self.values, images, labels)
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
        clip = (1 / (norms + 1e-6)).clamp_max(1)
        schedule = scheduled(number, steps)
        for name, gradient in gradients.items():
            # A run that diverged stays where it is, and does not stop the others.
            clipped = torch.nan_to_num(gradient * clip.reshape(self.rates[name].shape))
            self.first[name].lerp_(clipped, 0.1)
            self.second[name].mul_(0.999).addcmul_(clipped, clipped, value=0.001)
            scale = (self.second[name] / (1 - 0.999 ** (number + 1))).sqrt_().add_(1e-8)
            self.values[name] -= schedule * self.rates[name] * self.first[name] / (1 - 0.9 ** (number + 1)) / scale
        return norms

    @torch.no_grad()
    def accuracies(self, part: Part) -> list[float]:
        """Returns the share of right answers of each run."""
        run = vmap(self.logits, in_dims=(0, None))
        batches = part.images.split(EVALUATED)
        answers = torch.cat([run(self.values, batch).argmax(dim=-1) for batch in batches], dim=1)
        return (answers == part.labels).double().mean(dim=1).tolist()


def scheduled(number: int, steps: int) -> float:
    """Returns the learning rate of a step as a share of its peak."""
    warm = max(1, round(0.1 * steps))
    if number < warm:
        return (number + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (number - warm) / (steps - warm)))


class Order:
    """The order in which the runs see the images: each seed has its own, drawn anew in each epoch."""

    def __init__(self, images: int, seeds: Sequence[int]) -> None:
        """Takes the number of images, and the seed of each run; runs of one seed see the same batches."""
        self.images, self.seeds, self.per_epoch = images, list(seeds), images // BATCH_SIZE
        self._generators = {seed: torch.Generator().manual_seed(seed) for seed in self.seeds}
        self._drawn: dict[int, torch.Tensor] = {}

    def batch(self, number: int) -> torch.Tensor:
        """Returns the numbers of the images of a step, (runs, batch). Steps are asked for in turn, from 0."""
        place = number % self.per_epoch
        if place == 0:
            self._drawn = {seed: torch.randperm(self.images, generator=g) for seed, g in self._generators.items()}
        rows = slice(place * BATCH_SIZE, (place + 1) * BATCH_SIZE)
        return torch.stack([self._drawn[seed][rows] for seed in self.seeds])
