"""How far the features of the model move when the *parameters* of a component move. No labels are needed.

    sqrt( E_x ||J(x)||_F^2 ),   J(x) = d features(x) / d parameters of the component

The paper argues (section 4) that components with high plasticity finetune better because their gradients are larger.
This criterion measures the gradients themselves: for any loss, the gradient with respect to the parameters is J^T
times the gradient with respect to the features. J is never formed. For v ~ N(0, I), E ||J^T v||^2 = ||J||_F^2
(Hutchinson's estimator), with one v per image. One backward pass gives the norms of all images of a batch.

The features are what the head receives, or the last hidden states of a model without a head. A freshly initialized
head has no influence. The score depends on what the model does with the output of a component, and not on how large
the tokens at its input are, so layer norms are not favored in models with small tokens.
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
    """Norm of the Jacobian of the features with respect to the parameters."""

    name = "parameter_plasticity"
    title = "parameter plasticity"
    sampler = SingleImages
    power = 0.5

    def prepare(
        self, model: nn.Module, architecture: Architecture, sampler: SingleImages
    ) -> Callable[[ImageBatch], Observations]:
        """Returns the function from images to an estimate of the squared norm of J for each image."""
        # torch 2.13 on the CPU computes a wrong gradient of a BatchNorm in evaluation mode for a single image whose
        # gradient is not contiguous, as in CvT. So a single image is passed twice.
        normalizes_batches = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        gradients = GradientsByImage(model, architecture, sampler.example())

        def observe(batch: ImageBatch) -> Observations:
            images, count = batch.images, len(batch.numbers)
            if count == 1 and normalizes_batches:
                images = {name: torch.cat([value, value]) for name, value in images.items()}

            def projected() -> torch.Tensor:
                moved = features(model, architecture, images).float()
                directions = [_gaussian(moved.shape[1:], sampler.generator(number)) for number in batch.numbers]
                return (moved[:count] * torch.stack(directions).to(moved.device)).sum()

            # A pass of one image means that memory is short.
            return Observations(gradients(len(next(iter(images.values()))), projected, recompute=count == 1)[:count])

        return observe


def _gaussian(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def features(model: nn.Module, architecture: Architecture, images: Inputs) -> torch.Tensor:
    """Returns the input of the head for n images, or the output of a model without a head: shape (n, features).

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
        raise ModelError(
            f"{type(model).__name__}: {count} images must have features of shape ({count}, ...). "
            f"Got {[tuple(each.shape) for each in found]}."
        )
    return torch.cat([tensor.reshape(count, -1) for tensor in found], dim=1)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yields the floating-point tensors in values, which may contain sequences and mappings of them."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
