"""Images out of whatever holds them: a dataset, a tensor, a DataLoader, a stream.

Labels are read only for the criteria that ask for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from plasticity_peft.errors import DataError, NonFiniteError

KEY = "pixel_values"
LABEL_KEYS = ("labels", "label")
ALLOWED = (
    "a datasets.Dataset or torch Dataset whose items have pixel_values, a DataLoader of such items, or a "
    "floating-point tensor of shape (images, channels, height, width)"
)


class Images:
    """Images by index, each a floating-point tensor of shape (channels, height, width).

    A stream (an IterableDataset, or a DataLoader over one) cannot be drawn from: its first images are read, in its own
    order, and held.
    """

    def __init__(self, data: Any, name: str, read_at_most: int) -> None:
        """Takes `data`, which the messages call `name`; of a stream, the first `read_at_most` images."""
        self.name = name
        collate = None
        if isinstance(data, torch.utils.data.DataLoader):
            if isinstance(data.dataset, torch.utils.data.IterableDataset):
                data = _unbatched(data, name)
            else:
                data, collate = data.dataset, data.collate_fn
        if data is None or isinstance(data, (str, bytes, Mapping)):
            raise DataError(f"{name} must be {ALLOWED}. Got {type(data).__name__}.")
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            if not isinstance(data, Iterable):
                raise DataError(f"{name} must be {ALLOWED}. Got {type(data).__name__}.")
            data = list(islice(data, read_at_most))
        self._data = data
        self._collate = collate

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Returns image `index`. Raises DataError or NonFiniteError, naming the image, where it is not usable."""
        place = f"{self.name}[{index}]"
        image = _tensor(_values(self._item(index, place), place), place)
        if image.ndim != 3:
            raise DataError(f"{place} must have the shape (channels, height, width). Got {tuple(image.shape)}.")
        if not image.is_floating_point():
            raise DataError(
                f"{place} must hold floating-point pixel_values, as an image processor makes them. Got {image.dtype}."
            )
        if not torch.isfinite(image).all():
            raise NonFiniteError(f"{place} holds NaN or infinity.")
        return image

    def label(self, index: int) -> int:
        """Returns the label of image `index`. Raises DataError where it has none."""
        place = f"{self.name}[{index}]"
        label = _label(self._item(index, place))
        if label is None:
            raise DataError(
                f"{place} has no label, and this criterion needs labels: give items with pixel_values and labels, or "
                "a criterion that needs none."
            )
        try:
            return int(label)
        except (TypeError, ValueError) as error:
            raise DataError(f"{place}: its label must be a whole number. Got {label!r}.") from error

    def _item(self, index: int, place: str) -> Any:
        item = self._data[index]
        if self._collate is None:
            return item
        batch = self._collate([item])
        label = _label(batch)
        return {KEY: _values(batch, place)[0]} | ({} if label is None else {"labels": label[0]})


def _unbatched(loader: Iterable[Any], name: str) -> Iterator[Any]:
    for batch in loader:
        images, labels = _values(batch, name), _label(batch)
        yield from images if labels is None else zip(images, labels, strict=True)


def _label(item: Any) -> Any:
    """Returns the label of an item: its entry, or the second of (image, label); None where it has none."""
    if isinstance(item, Mapping):
        return next((item[key] for key in LABEL_KEYS if key in item), None)
    if isinstance(item, (tuple, list)) and len(item) > 1 and isinstance(item[0], (torch.Tensor, np.ndarray)):
        return item[1]
    return None


def _values(item: Any, place: str) -> Any:
    """Returns the pixel values of an item: its entry, the item itself, or the first of (image, label)."""
    if isinstance(item, Mapping):
        if KEY not in item:
            raise DataError(
                f"{place} has no {KEY!r}; it has {sorted(map(str, item))}. Let the model's image processor make them, "
                "for instance with dataset.with_transform."
            )
        return item[KEY]
    if isinstance(item, (tuple, list)) and len(item) and isinstance(item[0], (torch.Tensor, np.ndarray)):
        return item[0]
    return item


def _tensor(values: Any, place: str) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values
    try:
        array = np.asarray(values)
        # A list of Python floats is float64, and no image is: processors and models work in float32.
        return torch.from_numpy(array.astype(np.float32) if isinstance(values, list) else array)
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: cannot make a tensor of {type(values).__name__}. Expected {ALLOWED}.") from error
