"""What a criterion may look at: pairs of images, or batches of images with their labels, and this process's share.

What is drawn depends on the seed alone. Pairs are dealt to the processes one by one; batches as a whole, so that a
batch holds the same images whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from plasticity_peft.errors import DataError, ModelError
from plasticity_peft.images import Images
from plasticity_peft.pairs import batches, draw_pairs, stack
from plasticity_peft.processes import Share


class PairBatch(NamedTuple):
    """Pairs of images, each (pairs, channels, height, width)."""

    x: torch.Tensor
    y: torch.Tensor


class ImageBatch(NamedTuple):
    """Images on their own."""

    images: torch.Tensor
    """(images, channels, height, width)"""
    numbers: tuple[int, ...]
    """Place of each image in the order in which all were drawn."""
    places: tuple[int, ...]
    """Index of each image in the target data."""


@dataclass(frozen=True)
class Probe:
    """Images for one measurement of one model, in the share of one process."""

    target: Images | None
    """None where no data were given, which only criteria that read nothing but weights accept."""
    source: Images | None
    inputs: str
    """Protocol, for criteria that have protocols: "embedding" or "activation"."""
    count: int
    """How many pairs or images are wanted."""
    batch_size: int
    seed: int
    share: Share
    device: torch.device
    dtype: torch.dtype

    def pairs(self) -> Iterator[PairBatch]:
        """Yields the pairs of this process, `batch_size` at a time, on the model's device and in its dtype."""
        target, source = self._target(), self.source
        drawn = draw_pairs(
            self.count, target=len(target), source=None if source is None else len(source), seed=self.seed
        )
        mine = drawn[self.share.rank :: self.share.world_size]
        with self._progress(len(mine), "pair") as progress:
            for x, y in batches(target, source, mine, self.batch_size):
                yield PairBatch(self._to_model(x), self._to_model(y))
                progress.update(len(x))

    def images(self) -> Iterator[ImageBatch]:
        """Yields the batches of target images of this process: at least 2 in all, equal in size but for one image.

        No image is in two batches.
        """
        target = self._target()
        drawn = np.random.default_rng(self.seed).permutation(len(target))[: self.count]
        parts = np.array_split(np.arange(len(drawn)), max(2, -(-len(drawn) // self.batch_size)))
        mine = parts[self.share.rank :: self.share.world_size]
        with self._progress(sum(map(len, mine)), "image") as progress:
            for numbers in mine:
                places = tuple(int(drawn[number]) for number in numbers)
                images = self._to_model(stack([(target, place) for place in places]))
                yield ImageBatch(images, tuple(map(int, numbers)), places)
                progress.update(len(numbers))

    def labels(self, batch: ImageBatch) -> torch.Tensor:
        """Returns the labels of a batch, int64 of shape (images,). Raises DataError where the data have none."""
        target = self._target()
        return torch.tensor([target.label(place) for place in batch.places], device=self.device)

    def generator(self, number: int) -> torch.Generator:
        """Returns a random generator on the CPU that belongs to one image or batch, whatever process looks at it."""
        state = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint32)
        return torch.Generator().manual_seed(int(state[0]))

    def example(self, model: nn.Module) -> torch.Tensor:
        """Returns one image, (1, channels, height, width): the first of the target, or a grey one without data."""
        if self.target is None:
            return self.grey_image(model)
        return self._to_model(stack([(self.target, 0)]))

    def grey_image(self, model: nn.Module) -> torch.Tensor:
        """Returns an image of zeros, the mean of what an image processor makes, in the size that the model is for."""
        config = getattr(model, "config", None)
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if size is None:
            raise ModelError(f"{type(model).__name__}: its config has no image_size to make a blank image of.")
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return torch.zeros(1, channels, height, width, device=self.device, dtype=self.dtype)

    def _target(self) -> Images:
        if self.target is None:
            raise DataError("This criterion looks at images: give target (target_data in a PlasticityConfig).")
        return self.target

    def _to_model(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self.device, self.dtype)

    def _progress(self, total: int, unit: str) -> Any:
        from transformers.utils.logging import tqdm

        return tqdm(total=total, desc="Measuring plasticity", unit=unit, disable=self.share.rank > 0)
