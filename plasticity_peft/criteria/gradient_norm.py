"""The norm of the gradient of the loss.

    E_batch [ ||dL/dw||_2 ],   w: all weights and biases of a component

This is the usual rule of thumb, with the model's own loss and its present head. It needs labels, in any form that the
loss takes: whole numbers, vectors for several labels per image, soft labels, numbers of a regression, segmentation
maps. A fresh head makes it a weak guide, because the gradient passes through a head that has not learned anything yet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.criteria.criterion import Criterion, Observations
from plasticity_peft.criteria.gradients import check_records_gradients, differentiable, squared_norms
from plasticity_peft.criteria.losses import own_loss, refused
from plasticity_peft.errors import ModelError
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
        check_records_gradients(model)
        divisors = self.divisors(model, architecture)

        def observe(batch: ImageBatch) -> Observations:
            with differentiable(model, architecture) as parameters:
                loss = own_loss(model, architecture, sampler, batch)
                try:
                    norms = squared_norms(loss, parameters).sqrt()
                except RuntimeError as error:
                    if should_reduce_batch_size(error):
                        raise
                    raise refused(model, {}, error) from error
                return Observations((norms.detach() / divisors.to(norms))[None])

        return observe

    def divisors(self, model: nn.Module, architecture: Architecture) -> torch.Tensor:
        """Returns what the norm of the gradient of each component is divided by: float64 of shape (components,)."""
        return torch.ones(len(architecture.components), dtype=torch.float64)
