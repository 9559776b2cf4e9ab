"""Mean and standard deviation of numbers that arrive in pieces: batch by batch, and process by process.

`Moments.merge` combines both batches and processes. The state is the count, the mean and M2, the sum of squared
distances from the mean. Two states combine as in Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm
for computing sample variances" (1979). A rate of change is the mean of the ratio of each pair, so only ratios are
added here, never numerators and denominators separately.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and M2 of `n` observations of `k` quantities that were observed together.

    Examples:
        >>> import numpy as np
        >>> first, rest = Moments.of(np.array([[1.0]])), Moments.of(np.array([[2.0], [3.0]]))
        >>> both = first.merge(rest)
        >>> both.count, float(both.mean[0]), float(both.std[0])
        (3, 2.0, 1.0)
    """

    count: int
    """Number of observations."""
    mean: np.ndarray
    """Mean of each quantity: float64 of shape (k,), zeros while `count` is 0."""
    m2: np.ndarray
    """Sum over observations of the squared distance from the mean: float64 of shape (k,)."""

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Returns the moments of `values`, an array of shape (n, k); `n` may be 0."""
        values = np.asarray(values, dtype=np.float64)
        if len(values) == 0:
            return cls(0, np.zeros(values.shape[1]), np.zeros(values.shape[1]))
        mean = values.mean(axis=0)
        return cls(len(values), mean, ((values - mean) ** 2).sum(axis=0))

    def merge(self, other: Moments) -> Moments:
        """Returns the moments of both sets of observations together; neither operand changes."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        share = other.count / count
        return Moments(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta**2 * (self.count * share),
        )

    @property
    def std(self) -> np.ndarray:
        """Sample standard deviation of each quantity, shape (k,). Raises ValueError below two observations."""
        if self.count < 2:
            raise ValueError(f"A standard deviation needs at least 2 observations. Got {self.count}.")
        return np.asarray(np.sqrt(self.m2 / (self.count - 1)))

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of each mean, std / sqrt(count), shape (k,)."""
        return np.asarray(self.std / np.sqrt(self.count))
