"""Draws the images of each pair by seeded permutations.

No image is used twice before all have been used, and none is paired with itself. With source and target data, a pair
is one image of each, as in the paper. With target data alone, it is two different target images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from plasticity_peft.images.indexed import Images

MOST_PERMUTED = 2**24
"""Largest number of images for which a whole permutation is drawn: 128 MB."""


def draw_pairs(pairs: int, *, target: int, source: int | None, seed: int) -> np.ndarray:
    """Returns the indices of the images of each pair: int64 of shape (pairs, 2), source first.

    There are fewer than `pairs` rows if the images make fewer different pairs, but at least 2.

    Args:
        pairs: number of pairs.
        target: number of target images, 2 or more, or 1 or more with a source.
        source: number of source images, or None to pair the target images with one another.
        seed: seed of the permutations.
    """
    different = target * (target - 1) // 2 if source is None else target * source
    pairs = min(pairs, max(different, 2))
    generator = np.random.default_rng(seed)
    if source is None:
        flat = np.fromiter(islice(_deal(target, 2 * pairs, generator), 2 * pairs), dtype=np.int64, count=2 * pairs)
        return flat.reshape(pairs, 2)
    columns = [islice(_deal(images, pairs, generator), pairs) for images in (source, target)]
    # One column after the other, so that the order of the draws does not depend on how they are read.
    return np.stack([np.fromiter(column, dtype=np.int64, count=pairs) for column in columns], axis=1)


def draw_indices(images: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Returns `count` different indices, or all if there are fewer: int64 of shape (count,).

    They are the start of a permutation of all images, unless there are so many images that it would waste memory.
    """
    if images <= MOST_PERMUTED or count > images // 50:
        return generator.permutation(images)[:count]
    return generator.choice(images, count, replace=False)


def _deal(images: int, wanted: int, generator: np.random.Generator) -> Iterator[int]:
    """Yields permutation after permutation of the indices, never an index twice in a row (unless there is only one).

    The caller takes at most `wanted` indices.
    """
    last = -1
    while True:
        permutation = draw_indices(images, wanted if wanted < images else images, generator)
        if permutation[0] == last and images > 1:
            permutation[[0, 1]] = permutation[[1, 0]]
        yield from permutation
        last = permutation[-1]


class PairOrder:
    """The images of pair 0, 1, 2, ...

    A stream is used in its own order. Pairs beyond its end are drawn from the images that were read.
    """

    def __init__(self, pairs: int, *, target: Images, source: Images | None, seed: int) -> None:
        self._pairs, self._target, self._source, self._seed = pairs, target, source, seed
        self._streamed = target.stream or (source is not None and source.stream)
        self._drawn: np.ndarray | None = None

    def available(self, wanted: int) -> int:
        """Returns how many of the first `wanted` pairs there are."""
        if wanted <= self._pairs and self._in_stream(wanted - 1):
            return wanted
        return min(wanted, len(self._draw()))

    def rows(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Returns the indices of the images of these pairs, source first."""
        return [self._places(number) if self._in_stream(number) else self._drawn_row(number) for number in numbers]

    def _places(self, number: int) -> tuple[int, int]:
        return (2 * number, 2 * number + 1) if self._source is None else (number, number)

    def _in_stream(self, number: int) -> bool:
        if not self._streamed:
            return False
        first, second = self._places(number)
        return self._target.has(second) and (self._source is None or self._source.has(first))

    def _draw(self) -> np.ndarray:
        if self._drawn is None:
            source = None if self._source is None else len(self._source)
            self._drawn = draw_pairs(self._pairs, target=len(self._target), source=source, seed=self._seed)
        return self._drawn

    def _drawn_row(self, number: int) -> tuple[int, int]:
        first, second = self._draw()[number]
        return int(first), int(second)
