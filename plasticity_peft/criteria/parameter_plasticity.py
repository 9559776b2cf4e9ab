"""How far the features of the model move when the *parameters* of a component do. No labels are needed.

    sqrt( E_x ||J(x)||_F^2 ),   J(x) = d features(x) / d parameters of the component

The paper argues (section 4) that components with high plasticity finetune better because they get larger gradients.
This measures that where it acts: whatever the loss, its gradient by the parameters is J^T times its gradient by the
features. J itself is never formed: for v ~ N(0, I), E ||J^T v||^2 = ||J||_F^2 (Hutchinson's estimator), with a v for
each image. One backward pass gives the norms of all images of a batch.

The features are what the head receives, or the last hidden states of a model without a head; a fresh head does not
enter. The score does not depend on how large the tokens are at the input of a component, but on what is done with its
output: so norms are not favoured in models with small tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.calls import Call, Inputs, hooked, run
from plasticity_peft.criteria.criterion import Criterion, Observations
from plasticity_peft.criteria.gradients import GradientsByImage
from plasticity_peft.errors import ModelError
from plasticity_peft.images.sampler import ImageBatch, SingleImages


class ParameterPlasticity(Criterion):
    """Norm of the Jacobian of the features by the parameters."""

    name = "parameter_plasticity"
    title = "parameter plasticity"
    sampler = SingleImages
    power = 0.5

    def prepare(
        self, model: nn.Module, architecture: Architecture, sampler: SingleImages
    ) -> Callable[[ImageBatch], Observations]:
        """Returns the function from images to an estimate of the squared norm of J for each."""
        # torch 2.13 on the CPU computes the gradient of a BatchNorm in evaluation mode wrongly for a single image
        # whose gradient is not contiguous, as in CvT: there an image goes in company.
        normalises_batches = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        gradients = GradientsByImage(model, architecture, sampler.example())

        def observe(batch: ImageBatch) -> Observations:
            images, count = batch.images, len(batch.numbers)
            if count == 1 and normalises_batches:
                images = {name: torch.cat([value, value]) for name, value in images.items()}

            def projected() -> torch.Tensor:
                moved = features(model, architecture, images).float()
                directions = [torch.randn(moved.shape[1:], generator=sampler.generator(i)) for i in batch.numbers]
                return (moved[:count] * torch.stack(directions).to(moved.device)).sum()

            # Who measures image by image has little memory.
            return Observations(gradients(len(next(iter(images.values()))), projected, recompute=count == 1)[:count])

        return observe


def features(model: nn.Module, architecture: Architecture, images: Inputs) -> torch.Tensor:
    """Returns what the head receives for n images, or what a model without a head returns: shape (n, features).

    Raises:
        ModelError: the model runs without its head, or returns no tensors.
    """
    found: list[torch.Tensor] = []

    def keep(name: str, call: Call, output: Any) -> None:
        found.extend(_tensors([*call.args, *call.kwargs.values()][:1]))

    with hooked({name: model.get_submodule(name) for name in architecture.called_heads}, keep):
        output = run(model, architecture, images)
    if architecture.called_heads and not found:
        raise ModelError(
            f"{type(model).__name__} ran without calling its head, {', '.join(architecture.called_heads)}."
        )
    if not found:
        found = list(_tensors([getattr(output, "last_hidden_state", output)]))
    count = len(next(iter(images.values())))
    if not found or any(len(tensor) % count for tensor in found):
        raise ModelError(f"{type(model).__name__} gives no features of {count} images: {[f.shape for f in found]}.")
    return torch.cat([tensor.reshape(count, -1) for tensor in found], dim=1)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yields the floating-point tensors in values, which may hold sequences and mappings of them."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
