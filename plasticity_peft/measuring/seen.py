"""What a forecast knows of images, and how processes exchange it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TypeVar

import numpy as np

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.measuring.processes import Share, gathered

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of n images."""

    numbers: np.ndarray
    """Position of each image in the order of drawing: int64 of shape (n,)."""
    features: np.ndarray
    """Input of the head's linear layer: float32 of shape (n, features)."""
    targets: np.ndarray
    """-1 and 1 for each class: float32 of shape (n, classes)."""
    sketches: dict[str, np.ndarray]
    """Sketched gradients of each layer, by path: float32 of shape (n, directions, numbers)."""

    @classmethod
    def together(cls, parts: Sequence[Seen]) -> Seen:
        """Returns the images of all parts, in the order of drawing."""
        order = np.argsort(np.concatenate([part.numbers for part in parts]))

        def ordered(values: Iterable[np.ndarray]) -> np.ndarray:
            return np.asarray(np.concatenate(list(values))[order])

        return cls(
            numbers=ordered(part.numbers for part in parts),
            features=ordered(part.features for part in parts),
            targets=ordered(part.targets for part in parts),
            sketches={path: ordered(part.sketches[path] for part in parts) for path in parts[0].sketches},
        )

    @classmethod
    def of_all(cls, share: Share, own: Sequence[Seen], architecture: Architecture) -> Seen:
        """Returns the images of all processes. `own` has those of this process, if there are any.

        Sketches are exchanged block by block, so that memory never holds messages of all blocks beside the result.
        """

        def all_of(part: Callable[[Seen], T]) -> list[T]:
            return [each for found in gathered(share, list(map(part, own))) for each in found]

        rest = all_of(lambda seen: replace(seen, sketches={}))
        order = np.argsort(np.concatenate([seen.numbers for seen in rest]))
        sketches = {}
        for _, block in groupby(architecture.components, key=attrgetter("block_id")):
            paths = [path for part in block for path in part.modules]
            found = all_of(partial(_of_layers, paths))
            sketches.update({path: np.concatenate([each[path] for each in found])[order] for path in paths})
        return replace(cls.together(rest), sketches=sketches)


def _of_layers(paths: Sequence[str], seen: Seen) -> dict[str, np.ndarray]:
    return {path: seen.sketches[path] for path in paths}
