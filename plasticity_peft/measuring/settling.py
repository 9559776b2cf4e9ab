"""When to stop: as soon as the units that would be chosen differ from the rest.

After 32, 64, 128, ... observations one looks at the ranking so far. The choice is settled when every chosen unit lies
above every other one by a paired t test: on the differences between the two, observation by observation, for units
share their images. The level of each test is the promised one divided by the number of looks, and by the number of
pairs of units that could be told the wrong way round (Bonferroni): so the chance that a wrong choice is ever called
settled is at most 1 - confidence, as far as a mean of so many differences is normally distributed.
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
    """Returns after how many of `total` samples the ranking is looked at: each time twice as many, and at the end.

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
    """Decides, at each look, whether the choice is settled."""

    choice: Choice
    confidence: float
    """Chance, at least, that no wrong choice is ever called settled."""
    looks: int
    """How often one may look."""

    def differences(self, units: np.ndarray) -> np.ndarray:
        """Returns the differences of all pairs of units: (n, units) to (n, units * (units - 1) / 2)."""
        first, second = self._pairs
        return np.asarray(units[:, first] - units[:, second])

    def settled(self, ranking: Sequence[str], differences: Moments) -> bool:
        """Returns whether what would be chosen from `ranking` differs from the rest.

        Args:
            ranking: all units, those with the highest means first.
            differences: moments of what `differences` gave.
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
