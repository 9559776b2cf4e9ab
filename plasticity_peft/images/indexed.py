"""Images out of whatever holds them: a dataset, a tensor, a DataLoader, a stream.

An image is what a model takes for it: `pixel_values`, and whatever else its image processor makes and its forward pass
has an argument for (`pixel_attention_mask` and `spatial_shapes` for SigLIP 2). Labels are read only for the criteria
that ask for them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import torch

from plasticity_peft.checks import shown
from plasticity_peft.components.calls import LABEL_KEYS, Inputs
from plasticity_peft.errors import DataError, NonFiniteError
from plasticity_peft.images.seeding import seed_cpu

PIXELS = ("pixel_values",)
PRECISIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ALLOWED = (
    "a datasets.Dataset or torch Dataset whose items have pixel_values, a DataLoader of such items, or a "
    "floating-point tensor of shape (images, channels, height, width)"
)


class Images:
    """Images by index, each a dictionary of tensors, of which the first is floating-point.

    A stream (an IterableDataset, or a DataLoader over one) cannot be drawn from: its images are read in its own order,
    as far as they are asked for, and held.
    """

    def __init__(
        self, data: Any, name: str, read_at_most: int, names: tuple[str, ...] = PIXELS, *, seed: int = 0
    ) -> None:
        """Takes `data`, which the messages call `name`; of a stream, the first `read_at_most` images.

        `names` are the arguments that a model may take for an image; the first is required. Random transforms draw
        from `seed` and the number of the image, so that it does not matter which process reads it, and after which.
        """
        self.name = name
        self._seeds = (seed, zlib.crc32(name.encode()))
        self.stream = False
        """True where images come in an order that is not ours to choose."""
        self._names = names
        self._unread: Iterator[Any] = iter(())
        self._data, self._collate = data, None
        if isinstance(data, torch.utils.data.DataLoader):
            if isinstance(data.dataset, torch.utils.data.IterableDataset):
                self._data = self._unbatched(data)
            else:
                self._data, self._collate = data.dataset, data.collate_fn
        data = self._data
        if data is None or isinstance(data, (str, bytes, Mapping)):
            raise DataError(f"{name} must be {ALLOWED}. Got {type(data).__name__}.")
        by_index = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        # An IterableDataset of torch may tell its length, and inherits a __getitem__ that only raises.
        if isinstance(data, torch.utils.data.IterableDataset) or not by_index:
            if not isinstance(data, Iterable):
                raise DataError(f"{name} must be {ALLOWED}. Got {type(data).__name__}.")
            self.stream = True
            self._data, self._unread = [], self._seeded(islice(data, read_at_most))

    def __len__(self) -> int:
        """Number of images. A stream is read to its end, or as far as it may be read."""
        if self.stream:
            self._data.extend(self._unread)
        return len(self._data)

    def has(self, index: int) -> bool:
        """Returns whether there is an image `index`. A stream is read so far."""
        if self.stream:
            self._data.extend(islice(self._unread, max(0, index + 1 - len(self._data))))
        return index < len(self._data)

    def __getitem__(self, index: int) -> Inputs:
        """Returns image `index`. Raises DataError or NonFiniteError, naming the image, where it is not usable."""
        place = f"{self.name}[{index}]"
        self.has(index)
        inputs = {name: _tensor(value, place) for name, value in self._inputs(self._item(index, place), place).items()}
        image = inputs[self._names[0]]
        if not 2 <= image.ndim <= 4:
            raise DataError(
                f"{place} must have the shape (channels, height, width), or that of a video, (frames, channels, "
                f"height, width). Got {tuple(image.shape)}."
            )
        if image.dtype not in PRECISIONS:
            raise DataError(
                f"{place} must hold floating-point {self._names[0]}, as an image processor makes them. Got "
                f"{image.dtype}."
            )
        if image.layout != torch.strided or image.is_meta:
            raise DataError(f"{place} must hold numbers in a dense tensor. Got {image.layout} on {image.device}.")
        if not torch.isfinite(image).all():
            raise NonFiniteError(f"{place} holds NaN or infinity.")
        return inputs

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
            number = int(label)
            whole = bool(number == label) and abs(number) < 2**63
        except (TypeError, ValueError, RuntimeError, OverflowError):
            whole = False
        if not whole:
            raise DataError(f"{place}: its label must be a whole number. Got {shown(label)}.")
        return number

    def _seeded(self, items: Iterator[Any]) -> Iterator[Any]:
        """Yields the items of a stream, each read with random numbers of its own."""
        for number in count():
            seed_cpu(*self._seeds, number)
            try:
                yield next(items)
            except StopIteration:
                return

    def _item(self, index: int, place: str) -> Any:
        if not self.stream:
            seed_cpu(*self._seeds, index)
        item = self._data[index]
        if self._collate is None:
            return item
        batch = self._collate([item])
        label = _label(batch)
        first = {name: values[0] for name, values in self._inputs(batch, place).items()}
        return first if label is None else {**first, "labels": label[0]}

    def _unbatched(self, loader: Iterable[Any]) -> Iterator[Any]:
        for batch in loader:
            inputs, labels = self._inputs(batch, self.name), _label(batch)
            for number in range(len(inputs[self._names[0]])):
                item = {name: values[number] for name, values in inputs.items()}
                yield item if labels is None else {**item, "labels": labels[number]}

    def _inputs(self, item: Any, place: str) -> dict[str, Any]:
        """Returns what an item holds for the model: its entries, the item itself, or the first of (image, label)."""
        if isinstance(item, Mapping):
            if item.get(self._names[0]) is None:
                raise DataError(
                    f"{place} has no {self._names[0]!r}; it has {sorted(map(str, item))}. Let the model's image "
                    "processor make them, for instance with dataset.with_transform."
                )
            return {name: item[name] for name in self._names if item.get(name) is not None}
        if isinstance(item, (tuple, list)) and len(item) and isinstance(item[0], (torch.Tensor, np.ndarray)):
            return {self._names[0]: item[0]}
        return {self._names[0]: item}


def _label(item: Any) -> Any:
    """Returns the label of an item: its entry, or the second of (image, label); None where it has none."""
    if isinstance(item, Mapping):
        return next((item[key] for key in LABEL_KEYS if key in item), None)
    if isinstance(item, (tuple, list)) and len(item) > 1 and isinstance(item[0], (torch.Tensor, np.ndarray)):
        return item[1]
    return None


def _tensor(values: Any, place: str) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values
    try:
        array = np.asarray(values)
        # A list of Python floats is float64, and no image is: processors and models work in float32.
        return torch.from_numpy(array.astype(np.float32) if isinstance(values, list) else array)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{place}: cannot make a tensor of {type(values).__name__}. Expected {ALLOWED}.") from error


def stack(images: Sequence[tuple[Images, int]]) -> Inputs:
    """Returns the given images as one batch: tensors of shape (n, ...).

    Raises:
        DataError: images differ in shape, or in what they hold; the message names two of them.
    """
    items = [holder[index] for holder, index in images]
    shapes = {name: tuple(value.shape) for name, value in items[0].items()}
    for (holder, index), item in zip(images, items, strict=True):
        found = {name: tuple(value.shape) for name, value in item.items()}
        if found != shapes:
            raise DataError(
                f"All images must have one shape. {images[0][0].name}[{images[0][1]}] has {_shapes(shapes)}, "
                f"{holder.name}[{index}] has {_shapes(found)}. Let the image processor resize them."
            )
    return {name: torch.stack([item[name] for item in items]) for name in shapes}


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    if len(shapes) == 1:
        return str(next(iter(shapes.values())))
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def to_device(images: Inputs, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Returns images on a device, floating-point tensors in `dtype`; a transfer to a GPU is not waited for."""
    moved = {}
    for name, value in images.items():
        pinned = value.pin_memory() if (device.type, value.device.type) == ("cuda", "cpu") else value
        moved[name] = pinned.to(device, non_blocking=True).to(dtype if value.is_floating_point() else None)
    return moved
