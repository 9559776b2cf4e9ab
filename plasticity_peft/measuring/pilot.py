"""Short runs of everything, for what gradients at the pretrained weights do not show.

A copy of the model trains for a few steps on one half of the images. On the other half, a head is fitted in closed
form to the features before and after. The difference of their leave-one-out accuracies is a gain that finetuning
reaches almost at once, so it is a lower bound of the gain of everything. If it is larger than gradients promise, a
longer run shows more of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.calls import run
from plasticity_peft.errors import ModelError
from plasticity_peft.images.sampler import SingleImages
from plasticity_peft.measuring.head import FittedHead, linear_at, received, solve
from plasticity_peft.measuring.passes import Passes
from plasticity_peft.measuring.processes import Share
from plasticity_peft.measuring.rates import groups_in_full
from plasticity_peft.measuring.ridge import Ridge, Sums
from plasticity_peft.report.forecast import PilotRun

STEPS = 16
"""Number of steps of a short run."""
BATCH_SIZE = 32
WARM_UP = 0.1
"""Share of the steps in which the rates rise, as in a training run. They fall as half a cosine after that."""
LARGEST_NORM = 1.0
"""The norm to which larger gradients are scaled."""
CLASSES = "single_label_classification"
WITHOUT_RUNS = "pilot=False for a forecast, or a number as rate_factor, which leave short runs out"


def check_classes(model: nn.Module, problem: str, needed: str, instead: str) -> None:
    """Raises ModelError if the problem type is not that of one class per image.

    Args:
        model: the model whose type the message names.
        problem: its problem type.
        needed: says what needs one class per image.
        instead: says what to do then.
    """
    if problem != CLASSES:
        raise ModelError(f"{type(model).__name__}: {needed}. Its problem type is {problem!r}. {instead}")


def passes_of_short_run(sampler: SingleImages) -> Passes[SingleImages]:
    """Returns passes that say how to do without short runs, if memory does not suffice for one image."""
    return Passes(sampler, "the short run", "to train everything for a few steps", WITHOUT_RUNS)


def scheduled(number: int, steps: int) -> float:
    """Returns the learning rate of a step as a share of its peak: a linear warm-up, then a cosine.

    Examples:
        >>> [round(scheduled(number, 20), 2) for number in (0, 1, 2, 11, 19)]
        [0.5, 1.0, 1.0, 0.5, 0.01]
    """
    warm = max(1, round(WARM_UP * steps))
    if number < warm:
        return (number + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (number - warm) / (steps - warm)))


@dataclass(frozen=True, eq=False)
class Pilot:
    """A run that is to be made."""

    model: nn.Module
    """It is copied, and stays as it is."""
    architecture: Architecture
    sampler: SingleImages
    path: str
    """Path of the head's linear layer."""
    rates: Mapping[str, float]
    """Learning rates of "head", "matrix" and "vector"."""
    steps: int = STEPS

    def run(self, features: np.ndarray, targets: np.ndarray) -> PilotRun | None:
        """Trains, and returns the gain on the second half of the images; None if training diverged.

        Args:
            features: what the head receives for each image before training, in the order of the sampler: float32 of
                shape (n, features).
            targets: -1 and 1 for each class: float32 of shape (n, classes).
        """
        half = len(features) // 2
        model = copy.deepcopy(self.model).requires_grad_(False)
        self._set_head(model, features[:half], targets[:half])
        passes = passes_of_short_run(self.sampler)
        with torch.enable_grad():
            self._train(model, half, passes)
        after = np.empty_like(features)
        for batch, found in received(self.path, model, self.architecture, passes, range(half, len(features))):
            after[list(batch.numbers)] = found
        after = after[half:]
        if not np.isfinite(after).all():
            return None
        differences = _right(after, targets[half:]) - _right(features[half:], targets[half:])
        return PilotRun(
            steps=self.steps,
            gain=float(differences.mean()),
            gain_error=float(np.std(differences) / len(differences) ** 0.5),
        )

    def _set_head(self, model: nn.Module, features: np.ndarray, targets: np.ndarray) -> None:
        """Fits the head of the copy to the images that it trains on."""
        sums = Sums.of(features, targets)
        fit = solve(sums, features, targets, None, Share(0, 1), CLASSES)
        weights, biases = Ridge(sums).weights(fit.penalty)
        FittedHead(linear_at(model, self.path), weights * fit.temperature, biases * fit.temperature, fit).set()

    def _train(self, model: nn.Module, count: int, passes: Passes[SingleImages]) -> None:
        """Trains the components and the head of the copy on the first `count` images.

        The images of a step go through the model in one pass or in several.
        """
        groups: dict[str, list[nn.Parameter]] = {"head": list(linear_at(model, self.path).parameters())}
        for own in groups_in_full(model, self.architecture.components).values():
            for name, group in own.items():
                groups.setdefault(name, []).extend(parameter for _, parameter in group.parameters)
        trained = [parameter.requires_grad_(True) for group in groups.values() for parameter in group]
        optimizer = torch.optim.AdamW(
            [{"params": group, "lr": self.rates[name]} for name, group in groups.items()], weight_decay=0.0
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(scheduled, steps=self.steps))
        for numbers in islice(cycle(_batches(count)), self.steps):
            optimizer.zero_grad()
            for few, gradient in passes.results(numbers, partial(self._gradient, model, trained)):
                _add(trained, gradient, len(few) / len(numbers))
            torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
            optimizer.step()
            schedule.step()

    def _gradient(
        self, model: nn.Module, trained: Sequence[torch.Tensor], numbers: Sequence[int]
    ) -> list[torch.Tensor | None]:
        """Returns the gradient of the mean loss of some images; None for what it does not depend on."""
        batch = self.sampler.load(numbers)
        output = run(model, self.architecture, batch.images)
        logits = getattr(output, "logits", output)
        loss = F.cross_entropy(logits.float(), self.sampler.labels(batch).to(logits.device))
        return list(torch.autograd.grad(loss, trained, allow_unused=True))


def _add(parameters: Sequence[torch.Tensor], gradient: list[torch.Tensor | None], share: float) -> None:
    """Adds a gradient, times a share, to that of the parameters. Empties the list, so that there are not both of them.

    A product is a tensor of its own. The gradients of two parameters may be one tensor, which clipping would scale
    twice.
    """
    for parameter in reversed(parameters):
        found = gradient.pop()
        if found is not None:
            more = found * share
            parameter.grad = more if parameter.grad is None else parameter.grad + more


def _batches(count: int) -> list[range]:
    """Returns the numbers from 0 on in batches; what is left over is the last one."""
    return [range(count)[start : start + BATCH_SIZE] for start in range(0, count, BATCH_SIZE)]


def _right(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns 1 for each image whose class a head predicts that is fitted to the others, else 0."""
    sums = Sums.of(features, targets)
    penalty = solve(sums, features, targets, None, Share(0, 1), CLASSES).penalty
    predicted = Ridge(sums).left_out(features, targets, penalty)
    return np.asarray((predicted.argmax(axis=1) == targets.argmax(axis=1)).astype(np.float64))
