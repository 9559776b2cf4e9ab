"""Images, videos and captions for the scripts in this folder, made from the 512 real images of ../data.

Each function returns a DatasetDict with splits "train" and "test", in which no photograph is in both. The columns have
the names that the scripts expect in a dataset of yours. The same seed gives the same scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image, Sequence, Value
from PIL import Image as PILImage

PHOTOS = Path(__file__).resolve().parents[1] / "data" / "fashion_mnist.parquet"
SIDE = 28
"""Pixels of a photograph: a piece of clothing, white on black."""
CANVAS = 40
"""Pixels of a scene."""
EDGE = 32
"""Brightness from which a pixel belongs to an item and not to its background."""
TEST_FRACTION = 0.25
"""Share of the photographs for the test."""
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Directions (x, y) of what moves."""
FRAMES = 4
FAR, NEAR = 10.0, 1.0
"""Distances in meters of the wall, and of the nearest item."""
QUESTION = "what is this ?"

Photo = tuple[np.ndarray, int]
"""An image, uint8 of (28, 28), and its label."""


def names() -> list[str]:
    """Returns the ten names of clothes, such as "ankle boot"."""
    features = Dataset.from_parquet(str(PHOTOS)).features
    return [name.split("/")[0].lower() for name in features["label"].names]


def segmentation(train: int, test: int, seed: int = 0) -> DatasetDict:
    """Returns scenes of three items: "image", and "label", an image of their classes, in which 0 is the background.

    An item hides what was put there before.
    """

    def scene(photos: list[Photo], random: np.random.Generator) -> dict:
        image, classes = np.zeros((2, CANVAS, CANVAS), np.uint8)
        for pixels, label in drawn(photos, 3, random):
            item, place = placed(pixels, random.integers(16, 24, endpoint=True), random)
            image[place] = np.where(item > EDGE, item, image[place])
            classes[place][item > EDGE] = 1 + label
        return {"image": PILImage.fromarray(image), "label": PILImage.fromarray(classes)}

    return scenes(scene, {"image": Image(), "label": Image()}, train, test, seed)


def depth(train: int, test: int, seed: int = 0) -> DatasetDict:
    """Returns items before a wall: "image", and "depth_map", an image of distances in meters.

    The nearer an item is, the larger and brighter it is, and it hides what is farther.
    """

    def scene(photos: list[Photo], random: np.random.Generator) -> dict:
        image, distances = np.zeros((CANVAS, CANVAS), np.uint8), np.full((CANVAS, CANVAS), FAR, np.float32)
        for pixels, _ in drawn(photos, 3, random):
            distance = random.uniform(NEAR, 4 * NEAR)
            item, place = placed(pixels, round(SIDE * (NEAR / distance) ** 0.5), random)
            seen = (item > EDGE) & (distances[place] > distance)
            image[place] = np.where(seen, item * (NEAR / distance) ** 0.5, image[place])
            distances[place][seen] = distance
        return {"image": PILImage.fromarray(image), "depth_map": PILImage.fromarray(distances)}

    return scenes(scene, {"image": Image(), "depth_map": Image()}, train, test, seed)


def placed(pixels: np.ndarray, size: int, random: np.random.Generator) -> tuple[np.ndarray, tuple[slice, slice]]:
    """Returns an item with a side of `size` pixels, and where in a scene it lies."""
    top, left = random.integers(0, CANVAS - size, 2, endpoint=True)
    item = np.asarray(PILImage.fromarray(pixels).resize((size, size)))
    return item, (slice(top, top + size), slice(left, left + size))


def video(train: int, test: int, seed: int = 0) -> DatasetDict:
    """Returns videos of an item that moves to one side: "frames", a list of images, and "label", where it moves to."""

    def scene(photos: list[Photo], random: np.random.Generator) -> dict:
        (pixels, _), *_ = drawn(photos, 1, random)
        label = int(random.integers(len(MOVES)))
        middle, reach = (CANVAS - SIDE) // 2, (CANVAS - SIDE) // 2 - 2
        across = random.integers(-2, 2, endpoint=True)
        frames = np.zeros((FRAMES, CANVAS, CANVAS), np.uint8)
        for frame, way in zip(frames, np.linspace(-1, 1, FRAMES), strict=True):
            x, y = (middle + round(step * way * reach) + across * (step == 0) for step in list(MOVES.values())[label])
            frame[y : y + SIDE, x : x + SIDE] = pixels
        return {"frames": [PILImage.fromarray(frame) for frame in frames], "label": label}

    return scenes(scene, {"frames": Sequence(Image()), "label": ClassLabel(names=list(MOVES))}, train, test, seed)


def captions(train: int, test: int, seed: int = 0) -> DatasetDict:
    """Returns single items: "image", and "caption", such as "a photo of a bag"."""

    def scene(photos: list[Photo], random: np.random.Generator) -> dict:
        (pixels, label), *_ = drawn(photos, 1, random)
        return {"image": PILImage.fromarray(pixels), "caption": f"a photo of a {words[label]}"}

    words = names()
    return scenes(scene, {"image": Image(), "caption": Value("string")}, train, test, seed)


def questions(train: int, test: int, seed: int = 0) -> DatasetDict:
    """Returns single items: "image", "question", and "answer", the name of the item."""

    def scene(photos: list[Photo], random: np.random.Generator) -> dict:
        (pixels, label), *_ = drawn(photos, 1, random)
        return {"image": PILImage.fromarray(pixels), "question": QUESTION, "answer": words[label]}

    words = names()
    features = {"image": Image(), "question": Value("string"), "answer": Value("string")}
    return scenes(scene, features, train, test, seed)


def scenes(
    scene: Callable[[list[Photo], np.random.Generator], dict], features: dict, train: int, test: int, seed: int
) -> DatasetDict:
    """Returns the two splits of scenes that a function makes from photographs."""
    photos = list(photographs())
    held = round(TEST_FRACTION * len(photos))
    parts = {"train": (photos[held:], train), "test": (photos[:held], test)}
    return DatasetDict(
        {
            split: Dataset.from_list(
                [scene(part, np.random.default_rng([seed, number])) for number in range(count)],
                features=Features(features),
                info=DatasetInfo(features=Features(features), dataset_name="fashion-mnist-scenes"),
            )
            for split, (part, count) in parts.items()
        }
    )


def photographs() -> Iterator[Photo]:
    """Yields the real images."""
    for row in Dataset.from_parquet(str(PHOTOS)):
        yield np.asarray(row["image"]), row["label"]


def drawn(photos: list[Photo], count: int, random: np.random.Generator) -> list[Photo]:
    """Returns photographs that were drawn at random."""
    return [photos[number] for number in random.choice(len(photos), count, replace=False)]
