"""When to stop: as soon as the units that would be selected are statistically separated from the others.

After 32, 64, 128, ... samples the ranking is examined. The selection is settled if every selected unit scores higher
than every other unit by a paired t test. The test uses the difference of two units sample by sample, because units
share their samples. The level of each test is 1 - confidence, divided by the number of examinations and by the number
of pairs of units that could be in the wrong order (Bonferroni). So the probability that a wrong selection is ever
called settled is at most 1 - confidence, as far as the mean of these differences is normally distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from plasticity_peft.measuring.moments import Moments
from plasticity_peft.report.selection import Choice


def looks(total: int, first: int) -> list[int]:
    """Returns after how many of `total` samples the ranking is examined: each time twice as many, and at the end.

    Examples:
        >>> looks(200, first=32)
        [32, 64, 128, 200]
    """
    stops, stop = [], first
    while stop < total:
        stops.append(stop)
        stop *= 2
    return [*stops, total]


@dataclass(frozen=True)
class Settling:
    """Decides whether the selection is settled, each time that the ranking is examined."""

    choice: Choice
    confidence: float
    """Lower bound of the probability that no wrong selection is ever called settled."""
    looks: int
    """Largest number of times that the ranking is examined."""

    def differences(self, units: np.ndarray) -> np.ndarray:
        """Returns the differences of all pairs of units: (n, units) to (n, units * (units - 1) / 2)."""
        first, second = self._pairs
        return np.asarray(units[:, first] - units[:, second])

    def settled(self, ranking: Sequence[str], differences: Moments) -> bool:
        """Returns whether the selection from `ranking` is separated from the other units.

        Args:
            ranking: all units, those with the highest means first.
            differences: moments of the values that `differences` returned.
        """
        from scipy import stats

        if differences.count < 2:
            return False
        level = (1 - self.confidence) / (self.looks * self.choice.possible_errors)
        least = stats.t.isf(level / 2, differences.count - 1)
        first, second = self._pairs
        names = [(self.choice.units[one], self.choice.units[other]) for one, other in zip(first, second, strict=True)]
        column = {pair: number for number, pair in enumerate(names)}
        errors = differences.standard_error
        for better, worse in self.choice.orders(ranking):
            forward = (better, worse) in column
            number = column[(better, worse) if forward else (worse, better)]
            above = differences.mean[number] * (1 if forward else -1)
            if not above > least * errors[number]:
                return False
        return True

    @cached_property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        pairs = np.array(list(combinations(range(len(self.choice.units)), 2)), dtype=np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]
