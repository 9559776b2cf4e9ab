"""The model's own loss for a batch of labeled images, for labels of any form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.calls import Inputs, label_names, run
from plasticity_peft.errors import DataError, ModelError, PlasticityError
from plasticity_peft.images.labels import described
from plasticity_peft.images.sampler import Batches, ImageBatch

FLOATS = ("regression", "multi_label_classification")
"""Values of `config.problem_type` with which a loss of transformers takes floating-point labels."""


def own_loss(model: nn.Module, architecture: Architecture, sampler: Batches, batch: ImageBatch) -> torch.Tensor:
    """Returns the loss that the model computes for a batch of images and their labels: a scalar with a gradient.

    Labels are passed in the form that the data have. As in training with transformers, whole numbers become
    floating-point numbers for a regression and for several labels per image.

    Raises:
        DataError: images have no labels, or the loss refuses them.
        ModelError: the model returns no loss, or one without a gradient.
    """
    names = label_names(model, architecture)
    labels = sampler.label_arguments(batch) if names else {}
    if _classifies(model):
        labels = {name: _as_the_loss_takes_them(value, model.config) for name, value in labels.items()}
    output = _output(model, architecture, batch.images, labels)
    loss = _loss_in(output)
    if loss is None:
        raise ModelError(f"{type(model).__name__} returns no loss for {_shown(labels).rstrip(',') or 'images'}.")
    if not loss.requires_grad:
        raise ModelError(
            f"{type(model).__name__}: its loss has no gradient. A hook or its forward pass detaches the tokens, or "
            "runs under torch.no_grad(). Remove that, or use a criterion without gradients, such as 'rate_of_change'."
        )
    return loss.mean()


def refused(model: nn.Module, labels: Mapping[str, Any], error: Exception) -> DataError:
    """Returns the error for labels that the loss of a model refuses, with the reason."""
    cause = error.__cause__ or error
    return DataError(
        f"The loss of {type(model).__name__} refuses {_shown(labels).rstrip(',') or 'the images'}: "
        f"{type(cause).__name__}: "
        f"{cause} Give labels as the model takes them in training, or use a criterion without labels."
    )


def _classifies(model: nn.Module) -> bool:
    """Returns whether the loss is that of transformers for a class, several classes or numbers per image."""
    return any(
        re.search("For.*Classification", kind.__name__) and kind.__module__.startswith("transformers.")
        for kind in type(model).__mro__
    )


def _as_the_loss_takes_them(labels: Any, config: Any) -> Any:
    """Returns labels in the dtype that the problem type of the config needs.

    Raises:
        DataError: a label is not one of the classes of the head.
    """
    outputs, problem = config.num_labels, config.problem_type
    if not isinstance(labels, torch.Tensor):
        return labels
    if problem in FLOATS or (problem is None and outputs == 1 and labels.ndim <= 2):
        return labels.float()
    if labels.ndim != 1:
        return labels
    if labels.is_floating_point() and bool((labels == labels.round()).all()):
        labels = labels.long()
    if not labels.is_floating_point() and (labels.min() < 0 or labels.max() >= outputs):
        raise DataError(
            f"Labels must be from 0 to {outputs - 1}, as the model's head has {outputs} outputs. Got "
            f"{int(labels.min())} to {int(labels.max())}."
        )
    return labels


def _output(model: nn.Module, architecture: Architecture, images: Inputs, labels: Mapping[str, Any]) -> Any:
    """Returns the output of the model. Changes that the loss makes in a config are undone."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    noted = [(config, config.problem_type) for config in configs if hasattr(config, "problem_type")]
    try:
        return run(model, architecture, images, **labels)
    except (DataError, IndexError, KeyError, AttributeError, AssertionError) as error:
        if isinstance(error, PlasticityError) and error.__cause__ is None:
            raise
        raise refused(model, labels, error) from error
    finally:
        for config, problem in noted:
            config.problem_type = problem


def _loss_in(output: Any) -> torch.Tensor | None:
    """Returns the loss in the output of a model: its entry, or the first item of a tuple, as in transformers."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(output, tuple) and loss is None and output:
        loss = output[0] if isinstance(output[0], torch.Tensor) and output[0].ndim == 0 else None
    if isinstance(output, torch.Tensor) and output.ndim == 0:
        loss = output
    return loss if isinstance(loss, torch.Tensor) else None


def _shown(labels: Mapping[str, Any]) -> str:
    return " and ".join(f"{name}, {described(value)}," for name, value in labels.items())
