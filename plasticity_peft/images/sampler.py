"""Draws the samples that a criterion looks at: pairs of images, single images or batches of images.

Each sample gives one observation. A criterion names its sampler, one of `Pairs`, `SingleImages` and `Batches`. The
images of a sample depend only on the seed, not on the size of a pass or the number of processes. A stream is used in
its own order, and is read only as far as the samples need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, takewhile
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from plasticity_peft.components.calls import Inputs
from plasticity_peft.errors import DataError
from plasticity_peft.images.indexed import Images, stack, to_device
from plasticity_peft.images.items import LABELS
from plasticity_peft.images.labels import collated, of_batch
from plasticity_peft.images.labels import to_device as labels_to_device
from plasticity_peft.images.pairs import PairOrder, draw_indices


class PairBatch(NamedTuple):
    """Pairs of images, as one batch of images."""

    both: Inputs
    """The first images of n pairs, then the second ones, as the model takes them: tensors of shape (2n, ...)."""


class ImageBatch(NamedTuple):
    """Single images."""

    images: Inputs
    """The inputs of the model for n images: tensors of shape (n, ...)."""
    numbers: tuple[int, ...]
    """Position of each image in the order of drawing."""
    places: tuple[int, ...]
    """Index of each image in the target data."""


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """The samples of one measurement, by number. Subclasses define what a sample is."""

    target: Images
    """The downstream images."""
    source: Images | None = None
    """The pretraining-like images; only `Pairs` uses them."""
    max_samples: int
    """Largest number of samples."""
    batch_size: int
    """How many pairs or images go through the model in one pass."""
    seed: int
    device: torch.device
    dtype: torch.dtype
    inputs: str | None = None
    """The protocol, "embedding" or "activation", for a criterion that has protocols."""

    plural: ClassVar[str]
    """Name of several samples, as in `PlasticityReport.observed`."""
    singular: ClassVar[str]
    """Name of one sample."""
    first_look: ClassVar[int] = 32
    """Number of samples after which the ranking is examined for the first time."""

    @property
    def per_pass(self) -> int:
        """How many samples go through the model in one pass."""
        return self.batch_size

    def planned(self) -> int:
        """Returns the largest possible number of samples. A stream is not read for this."""
        return self.max_samples if self._streamed else self.available(self.max_samples)

    @abstractmethod
    def available(self, wanted: int) -> int:
        """Returns how many of the first `wanted` samples there are. A stream is read as far as needed for this."""

    @abstractmethod
    def load(self, numbers: Sequence[int]) -> Any:
        """Returns the samples with these numbers, on the model's device and in its dtype."""

    def arranged(self, numbers: Sequence[int]) -> Sequence[int]:
        """Returns the numbers of samples with those next to each other whose images have one shape.

        Images differ in shape only if they come out of the batches of a DataLoader, which pads each as it needs.
        """
        return sorted(numbers, key=self._shape) if self._ragged else numbers

    def alike(self, numbers: Sequence[int]) -> Sequence[int]:
        """Returns the first of these numbers up to the first change of the images' shape. They can go in one pass."""
        if not self._ragged:
            return numbers
        shape = self._shape(numbers[0])
        return list(takewhile(lambda number: self._shape(number) == shape, numbers))

    def example(self) -> Inputs:
        """Returns the first target image: tensors of shape (1, ...)."""
        return self._to_model(stack([(self.target, 0)]))

    def generator(self, *numbers: int) -> torch.Generator:
        """Returns a random generator on the CPU that belongs to one sample, whichever process looks at it.

        Args:
            numbers: the number of the sample, and any further numbers that distinguish several uses.
        """
        state = np.random.SeedSequence([self.seed, *numbers]).generate_state(1, np.uint32)
        return torch.Generator("cpu").manual_seed(int(state[0]))

    @property
    def _streamed(self) -> bool:
        return self.target.stream or (self.source is not None and self.source.stream)

    @property
    def _ragged(self) -> bool:
        return self.target.collated or (self.source is not None and self.source.collated)

    @abstractmethod
    def _shape(self, number: int) -> tuple[int, ...]:
        """Returns the shape of the images of a sample."""

    def _to_model(self, images: Inputs) -> Inputs:
        return to_device(images, self.device, self.dtype)


class Pairs(Sampler):
    """Pairs of images: one source and one target image, or two different target images. `load` returns `PairBatch`."""

    plural = "pairs"
    singular = "pair"

    def available(self, wanted: int) -> int:
        """Returns how many of the first `wanted` pairs there are."""
        return self._order.available(wanted)

    def load(self, numbers: Sequence[int]) -> PairBatch:
        """Returns the pairs with these numbers."""
        rows = self._order.rows(numbers)
        if self._ragged:
            rows = [(first, self._partner(first, second)) for first, second in rows]
        images = [(self._first, index) for index, _ in rows] + [(self.target, index) for _, index in rows]
        return PairBatch(self._to_model(stack(images)))

    @property
    def _first(self) -> Images:
        """The images from which the first ones of pairs are drawn."""
        return self.target if self.source is None else self.source

    def _shape(self, number: int) -> tuple[int, ...]:
        return self._first.shape(self._order.rows([number])[0][0])

    def _partner(self, first: int, second: int) -> int:
        """Returns the image `second`, or the next one after it that has the shape of `first`."""
        shape, count = self._first.shape(first), len(self.target)
        for index in chain(range(second, count), range(second)):
            if self.target.shape(index) == shape and not (self.source is None and index == first):
                return index
        raise DataError(
            f"{self.target.name} has no other image of the shape of {self._first.name}[{first}], {shape}, to make a "
            "pair with. Let the image processor resize them."
        )

    @cached_property
    def _order(self) -> PairOrder:
        return PairOrder(self.max_samples, target=self.target, source=self.source, seed=self.seed)


class _TargetSampler(Sampler):
    """Base of the samplers of single images and of batches: target images, drawn without repetition."""

    def labels(self, batch: ImageBatch) -> Any:
        """Returns the labels of a batch, on the model's device, in the form that the data have.

        Whole numbers are int64 and other numbers float32, of shape (images, ...): (images,) for one number per image,
        (images, height, width) for segmentation maps. Labels without a common shape are a list of tensors or
        dictionaries.

        Raises:
            DataError: an image has no label, or the label does not consist of numbers.
        """
        return next(iter(self.label_arguments(batch).values()))

    def label_arguments(self, batch: ImageBatch) -> dict[str, Any]:
        """Returns the labels of a batch by the names of the model's arguments; see `labels`."""
        whole = self.target.labels_of_batch(batch.places)
        if whole:
            found = {name: of_batch(labels, self.target.name) for name, labels in whole.items()}
        else:
            each = [self.target.labels(place) for place in batch.places]
            places = [f"{self.target.name}[{place}]" for place in batch.places]
            names = [name for name in each[0] if all(name in labels for labels in each)]
            found = {
                name: collated([labels[name] for labels in each], places, stacked=name == LABELS[0]) for name in names
            }
        return {name: labels_to_device(labels, self.device) for name, labels in found.items()}

    def _load(self, numbers: Iterable[int], places: Iterable[int]) -> ImageBatch:
        indices = tuple(map(int, places))
        images = self._to_model(stack([(self.target, index) for index in indices]))
        return ImageBatch(images, tuple(map(int, numbers)), indices)

    @property
    def _number_of_images(self) -> int:
        return min(self.max_samples, len(self.target))

    @cached_property
    def _permutation(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return draw_indices(len(self.target), self._number_of_images, np.random.default_rng(self.seed))


class SingleImages(_TargetSampler):
    """Target images, each with a value that does not depend on the others in a pass. `load` returns `ImageBatch`."""

    plural = "images"
    singular = "image"

    def available(self, wanted: int) -> int:
        """Returns how many of the first `wanted` images there are."""
        return wanted if wanted <= self.max_samples and self.target.has(wanted - 1) else self._number_of_images

    def load(self, numbers: Sequence[int]) -> ImageBatch:
        """Returns the images with these numbers."""
        return self._load(numbers, map(self._place, numbers))

    def _place(self, number: int) -> int:
        return number if self.target.stream else int(self._permutation[number])

    def _shape(self, number: int) -> tuple[int, ...]:
        return self.target.shape(self._place(number))


class Batches(_TargetSampler):
    """Batches of target images, each with one value. `load` returns the `ImageBatch` of one number.

    There are at least 2, and no image is in two of them. They have `batch_size` images and are equal in size except
    for one image. If a DataLoader has a collate_fn of its own, its batches are used instead.
    """

    plural = "batches"
    singular = "batch"
    first_look = 8  # a batch is already a mean over images

    @property
    def per_pass(self) -> int:
        """One batch goes through the model in one pass."""
        return 1

    def planned(self) -> int:
        """Returns how many batches there are. A stream is read to its end, as its length decides their size."""
        return self.available(self.max_samples)

    def available(self, wanted: int) -> int:
        """Returns how many of the first `wanted` batches there are."""
        return min(wanted, len(self._batches))

    def load(self, numbers: Sequence[int]) -> ImageBatch:
        """Returns the batch whose number is the only one in `numbers`."""
        (number,) = numbers
        return self._load(*self._batches[number])

    def _shape(self, number: int) -> tuple[int, ...]:
        return self.target.shape(int(self._batches[number][1][0]))

    @cached_property
    def _batches(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Numbers and places of the images of each batch."""
        images = self._number_of_images
        whole = self._whole_batches()
        if len(whole) > 1:
            return [(places, places) for places in whole]
        split = np.array_split(np.arange(images), max(2, -(-images // self.batch_size)))
        return [(numbers, self._permutation[numbers]) for numbers in split]

    def _whole_batches(self) -> list[np.ndarray]:
        """Returns the places of the batches of a DataLoader, in an order drawn by the seed."""
        found = [np.arange(places.start, places.stop) for places in self.target.batches if len(places)]
        drawn: list[np.ndarray] = []
        images = 0
        for number in np.random.default_rng(self.seed).permutation(len(found)):
            if images < self.max_samples or len(drawn) < 2:
                drawn.append(found[number])
                images += len(found[number])
        return drawn
