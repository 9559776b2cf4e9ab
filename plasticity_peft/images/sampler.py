"""What a criterion looks at: pairs of images, single images or batches of images, drawn by a seed.

A sample is what one observation is of. A criterion names its sampler, one of `Pairs`, `SingleImages` and `Batches`.
Which images a sample contains depends on the seed alone, not on the size of a pass or the number of processes. A
stream is taken in its own order, and is read no further than the samples that are looked at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from plasticity_peft.components.calls import Inputs
from plasticity_peft.images.indexed import Images, stack, to_device
from plasticity_peft.images.pairs import PairOrder, draw_indices


class PairBatch(NamedTuple):
    """Pairs of images, as one batch of images."""

    both: Inputs
    """The first images of n pairs, then the second ones, as the model takes them: tensors of shape (2n, ...)."""


class ImageBatch(NamedTuple):
    """Single images."""

    images: Inputs
    """What the model takes for n images: tensors of shape (n, ...)."""
    numbers: tuple[int, ...]
    """Position of each image in the order in which all were drawn."""
    places: tuple[int, ...]
    """Index of each image in the target data."""


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """The samples of one measurement, by number. Subclasses say what a sample is."""

    target: Images
    """The downstream images."""
    source: Images | None = None
    """The pretraining-like images; only `Pairs` uses them."""
    max_samples: int
    """How many samples there are at most."""
    batch_size: int
    """How many pairs or images go through the model in one pass."""
    seed: int
    device: torch.device
    dtype: torch.dtype
    inputs: str | None = None
    """What components are fed, "embedding" or "activation", for a criterion that has protocols."""

    plural: ClassVar[str]
    """Name of several samples, as in `PlasticityReport.observed`."""
    singular: ClassVar[str]
    """Name of one sample."""
    first_look: ClassVar[int] = 32
    """Number of samples after which the ranking is looked at for the first time."""

    @property
    def per_pass(self) -> int:
        """How many samples go through the model in one pass."""
        return self.batch_size

    def planned(self) -> int:
        """Returns how many samples there are at most. A stream is not read to find out."""
        return self.max_samples if self._streamed else self.available(self.max_samples)

    @abstractmethod
    def available(self, wanted: int) -> int:
        """Returns how many of the first `wanted` samples there are. A stream is read as far as that takes."""

    @abstractmethod
    def load(self, numbers: Sequence[int]) -> Any:
        """Returns the samples with these numbers, on the model's device and in its dtype."""

    def image_keys(self, numbers: Sequence[int]) -> np.ndarray:
        """Returns the images that these samples share with others: int64 of shape (samples, images per sample).

        The key of image i is 2 i for a target image and 2 i + 1 for a source image. Samples share none by default.
        """
        return np.empty((len(numbers), 0), dtype=np.int64)

    def example(self) -> Inputs:
        """Returns the first target image: tensors of shape (1, ...)."""
        return self._to_model(stack([(self.target, 0)]))

    def generator(self, *numbers: int) -> torch.Generator:
        """Returns a random generator on the CPU that belongs to one sample, whichever process looks at it.

        Args:
            numbers: the number of the sample, and any further numbers that distinguish several uses.
        """
        state = np.random.SeedSequence([self.seed, *numbers]).generate_state(1, np.uint32)
        return torch.Generator().manual_seed(int(state[0]))

    @property
    def _streamed(self) -> bool:
        return self.target.stream or (self.source is not None and self.source.stream)

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
        first = self.target if self.source is None else self.source
        rows = self._order.rows(numbers)
        images = [(first, index) for index, _ in rows] + [(self.target, index) for _, index in rows]
        return PairBatch(self._to_model(stack(images)))

    def image_keys(self, numbers: Sequence[int]) -> np.ndarray:
        """Returns the keys of the two images of each pair."""
        rows = np.array(self._order.rows(numbers), dtype=np.int64).reshape(-1, 2)
        return np.asarray(2 * rows + np.array([self.source is not None, False]))

    @cached_property
    def _order(self) -> PairOrder:
        return PairOrder(self.max_samples, target=self.target, source=self.source, seed=self.seed)


class _TargetSampler(Sampler):
    """What the samplers of single images and of batches share: target images, drawn without repetition."""

    def labels(self, batch: ImageBatch) -> torch.Tensor:
        """Returns the labels of a batch: int64 of shape (images,).

        Raises:
            DataError: an image has no label.
        """
        return torch.tensor([self.target.label(place) for place in batch.places], device=self.device)

    def _load(self, numbers: Iterable[int], places: Iterable[int]) -> ImageBatch:
        indices = tuple(map(int, places))
        images = self._to_model(stack([(self.target, index) for index in indices]))
        return ImageBatch(images, tuple(map(int, numbers)), indices)

    @property
    def _number_of_images(self) -> int:
        return min(self.max_samples, len(self.target))

    @cached_property
    def _permutation(self) -> np.ndarray:
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
        return self._load(numbers, numbers if self.target.stream else self._permutation[list(numbers)])


class Batches(_TargetSampler):
    """Batches of `batch_size` target images, each with one value. `load` returns the `ImageBatch` of one number.

    There are at least 2. They are equal in size except for one image, and no image is in two of them.
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
        return self._load(self._batches[number], self._permutation[self._batches[number]])

    @cached_property
    def _batches(self) -> list[np.ndarray]:
        images = self._number_of_images
        return np.array_split(np.arange(images), max(2, -(-images // self.batch_size)))
