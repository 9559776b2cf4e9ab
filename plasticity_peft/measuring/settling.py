"""When to stop: once the units that would be selected are statistically separated from the others.

After 32, 64, 128, ... samples the ranking is examined. The selection is settled if its confidence, as
`plasticity_peft.report.confidence` defines it, is at least the promised one: every selected unit is compared with
every other unit by a paired t test, sample by sample, because all units see the same samples. The chances of error of
these tests are added, and multiplied by the number of looks (Bonferroni). So a wrong selection is called settled with
a probability of at most 1 - confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from plasticity_peft.measuring.sharing import Spread
from plasticity_peft.report.confidence import FARTHEST, confidence
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


def distances(means: np.ndarray, spread: Spread) -> np.ndarray:
    """Returns how far apart all pairs of means are, (0, 1), (0, 2), ...: shape (k (k - 1) / 2,).

    It is the difference in standard errors, less what skewness adds to it, converted to the normal distribution: the
    same chance lies beyond it as beyond that number in the t distribution. 0 if it is not known how much the means
    vary.
    """
    first, second = np.triu_indices(len(means), 1)
    apart = np.abs(means[first] - means[second])
    apart[apart < 1e-12 * np.abs(means[first])] = 0.0  # what rounding leaves of two equal means
    variance, freedom = spread.of_differences()
    errors = np.sqrt(variance)
    ratio = np.divide(apart, errors, out=np.where(apart > 0, np.inf, 0.0), where=errors > 0)
    if spread.moments is not None:
        skewness = spread.skewness_of_differences() * np.sign(means[first] - means[second])
        ratio = np.where(errors > 0, _without_skewness(ratio, skewness, spread.moments.count), ratio)
    known = freedom > 0
    beyond = special.stdtr(np.where(known, freedom, 1.0), -ratio)
    farthest = special.ndtr(-FARTHEST)
    return np.where(known, -special.ndtri(np.maximum(beyond, farthest)), 0.0).clip(0.0, FARTHEST)


def _without_skewness(ratio: np.ndarray, skewness: np.ndarray, count: int) -> np.ndarray:
    """Returns t statistics after Hall's transformation, or as they were if that is less: shape (differences,)."""
    root = np.sqrt(count)
    with np.errstate(invalid="ignore", over="ignore"):  # infinite ratios, which are replaced
        one = ratio / root
        corrected = root * (one + skewness * one**2 / 3 + skewness**2 * one**3 / 27 + skewness / (6 * count))
    return np.asarray(np.minimum(ratio, corrected).clip(0.0))


def error_factor(freedom: np.ndarray) -> np.ndarray:
    """Returns by what a standard error is multiplied so that two of them are what they are for many images.

    The factor makes mean +- 1.96 standard errors an interval of 95 % confidence.
    """
    factor: np.ndarray = special.stdtrit(freedom, 0.975) / special.ndtri(0.975)
    return factor


@dataclass(frozen=True)
class Settling:
    """What is to be selected, and how sure it must be."""

    choice: Choice
    confidence: float
    """Lower bound of the probability that no wrong selection is called settled."""
    looks: int
    """Number of looks."""

    def reached(self, ranking: Sequence[str], units: Sequence[str], distances: Sequence[float]) -> float:
        """Returns the confidence of what is selected from `ranking`; see `plasticity_peft.report.confidence`."""
        return confidence(self.choice, ranking, units, distances, self.looks)
