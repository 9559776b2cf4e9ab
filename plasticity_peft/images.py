"""Images out of whatever holds them: a dataset, a tensor, a DataLoader, a stream. No labels are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from plasticity_peft.errors import DataError, NonFiniteError

KEY = "pixel_values"
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
        item = self._data[index]
        if self._collate is not None:
            item = self._collate([item])
            item = {KEY: _values(item, place)[0]}
        image = _tensor(_values(item, place), place)
        if image.ndim != 3:
            raise DataError(f"{place} must have the shape (channels, height, width). Got {tuple(image.shape)}.")
        if not image.is_floating_point():
            raise DataError(
                f"{place} must hold floating-point pixel_values, as an image processor makes them. Got {image.dtype}."
            )
        if not torch.isfinite(image).all():
            raise NonFiniteError(f"{place} holds NaN or infinity.")
        return image


def _unbatched(loader: Iterable[Any], name: str) -> Iterator[torch.Tensor]:
    for batch in loader:
        yield from _values(batch, name)


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
