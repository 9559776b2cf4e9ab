"""The sources of items: a dataset that can be indexed, or a stream that is shuffled through a buffer.

A stream is read only as far as needed. It cannot be indexed, and its first images may all belong to one class. So a
buffer is filled with images, and they are drawn from the buffer one at a time. A stream that ends before the buffer is
full is treated as a dataset.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch

from plasticity_peft.images.items import labels_of
from plasticity_peft.images.seeding import seed_cpu

BUFFER_IMAGES = 1000
"""Largest number of images in the buffer, as in `datasets.IterableDataset.shuffle`."""
BUFFER_BYTES = 2**30
"""Largest size of the buffer in bytes: 1,000 images of 299 x 299 pixels. The lower limit applies."""


class Bundle(NamedTuple):
    """Items of a stream that are read, and drawn, together."""

    rows: list[Any]
    """One item per image."""
    labels: dict[str, Any] | None = None
    """The labels of a whole batch as its collate_fn made them, by the names of the model's arguments."""
    whole: bool = False
    """True for a batch of a DataLoader, False for a single image."""


class Source(ABC):
    """Items by index."""

    stream = False
    """True if the items are a stream that is longer than the buffer, so that its order is given."""
    known: int | None = None
    """Number of images, if it is known without reading them."""
    bundles: Sequence[tuple[range, dict[str, Any] | None]] = ()
    """Indices of the images of each batch that was read as a whole, and the labels of the batch."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of items. A stream is read to its end, or to its limit."""

    @abstractmethod
    def has(self, index: int) -> bool:
        """Returns whether there is an item `index`. A stream is read up to this item."""

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Returns item `index`."""


class Indexed(Source):
    """Items of a dataset by the keys of a sampler."""

    def __init__(self, data: Any, keys: Sequence[Any], seeds: Sequence[int]) -> None:
        """Takes a dataset, the keys of the items to use, and the seeds of random transforms."""
        self._data, self._keys, self._seeds = data, keys, seeds
        self.known = len(keys)

    def __len__(self) -> int:
        """Number of items."""
        return len(self._keys)

    def has(self, index: int) -> bool:
        """Returns whether there is an item `index`."""
        return index < len(self._keys)

    def __getitem__(self, index: int) -> Any:
        """Returns item `index`, whose random transforms depend on its key alone."""
        key = self._keys[index]
        seed_cpu(*self._seeds, int(key) if isinstance(key, (int, np.integer)) and key >= 0 else index)
        return self._data[key]


class Streamed(Source):
    """Items of a stream, shuffled through a buffer if they do not fit into it."""

    def __init__(self, bundles: Iterator[Bundle], read_at_most: int, seeds: Sequence[int]) -> None:
        """Takes the stream, how many of its images may be used, and the seeds of the buffer and of transforms."""
        self._unread, self._read_at_most, self._seeds = bundles, read_at_most, seeds
        self._generator = np.random.default_rng(seeds)
        self._buffer: list[Bundle] = []
        self._images = self._bytes = 0  # in the buffer
        self._rows: list[Any] = []
        self._filled = self._ended = False
        self._stream = False
        self._bundles: list[tuple[range, dict[str, Any] | None]] = []

    @property
    def stream(self) -> bool:  # type: ignore[override]
        """Whether the stream is longer than the buffer, which is filled to find out."""
        self._fill()
        return self._stream

    @property
    def bundles(self) -> Sequence[tuple[range, dict[str, Any] | None]]:  # type: ignore[override]
        """Indices of the images of each batch that was drawn so far, and the labels of the batch."""
        self._fill()
        return self._bundles

    @property
    def looks_sorted(self) -> bool | None:
        """Whether the images in the first buffer are sorted by label; None if they have no numbers as labels."""
        return self._sorted if self.stream else None

    def __len__(self) -> int:
        """Number of items. The stream is read to its end, or to its limit."""
        self.has(self._read_at_most - 1)
        return min(len(self._rows), self._read_at_most) if self.stream else len(self._rows)

    def has(self, index: int) -> bool:
        """Returns whether there is an item `index`. The stream is read up to this item."""
        if not self.stream:
            return index < len(self._rows)
        while index >= len(self._rows) and index < self._read_at_most and self._buffer:
            self._draw()
        return index < min(len(self._rows), self._read_at_most)

    def __getitem__(self, index: int) -> Any:
        """Returns item `index`."""
        self.has(index)
        return self._rows[index]

    def _fill(self) -> None:
        """Reads until the buffer is full. If the stream ends before that, its items keep their order."""
        if self._filled:
            return
        while self._has_room() and self._read():
            continue
        self._filled, self._stream = True, not self._ended
        if self._stream:
            self._sorted = _sorted([row for bundle in self._buffer for row in bundle.rows])
        else:
            for bundle in self._buffer:
                self._keep(bundle)
            self._buffer = []

    def _has_room(self) -> bool:
        return self._images < BUFFER_IMAGES and self._bytes < BUFFER_BYTES

    def _read(self) -> bool:
        """Reads one more bundle into the buffer; returns whether there was one."""
        bundle = None if self._ended else next(self._unread, None)
        if bundle is None:
            self._ended = True
            return False
        self._buffer.append(bundle)
        self._images += len(bundle.rows)
        self._bytes += sum(map(_bytes, bundle.rows))
        return True

    def _draw(self) -> None:
        """Moves a random bundle out of the buffer, and reads another one instead."""
        place = int(self._generator.integers(len(self._buffer)))
        bundle, self._buffer[place] = self._buffer[place], self._buffer[-1]
        self._buffer.pop()
        self._images -= len(bundle.rows)
        self._bytes -= sum(map(_bytes, bundle.rows))
        self._keep(bundle)
        while self._has_room() and self._read():
            continue

    def _keep(self, bundle: Bundle) -> None:
        start = len(self._rows)
        self._rows.extend(bundle.rows)
        if bundle.whole:
            self._bundles.append((range(start, len(self._rows)), bundle.labels))


def seeded(items: Iterator[Any], seeds: Sequence[int]) -> Iterator[Any]:
    """Yields the items of a stream. Each is read with its own seed."""
    for number in count():
        seed_cpu(*seeds, number)
        try:
            yield next(items)
        except StopIteration:
            return


def _bytes(item: Any) -> int:
    """Returns about how much memory an item takes."""
    if isinstance(item, torch.Tensor):
        return item.numel() * item.element_size()  # nbytes is not defined for sparse tensors
    if isinstance(item, np.ndarray):
        return int(item.nbytes)
    if isinstance(item, dict):
        return sum(map(_bytes, item.values()))
    return sum(map(_bytes, item)) if isinstance(item, tuple) else 0


def _sorted(items: Sequence[Any]) -> bool | None:
    labels: list[Any] = [next(iter(labels_of(item).values()), None) for item in items]
    try:
        numbers = [float(label) for label in labels]
    except (TypeError, ValueError, RuntimeError):
        return None
    return len(numbers) > 1 and numbers == sorted(numbers)
