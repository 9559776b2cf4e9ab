"""Labels of several images, collated for the model's own loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from plasticity_peft.checks import shown
from plasticity_peft.errors import DataError

Labels = Any
"""The labels of a batch for a loss: a tensor of shape (images, ...), or a list of tensors or dictionaries."""


def collated(labels: Sequence[Any], places: Sequence[str], *, stacked: bool = True) -> Labels:
    """Returns the labels of a batch of images: a tensor if all have one shape, else a list.

    Whole numbers become int64 and other numbers float32, as in transformers. A label may be a number, a list or array
    of numbers (multi-label, soft labels, segmentation maps), or a dictionary of them (detection).

    Args:
        labels: one label per image.
        places: names of the images, for the message.
        stacked: False always returns a list, as transformers expects for `mask_labels` and `class_labels`.

    Raises:
        DataError: a label is not made of numbers.
    """
    values = [_numbers(label, place) for label, place in zip(labels, places, strict=True)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not stacked or len(tensors) < len(values) or len({value.shape for value in tensors}) != 1:
        return values
    dtype = torch.float32 if any(value.is_floating_point() for value in tensors) else torch.int64
    return torch.stack([value.to(dtype) for value in tensors])


def of_batch(labels: Labels, place: str) -> Labels:
    """Returns the labels of a batch as its collate_fn made them; numbers in a list or array as a tensor."""
    if isinstance(labels, np.ndarray):
        return _numbers(labels, place)
    numbers = isinstance(labels, (list, tuple)) and not any(isinstance(x, (Mapping, torch.Tensor)) for x in labels)
    return collated(labels, [place] * len(labels)) if numbers else labels


def to_device(labels: Labels, device: torch.device) -> Labels:
    """Returns labels of any form on a device."""
    if isinstance(labels, torch.Tensor):
        return labels.to(device)
    if isinstance(labels, Mapping):
        return {name: to_device(value, device) for name, value in labels.items()}
    if isinstance(labels, (list, tuple)):
        return type(labels)(to_device(value, device) for value in labels)
    return labels


def described(labels: Labels) -> str:
    """Returns the form of labels for a message.

    Examples:
        >>> described(torch.zeros(2, 3))
        'a tensor of shape (2, 3) (torch.float32)'
    """
    if isinstance(labels, torch.Tensor):
        return f"a tensor of shape {tuple(labels.shape)} ({labels.dtype})"
    if isinstance(labels, Mapping):
        return f"a dictionary with {', '.join(map(str, labels))}"
    if isinstance(labels, (list, tuple)) and labels:
        return f"a list of {len(labels)}, each {described(labels[0])}"
    return shown(labels)


def _numbers(label: Any, place: str) -> Any:
    if isinstance(label, Mapping):
        return {name: _numbers(value, f"{place}, {name}") for name, value in label.items()}
    if isinstance(label, (list, tuple)) and any(isinstance(value, (Mapping, torch.Tensor)) for value in label):
        values = [_numbers(value, place) for value in label]
        scalars = all(isinstance(value, torch.Tensor) and value.ndim == 0 for value in values)
        return torch.stack(values) if scalars else values
    try:
        value = label if isinstance(label, torch.Tensor) else torch.from_numpy(_array(label))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        value = None
    if value is None or value.is_complex() or value.is_meta or value.layout != torch.strided:
        raise DataError(
            f"{place}: its label must be a whole number. Got {shown(label)}. If the model's own loss takes them, "
            "other numbers, lists or arrays of numbers, and dictionaries of these are allowed too."
        )
    return value.to(torch.float32 if value.is_floating_point() else torch.int64)


def _array(label: Any) -> np.ndarray:
    array = np.asarray(label)
    if array.dtype.kind not in "biuf" or (array.dtype == np.uint64 and bool((array > 2**63 - 1).any())):
        raise TypeError
    return array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy()
