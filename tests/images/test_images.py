"""Whatever holds images gives the same images."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from plasticity_peft.errors import DataError, NonFiniteError
from plasticity_peft.images.indexed import Images
from tests.support.models import random_images

IMAGES = random_images(6)
NUMBERS = datasets.Dataset.from_dict({"number": list(range(6))})
LISTS = datasets.Dataset.from_dict({"pixel_values": IMAGES.tolist(), "label": list(range(6))})


class StreamOfKnownLength(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from IMAGES

    def __len__(self) -> int:
        return len(IMAGES)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter({"pixel_values": image} for image in IMAGES)


def look_up(batch: dict[str, list[int]]) -> dict[str, list[torch.Tensor]]:
    return {"pixel_values": [IMAGES[number] for number in batch["number"]]}


def collate(items: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.stack([IMAGES[item["number"]] for item in items])}


HOLDERS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: IMAGES,
    "array": IMAGES.numpy,
    "list of dicts": lambda: [{"pixel_values": image, "labels": 0} for image in IMAGES],
    "list of arrays": lambda: list(IMAGES.numpy()),
    "torch Dataset of (image, label)": lambda: TensorDataset(IMAGES, torch.arange(6)),
    "datasets.Dataset of lists": lambda: LISTS,
    "datasets.Dataset in torch format": lambda: LISTS.with_format("torch"),
    "datasets.Dataset in numpy format": lambda: LISTS.with_format("numpy"),
    "datasets.Dataset with a transform": lambda: NUMBERS.with_transform(look_up),
    "DataLoader": lambda: DataLoader(TensorDataset(IMAGES, torch.arange(6)), batch_size=4, shuffle=True),
    "DataLoader with collate_fn": lambda: DataLoader(NUMBERS, batch_size=4, collate_fn=collate),
    "IterableDataset": Stream,
    "IterableDataset that tells its length": StreamOfKnownLength,
    "DataLoader of a stream": lambda: DataLoader(Stream(), batch_size=4),
    "datasets.IterableDataset": lambda: LISTS.with_format("torch").to_iterable_dataset(),
    "generator": lambda: (image for image in IMAGES),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_every_holder_gives_the_same_images(name: str) -> None:
    images = Images(HOLDERS[name](), "target", read_at_most=100)
    assert len(images) == len(IMAGES)
    for index, expected in enumerate(IMAGES):
        assert list(images[index]) == ["pixel_values"]
        assert images[index]["pixel_values"].dtype == torch.float32
        torch.testing.assert_close(images[index]["pixel_values"], expected)


def test_no_more_of_a_stream_is_read_than_needed() -> None:
    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield IMAGES[0]

    assert len(Images(endless(), "target", read_at_most=5)) == 5


@pytest.mark.parametrize(
    ("item", "error", "text"),
    [
        ({"image": 1, "label": 2}, DataError, r"target\[0\] has no 'pixel_values'; it has \['image', 'label'\]"),
        (torch.zeros(8), DataError, r"must have the shape \(channels, height, width\), .* Got \(8,\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), DataError, "must be floating-point pixel_values.*uint8"),
        (torch.full((3, 8, 8), torch.inf), NonFiniteError, r"target\[0\] contains NaN or infinity"),
        ({"pixel_values": "cat.png"}, DataError, r"target\[0\]: cannot make a tensor of str"),
        ({"pixel_values": [[1.0], [1.0, 2.0]]}, DataError, r"target\[0\]: cannot make a tensor of list"),
    ],
)
def test_an_image_that_is_none_is_refused_by_name(item: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        _ = Images([item], "target", read_at_most=1)[0]


@pytest.mark.parametrize("data", [None, "folder", b"bytes", {"pixel_values": IMAGES}, 3, np.float32(1)])
def test_what_holds_no_images_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match=r"source must be a datasets\.Dataset or torch Dataset"):
        Images(data, "source", read_at_most=1)


class Flipping(Dataset):
    """Images that are mirrored at random, by each of the three generators in turn."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> torch.Tensor:
        coin = (random.random, np.random.random, lambda: float(torch.rand(())))[index % 3]
        return IMAGES[index] * coin()


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_random_transform_makes_of_an_image_depends_on_the_image_alone(stream: bool) -> None:
    def images(seed: int) -> Images:
        data = Flipping()
        return Images((data[index] for index in range(6)) if stream else data, "target", 6, seed=seed)

    first, second, other = images(0), images(0), images(1)
    torch.manual_seed(5)
    forwards = [first[index]["pixel_values"] for index in range(6)]
    random.seed(7)
    backwards = [second[index]["pixel_values"] for index in reversed(range(6))][::-1]
    for index in range(6):
        assert torch.equal(forwards[index], backwards[index])
        assert not torch.equal(forwards[index], other[index]["pixel_values"])
        if not stream:
            assert torch.equal(forwards[index], first[index]["pixel_values"])
