"""What an item of a dataset, or a batch of a DataLoader, contains for a model: images, other inputs and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch

from plasticity_peft.checks import shown
from plasticity_peft.components.calls import LABEL_KEYS
from plasticity_peft.errors import DataError

PIXELS = ("pixel_values",)
LABELS = ("labels",)
ALLOWED = (
    "a datasets.Dataset or torch Dataset whose items have pixel_values, a DataLoader of such items, or a "
    "floating-point tensor of shape (images, channels, height, width)"
)
ARRAYS = (torch.Tensor, np.ndarray)


def inputs_of(item: Any, names: Sequence[str], place: str) -> dict[str, Any]:
    """Returns the inputs of the model in an item: its entries, the item itself, or the first of (image, label).

    Raises:
        DataError: the item `place` is a dictionary without images.
    """
    if isinstance(item, Mapping):
        if item.get(names[0]) is None:
            raise DataError(
                f"{place} has no {names[0]!r}; it has {sorted(map(str, item))}. Let the model's image processor make "
                "them, for example with dataset.with_transform."
            )
        return {name: item[name] for name in names if item.get(name) is not None}
    if _is_pair(item):
        return {names[0]: item[0]}
    return {names[0]: item}


def labels_of(item: Any, label_names: Sequence[str] = LABELS) -> dict[str, Any]:
    """Returns the labels of an item by the names of the model's arguments; empty if it has none.

    They are its entries, or the second of (image, label). The entry "label" is passed as `labels`.
    """
    if isinstance(item, Mapping):
        found = {name: item[name] for name in label_names if item.get(name) is not None}
        other = next((item[key] for key in LABEL_KEYS if item.get(key) is not None), None)
        if "labels" in label_names and "labels" not in found and other is not None:
            found["labels"] = other
        return found
    if _is_pair(item) and len(item) > 1 and item[1] is not None:
        return {label_names[0]: item[1]}
    return {}


def labels_of_batch(batch: Any, label_names: Sequence[str] = LABELS) -> dict[str, Any] | None:
    """Returns the labels of a batch as its collate_fn made them; None if each of its items has its own."""
    alone = isinstance(batch, (list, tuple)) and (not _is_pair(batch) or _is_list_of_images(batch))
    return None if alone else labels_of(batch, label_names) or None


def rows_of(batch: Any, names: Sequence[str], label_names: Sequence[str], place: str) -> list[Any]:
    """Returns the items of a batch, one per image.

    A batch is a dictionary of values that have one row per image, (images, labels), a tensor of images, or a list of
    items.

    Raises:
        DataError: the batch `place` has another form.
    """
    batch = _zipped(batch)
    if isinstance(batch, (list, tuple)) and (not _is_pair(batch) or _is_list_of_images(batch)):
        return list(batch)
    if not isinstance(batch, (Mapping, list, tuple, *ARRAYS)):
        raise DataError(
            f"{place} is a DataLoader whose batches are of type {type(batch).__name__}. Its collate_fn must return a "
            f"dictionary with {names[0]}, (images, labels), a tensor or a list of items."
        )
    inputs, labels = inputs_of(batch, names, place), labels_of(batch, label_names)
    images = inputs[names[0]]
    if not isinstance(images, (*ARRAYS, list, tuple)) or (isinstance(images, ARRAYS) and images.ndim == 0):
        raise DataError(f"{place}: its batches must have one row of {names[0]} per image. Got {shown(images)}.")
    count = len(images)
    for name, value in {**inputs, **labels}.items():
        _check_rows(name, value, count, place)
    return [{name: _row(value, number) for name, value in {**inputs, **labels}.items()} for number in range(count)]


def is_one_image(item: Any, names: Sequence[str]) -> bool:
    """Returns whether an item of a DataLoader without batches is one image, (channels, height, width), not several."""
    image = item.get(names[0]) if isinstance(item, Mapping) else item[0] if _is_pair(item) else item
    return isinstance(image, ARRAYS) and image.ndim <= 3


def tensor_of(value: Any, place: str) -> torch.Tensor:
    """Returns a value as a tensor. Raises DataError if it is not numbers of one shape."""
    if isinstance(value, torch.Tensor):
        return value
    try:
        array = np.asarray(value)
        # A list of Python floats becomes float64, but image processors and models use float32.
        array = array.astype(np.float32) if isinstance(value, list) else array
        return torch.from_numpy(array if array.flags.writeable else array.copy())  # torch warns about read-only arrays
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{place}: cannot make a tensor of {type(value).__name__}. Expected {ALLOWED}.") from error


def _is_pair(item: Any) -> bool:
    """Returns whether an item is (image, label): a list or tuple that starts with an image."""
    return isinstance(item, (tuple, list)) and len(item) > 0 and isinstance(item[0], ARRAYS)


def _is_list_of_images(batch: Any) -> bool:
    """Returns whether a batch is a list of images instead of (images, labels)."""
    if not isinstance(batch, (list, tuple)) or not all(isinstance(item, ARRAYS) for item in batch):
        return False
    return len(batch) > 0 and batch[0].ndim in (2, 3) and len({item.ndim for item in batch}) == 1


def _zipped(batch: Any) -> Any:
    """Returns ((image, image, ...), (label, label, ...)), as `tuple(zip(*items))` makes it, as a list of items."""
    if not isinstance(batch, (list, tuple)) or len(batch) != 2 or not all(isinstance(b, (list, tuple)) for b in batch):
        return batch
    images, labels = batch
    lists = len(images) == len(labels) > 0 and _is_list_of_images(images)
    return list(zip(images, labels, strict=True)) if lists else batch


def _check_rows(name: str, value: Any, count: int, place: str) -> None:
    if isinstance(value, Mapping):
        for key, each in value.items():
            _check_rows(f"{name}[{key!r}]", each, count, place)
        return
    scalar = isinstance(value, ARRAYS) and value.ndim == 0
    if scalar or isinstance(value, str) or not isinstance(value, Sized) or len(value) != count:
        raise DataError(
            f"{place}: {name} must have one row for each of the {count} images of a batch. Got {shown(value)}. A "
            f"value for all images belongs into forward_kwargs={{{name!r}: ...}}."
        )


def _row(value: Any, number: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _row(each, number) for key, each in value.items()}
    return value[number]
