"""What a criterion may look at: pairs of images, or images on their own with their labels, by number.

What is drawn depends on the seed alone, not on batches or processes. A stream, which cannot be drawn from, is taken in
its own order, and read no further than it is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.calls import Inputs
from plasticity_peft.components.wrappers import main_input
from plasticity_peft.errors import DataError, ModelError
from plasticity_peft.images.indexed import Images
from plasticity_peft.images.pairs import PairOrder, draw_indices, stack


class PairBatch(NamedTuple):
    """Pairs of images: what the model takes for all x, and for all y."""

    x: Inputs
    y: Inputs


class ImageBatch(NamedTuple):
    """Images on their own."""

    images: Inputs
    """What the model takes for them."""
    numbers: tuple[int, ...]
    """Place of each image in the order in which all were drawn."""
    places: tuple[int, ...]
    """Index of each image in the target data."""


@dataclass(frozen=True)
class Probe:
    """Images for one measurement of one model."""

    target: Images | None
    """None where no data were given, which only criteria that read nothing but weights accept."""
    source: Images | None
    inputs: str
    """Protocol, for criteria that have protocols: "embedding" or "activation"."""
    count: int
    """How many pairs or images are wanted."""
    batch_size: int
    """How many images make a batch, for a criterion that observes batches."""
    seed: int
    device: torch.device
    dtype: torch.dtype

    def planned(self, observed: str) -> int:
        """Returns how many pairs, images or batches there are at most; of a stream no more is read to tell."""
        streamed = any(images is not None and images.stream for images in (self.target, self.source))
        if streamed and observed != "batches":
            return self.count
        return self.available(observed, self.count)

    def available(self, observed: str, wanted: int) -> int:
        """Returns how many of the first `wanted` pairs, images or batches there are; as `observed` says."""
        if observed == "pairs":
            return self._order.available(wanted)
        if observed == "images":
            return wanted if wanted <= self.count and self._target.has(wanted - 1) else self._number_of_images
        return min(wanted, len(self._batches))

    def pairs(self, numbers: Sequence[int]) -> PairBatch:
        """Returns these pairs, on the model's device and in its dtype."""
        target, rows = self._target, self._order.rows(numbers)
        first = target if self.source is None else self.source
        both = self._to_model(stack([(first, row[0]) for row in rows] + [(target, row[1]) for row in rows]))
        count = len(rows)
        return PairBatch({k: v[:count] for k, v in both.items()}, {k: v[count:] for k, v in both.items()})

    def images(self, numbers: Sequence[int]) -> ImageBatch:
        """Returns these images of the target, which are drawn without repetition."""
        return self._load(numbers, numbers if self._target.stream else self._permutation[list(numbers)])

    def batches(self, numbers: Sequence[int]) -> ImageBatch:
        """Returns a batch of images, whose number is the only one in `numbers`.

        There are at least 2, equal in size but for one image, and no image is in two of them.
        """
        (number,) = numbers
        return self._load(self._batches[number], self._permutation[self._batches[number]])

    def labels(self, batch: ImageBatch) -> torch.Tensor:
        """Returns the labels of a batch, int64 of shape (images,). Raises DataError where the data have none."""
        return torch.tensor([self._target.label(place) for place in batch.places], device=self.device)

    def generator(self, *numbers: int) -> torch.Generator:
        """Returns a random generator on the CPU that belongs to one image or batch, whatever process looks at it.

        `numbers` say which: the place of the image among those drawn, and what else tells uses apart.
        """
        state = np.random.SeedSequence([self.seed, *numbers]).generate_state(1, np.uint32)
        return torch.Generator().manual_seed(int(state[0]))

    def example(self, model: nn.Module, architecture: Architecture) -> Inputs:
        """Returns one image: the first of the target, or a grey one without data."""
        if self.target is None:
            return self.grey_image(model, architecture)
        return self._to_model(stack([(self.target, 0)]))

    def grey_image(self, model: nn.Module, architecture: Architecture) -> Inputs:
        """Returns an image of zeros, the mean of what an image processor makes.

        It has the size of the first target image, or, without data, the one that the model is for.
        """
        if self.target is not None:
            image = self._to_model(stack([(self.target, 0)]))
            main = next(iter(image))
            return {**image, main: torch.zeros_like(image[main])}
        backbone = model.get_submodule(architecture.backbone)
        config = getattr(backbone, "config", None)
        size, frames = getattr(config, "image_size", None), getattr(config, "num_frames", None)
        if size is None:
            raise ModelError(
                f"{type(backbone).__name__}: its config has no image_size to make a blank image of. Give images to "
                "measure on."
            )
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        shape = (1, *([frames] if frames else []), getattr(config, "num_channels", 3), height, width)
        return {main_input(backbone): torch.zeros(shape, device=self.device, dtype=self.dtype)}

    def _load(self, numbers: Iterable[int], places: Iterable[int]) -> ImageBatch:
        indices = tuple(map(int, places))
        images = self._to_model(stack([(self._target, index) for index in indices]))
        return ImageBatch(images, tuple(map(int, numbers)), indices)

    @property
    def _target(self) -> Images:
        if self.target is None:
            raise DataError("This criterion looks at images: give target (target_data in a PlasticityConfig).")
        return self.target

    @cached_property
    def _order(self) -> PairOrder:
        return PairOrder(self.count, target=self._target, source=self.source, seed=self.seed)

    @property
    def _number_of_images(self) -> int:
        return min(self.count, len(self._target))

    @cached_property
    def _permutation(self) -> np.ndarray:
        return draw_indices(len(self._target), self._number_of_images, np.random.default_rng(self.seed))

    @cached_property
    def _batches(self) -> list[np.ndarray]:
        images = self._number_of_images
        return np.array_split(np.arange(images), max(2, -(-images // self.batch_size)))

    def _to_model(self, images: Inputs) -> Inputs:
        """Moves images to the model's device, without waiting for the end of the transfer where there is a GPU."""
        moved = {}
        for name, value in images.items():
            pinned = value.pin_memory() if (self.device.type, value.device.type) == ("cuda", "cpu") else value
            dtype = self.dtype if value.is_floating_point() else None
            moved[name] = pinned.to(self.device, non_blocking=True).to(dtype)
        return moved
