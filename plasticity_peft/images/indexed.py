"""Images from a dataset, a tensor, a DataLoader or a stream.

An image consists of `pixel_values` and of the other outputs of its image processor that the model's forward pass takes
(`pixel_attention_mask` and `spatial_shapes` for SigLIP 2). Labels are read only for criteria that need them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from plasticity_peft.components.calls import Inputs
from plasticity_peft.errors import DataError, NonFiniteError
from plasticity_peft.images import loaders
from plasticity_peft.images.items import (
    ALLOWED,
    LABELS,
    PIXELS,
    inputs_of,
    is_one_image,
    labels_of,
    labels_of_batch,
    rows_of,
    tensor_of,
)
from plasticity_peft.images.sources import BUFFER_IMAGES, Bundle, Indexed, Source, Streamed, seeded

PRECISIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Images:
    """Images by index, each a dictionary of tensors, of which the first is floating-point.

    A stream (an IterableDataset, or a DataLoader over one) cannot be indexed. Its images are shuffled through a
    buffer, read only as far as they are needed, and kept in memory. Of a DataLoader, the images that its sampler
    yields are used. If its collate_fn may pad or mix images, they come in the batches that it makes.
    """

    def __init__(
        self,
        data: Any,
        name: str,
        read_at_most: int,
        names: tuple[str, ...] = PIXELS,
        *,
        seed: int = 0,
        label_names: tuple[str, ...] = LABELS,
        whole_batches: bool = False,
    ) -> None:
        """Wraps `data`.

        Args:
            data: see the class.
            name: name of the data in error messages.
            read_at_most: largest number of images to use of a stream that is longer than the buffer.
            names: names of the arguments that the model may take for each image; the first is required.
            seed: seeds the random transforms of each image together with its index. The result does not depend on the
                process that reads the image, or on the order of reading.
            label_names: names of the arguments that the model may take for the labels.
            whole_batches: True keeps the images of a batch together if a DataLoader has a collate_fn of its own.
        """
        self.name = name
        self.collated = False
        """True if images come from the batches of a DataLoader, and may differ in shape."""
        self._names, self._label_names, self._whole = names, label_names, whole_batches
        self._seeds = (seed, zlib.crc32(name.encode()))
        self._source = self._source_of(data, read_at_most)

    @property
    def stream(self) -> bool:
        """Whether the images are a stream, whose order is given. Reads a stream until its buffer is full."""
        return self._source.stream

    @property
    def known(self) -> int | None:
        """Number of images that can be drawn from; None for a stream."""
        return self._source.known

    @property
    def order(self) -> str:
        """The log message about the order of the images; "" if any image can be drawn."""
        if not isinstance(self._source, Streamed) or not self._source.stream:
            return ""
        text = f"{self.name} is a stream: its images are drawn from a buffer of {BUFFER_IMAGES:,} or fewer."
        advice = "Shuffle it before, or give a dataset that can be indexed."
        if self._source.looks_sorted:
            return f"{text} It is sorted by label, and images after the buffer are not measured. {advice}"
        return text if self._source.looks_sorted is False else f"{text} If it is sorted by class: {advice.lower()}"

    @property
    def looks_sorted(self) -> bool:
        """Whether the images of a stream are sorted by label, or may be."""
        return isinstance(self._source, Streamed) and self._source.stream and self._source.looks_sorted is not False

    @property
    def batches(self) -> list[range]:
        """Indices of the images of each whole batch. Of a stream, only the batches that were read are included."""
        return [places for places, _ in self._source.bundles]

    def __len__(self) -> int:
        """Number of images. A stream is read to its end, or to its limit."""
        return len(self._source)

    def has(self, index: int) -> bool:
        """Returns whether there is an image `index`. A stream is read up to this image."""
        return self._source.has(index)

    def __getitem__(self, index: int) -> Inputs:
        """Returns image `index`. Raises DataError or NonFiniteError, which names the image, if it is not usable."""
        place = f"{self.name}[{index}]"
        item = inputs_of(self._source[index], self._names, place)
        inputs = {name: tensor_of(value, place) for name, value in item.items()}
        self._check(inputs[self._names[0]], place)
        return inputs

    def shape(self, index: int) -> tuple[int, ...]:
        """Returns the shape of image `index`."""
        place = f"{self.name}[{index}]"
        return tuple(tensor_of(inputs_of(self._source[index], self._names, place)[self._names[0]], place).shape)

    def labels(self, index: int) -> dict[str, Any]:
        """Returns the labels of image `index` by the names of the model's arguments, in the form that the data have.

        Raises:
            DataError: the image has no label.
        """
        found = labels_of(self._source[index], self._label_names)
        if not found:
            raise DataError(
                f"{self.name}[{index}] has no label, and this criterion needs labels. Give items with pixel_values "
                f"and {' and '.join(self._label_names)}, or use a criterion without labels."
            )
        return found

    def labels_of_batch(self, places: Sequence[int]) -> dict[str, Any] | None:
        """Returns the labels of a batch as its collate_fn made them; None if these images are not a whole batch."""
        return next((labels for own, labels in self._source.bundles if list(own) == list(places)), None)

    def _check(self, image: torch.Tensor, place: str) -> None:
        if not 2 <= image.ndim <= 4:
            raise DataError(
                f"{place} must have the shape (channels, height, width), or that of a video, (frames, channels, "
                f"height, width). Got {tuple(image.shape)}."
            )
        if image.dtype not in PRECISIONS:
            raise DataError(
                f"{place} must be floating-point {self._names[0]}, as an image processor makes them. Got "
                f"{image.dtype}."
            )
        if image.layout != torch.strided or image.is_meta:
            raise DataError(f"{place} must be a dense tensor of numbers. Got {image.layout} on {image.device}.")
        if not torch.isfinite(image).all():
            raise NonFiniteError(f"{place} contains NaN or infinity.")

    def _source_of(self, data: Any, read_at_most: int) -> Source:
        if isinstance(data, DataLoader):
            return self._loaded(loaders.plain(data), read_at_most)
        if data is None or isinstance(data, (str, bytes, Mapping)):
            raise DataError(f"{self.name} must be {ALLOWED}. Got {type(data).__name__}.")
        # An IterableDataset of torch may have a length, and inherits a __getitem__ that only raises.
        if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset):
            return Indexed(data, range(len(data)), self._seeds)
        if not isinstance(data, Iterable):
            raise DataError(f"{self.name} must be {ALLOWED}. Got {type(data).__name__}.")
        items = seeded(iter(_shards_shuffled(data, self._seeds[0])), self._seeds)
        return Streamed((Bundle([item]) for item in items), read_at_most, self._seeds)

    def _loaded(self, loader: DataLoader[Any], read_at_most: int) -> Source:
        alone = loaders.treats_images_alone(loader)
        self.collated = not alone
        if loaders.streams(loader):
            batches = seeded(loaders.iterated(loader), self._seeds)
            return Streamed(self._bundles(batches, loader, whole=not alone), read_at_most, self._seeds)
        if alone:
            return Indexed(loader.dataset, loaders.keys_of(loader), self._seeds)
        count, batches = loaders.batches_of(loader, self._seeds, in_order_below=BUFFER_IMAGES)
        source = Streamed(self._bundles(batches, loader, whole=True), read_at_most, self._seeds)
        source.known = count
        return source

    def _bundles(self, batches: Iterator[Any], loader: DataLoader[Any], whole: bool) -> Iterator[Bundle]:
        """Yields the images of batches one by one, or batch by batch."""
        for batch in batches:
            if loader.batch_sampler is None and loader.batch_size is None and is_one_image(batch, self._names):
                yield Bundle([batch])
                continue
            rows = rows_of(batch, self._names, self._label_names, self.name)
            if whole and self._whole:
                yield Bundle(rows, labels_of_batch(batch, self._label_names), whole=True)
            else:
                yield from (Bundle([row]) for row in rows)


def _shards_shuffled(data: Any, seed: int) -> Any:
    """Returns a stream of the datasets library with its files in random order; any other stream unchanged."""
    library = type(data).__module__.partition(".")[0]
    several = library == "datasets" and getattr(data, "num_shards", 1) > 1
    return data.shuffle(seed=seed, buffer_size=1) if several else data


def stack(images: Sequence[tuple[Images, int]]) -> Inputs:
    """Returns the given images as one batch: tensors of shape (n, ...).

    Raises:
        DataError: images differ in shape or in their entries; the message names two of them.
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
    """Returns images on a device, floating-point tensors in `dtype`. Transfers to a GPU are asynchronous."""
    moved = {}
    for name, value in images.items():
        pinned = value.pin_memory() if (device.type, value.device.type) == ("cuda", "cpu") else value
        moved[name] = pinned.to(device, non_blocking=True).to(dtype if value.is_floating_point() else None)
    return moved
