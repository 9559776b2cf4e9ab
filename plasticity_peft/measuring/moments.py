"""Mean and standard deviation of numbers that arrive in pieces: batch by batch, and process by process.

`Moments.merge` combines batches, and `Moments.of_all` processes. The state is the count, the mean and the comoments:
the sums of products of two and of three distances from the mean. Two states combine as in Chan, Golub & LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances" (1979). A rate of change is the mean of the
ratio of each pair, so only ratios are added here, never numerators and denominators separately.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plasticity_peft.measuring.processes import Share, pooled


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and comoments of `n` observations of `k` quantities that were observed together.

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
    """Sum over observations of the products of two distances from the mean: float64 of shape (k, k)."""
    m3: np.ndarray
    """The same of the squared distance of one quantity times the distance of another: float64 of shape (k, k)."""

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Returns the moments of `values`, an array of shape (n, k); `n` may be 0."""
        values = np.asarray(values, dtype=np.float64)
        mean = values.mean(axis=0) if len(values) else np.zeros(values.shape[1])
        apart = values - mean
        return cls(len(values), mean, apart.T @ apart, (apart**2).T @ apart)

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
            m2=self.m2 + other.m2 + np.outer(delta, delta) * (self.count * share),
            m3=self._m3_around(delta * share) + other._m3_around(-delta * (self.count / count)),
        )

    def of_all(self, share: Share) -> Moments:
        """Returns the moments of the observations of all processes, the same in each; this one's do not change."""
        count, mean, (m2, m3) = pooled(share, self.count, self.mean, self._around)
        return Moments(count, mean, m2, m3)

    def _around(self, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `m2` and `m3` with distances from `mean` instead."""
        apart = mean - self.mean
        return self.m2 + self.count * np.outer(apart, apart), self._m3_around(apart)

    def _m3_around(self, apart: np.ndarray) -> np.ndarray:
        """Returns `m3` with distances from the mean plus `apart`."""
        squares = np.diag(self.m2) + self.count * apart**2
        return np.asarray(self.m3 - np.outer(squares, apart) - 2 * apart[:, None] * self.m2)

    def only(self, columns: slice) -> Moments:
        """Returns the moments of some of the quantities."""
        return Moments(self.count, self.mean[columns], self.m2[columns, columns], self.m3[columns, columns])

    @property
    def std(self) -> np.ndarray:
        """Sample standard deviation of each quantity, shape (k,). Raises ValueError below two observations."""
        if self.count < 2:
            raise ValueError(f"A standard deviation needs at least 2 observations. Got {self.count}.")
        return np.asarray(np.sqrt(np.diag(self.m2) / (self.count - 1)))

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of the mean of independent observations, std / sqrt(count), shape (k,)."""
        return np.asarray(self.std / np.sqrt(self.count))
