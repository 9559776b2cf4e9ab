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

from plasticity_peft.architectures import Architecture, main_input
from plasticity_peft.errors import DataError, ModelError
from plasticity_peft.images import Images, Inputs
from plasticity_peft.pairs import batches, draw_pairs, stack
from plasticity_peft.processes import Share


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
                progress.update(len(next(iter(x.values()))))

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

    def _target(self) -> Images:
        if self.target is None:
            raise DataError("This criterion looks at images: give target (target_data in a PlasticityConfig).")
        return self.target

    def _to_model(self, images: Inputs) -> Inputs:
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in images.items()
        }

    def _progress(self, total: int, unit: str) -> Any:
        from transformers.utils.logging import tqdm

        return tqdm(total=total, desc="Measuring plasticity", unit=unit, disable=self.share.rank > 0)
