"""The norm of the gradient of the loss: what reacts most to the labels.

    E_batch [ ||dL/dw||_2 ],   w: all weights and biases of a component

The usual rule of thumb, with the model's own loss and its head as it is. It needs labels, and with a fresh head it
judges by a head that knows nothing yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.calls import Inputs, run
from plasticity_peft.criteria.criterion import Criterion, Observations
from plasticity_peft.criteria.gradients import differentiable, squared_norms
from plasticity_peft.errors import DataError, ModelError
from plasticity_peft.images.sampler import Batches, ImageBatch


class GradientNorm(Criterion):
    """Norm of the gradient of the mean loss of a batch. It depends on the size of the batch, which reports contain."""

    name = "gradient_norm"
    title = "gradient norm"
    sampler = Batches

    def prepare(
        self, model: nn.Module, architecture: Architecture, sampler: Batches
    ) -> Callable[[ImageBatch], Observations]:
        """Returns the function from a batch to the norm of the gradient of its mean loss."""
        if not architecture.heads:
            raise ModelError(
                f"{type(model).__name__} has no head, and criterion={self.name!r} needs one for its loss."
            )

        def observe(batch: ImageBatch) -> Observations:
            labels = sampler.labels(batch)
            with differentiable(model, architecture) as parameters:
                norms = squared_norms(_loss(model, architecture, batch.images, labels), parameters).sqrt()
                return Observations(self.scale(norms.detach(), parameters)[None])

        return observe

    def scale(self, norms: torch.Tensor, parameters: list[list[nn.Parameter]]) -> torch.Tensor:
        """Returns what is observed, given the norm of the gradient of each component: shape (components,)."""
        return norms


@contextmanager
def _same_problem(model: nn.Module) -> Iterator[None]:
    """Inside, the model may note in its config what kind of problem the labels make it; afterwards that is gone."""
    config = getattr(model, "config", None)
    before = getattr(config, "problem_type", None)
    try:
        yield
    finally:
        if config is not None and getattr(config, "problem_type", None) != before:
            config.problem_type = before


def _loss(model: nn.Module, architecture: Architecture, images: Inputs, labels: torch.Tensor) -> torch.Tensor:
    number = getattr(getattr(model, "config", None), "num_labels", None)
    if number is not None and (labels.min() < 0 or labels.max() >= number):
        raise DataError(
            f"Labels must be from 0 to {number - 1}, as the model's head has {number} outputs. Got "
            f"{int(labels.min())} to {int(labels.max())}."
        )
    try:
        with _same_problem(model):
            loss = getattr(run(model, architecture, images, labels=labels), "loss", None)
    except (IndexError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} has a loss that is not for one whole number an image as label ({error!r})."
        ) from error
    if not isinstance(loss, torch.Tensor):
        raise ModelError(f"{type(model).__name__} returns no loss for labels.")
    return loss
