"""Ridge regression from sums, with leave-one-out errors in closed form. This module does not use the model.

Features are standardized. With Z the standardized features of n samples (n, d), Y the centered targets (n, k) and a
penalty p, the weights are B = (Z'Z + p I)^-1 Z'Y. Z'Z and Z'Y follow from sums that merge over batches and processes
(the covariance form of Chan, Golub & LeVeque, 1979). The error of a sample when it is left out is its residual divided
by 1 - h, where h = 1/n + z (Z'Z + p I)^-1 z' is its leverage (Allen's PRESS). All penalties share the eigenvectors of
Z'Z.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from plasticity_peft.measuring.processes import Share, pooled

SMALLEST = 1e-9
"""Lower bound of 1 - h, and of the standard deviation of a feature in units of its magnitude."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Count, means and centered products of features and targets that were observed together.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.normal(size=(10, 3)), rng.normal(size=(10, 2))
        >>> merged = Sums.of(x[:4], y[:4]).merge(Sums.of(x[4:], y[4:]))
        >>> bool(np.allclose(merged.xy, Sums.of(x, y).xy))
        True
    """

    count: int
    x: np.ndarray
    """Mean of each feature: float64 of shape (d,)."""
    y: np.ndarray
    """Mean of each target: float64 of shape (k,)."""
    xx: np.ndarray
    """Sum over samples of the products of centered features: float64 of shape (d, d)."""
    xy: np.ndarray
    """The same for features and targets: float64 of shape (d, k)."""

    @classmethod
    def of(cls, features: np.ndarray, targets: np.ndarray) -> Sums:
        """Returns the sums of features (n, d) and targets (n, k); n may be 0."""
        features, targets = np.asarray(features, np.float64), np.asarray(targets, np.float64)
        width, outputs = features.shape[1], targets.shape[1]
        if len(features) == 0:
            return cls(0, np.zeros(width), np.zeros(outputs), np.zeros((width, width)), np.zeros((width, outputs)))
        x, y = features.mean(axis=0), targets.mean(axis=0)
        centered = features - x
        return cls(len(features), x, y, centered.T @ centered, centered.T @ (targets - y))

    def merge(self, other: Sums) -> Sums:
        """Returns the sums of both sets of samples together; neither operand changes."""
        count = self.count + other.count
        if count == 0:
            return self
        dx, dy = other.x - self.x, other.y - self.y
        share, weight = other.count / count, self.count * other.count / count
        return Sums(
            count=count,
            x=self.x + dx * share,
            y=self.y + dy * share,
            xx=self.xx + other.xx + weight * np.outer(dx, dx),
            xy=self.xy + other.xy + weight * np.outer(dx, dy),
        )

    def of_all(self, share: Share) -> Sums:
        """Returns the sums of the samples of all processes, the same in each; those of this process do not change."""

        def around(mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            dx, dy = np.split(mean, [len(self.x)])
            dx, dy = dx - self.x, dy - self.y
            return self.xx + self.count * np.outer(dx, dx), self.xy + self.count * np.outer(dx, dy)

        count, mean, (xx, xy) = pooled(share, self.count, np.concatenate([self.x, self.y]), around)
        x, y = np.split(mean, [len(self.x)])
        return Sums(count, x, y, xx, xy)


@dataclass(frozen=True, eq=False)
class Ridge:
    """Ridge regression for any penalty, from the sums of all samples."""

    sums: Sums

    @cached_property
    def scale(self) -> np.ndarray:
        """Standard deviation of each feature, shape (d,); 1 for a feature that is constant."""
        std = np.sqrt(np.diag(self.sums.xx) / max(self.sums.count, 1))
        constant = std <= SMALLEST * np.maximum(np.abs(self.sums.x), 1.0)
        return np.asarray(np.where(constant, 1.0, std))

    @cached_property
    def _eigen(self) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = np.linalg.eigh(self.sums.xx / np.outer(self.scale, self.scale))
        return values.clip(min=0), vectors

    def weights(self, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns the weights (k, d) and biases (k,) for the original features, not the standardized ones."""
        values, vectors = self._eigen
        projected = vectors.T @ (self.sums.xy / self.scale[:, None])
        slopes = (vectors @ (projected / (values + penalty)[:, None])) / self.scale[:, None]
        return slopes.T, self.sums.y - self.sums.x @ slopes

    def left_out(self, features: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
        """Returns the prediction for each sample by a fit without this sample: float64 of shape (n, k).

        Args:
            features: features of samples that are part of the sums, (n, d).
            targets: targets of the same samples, (n, k).
            penalty: the penalty, above 0.
        """
        values, vectors = self._eigen
        rotated = ((features - self.sums.x) / self.scale) @ vectors
        shrunk = rotated / (values + penalty)
        fitted = self.sums.y + shrunk @ (vectors.T @ (self.sums.xy / self.scale[:, None]))
        leverage = 1 / self.sums.count + (rotated * shrunk).sum(axis=1)
        remaining = (1 - leverage).clip(min=SMALLEST)
        return np.asarray(targets - (targets - fitted) / remaining[:, None])


def default_penalties(count: int) -> np.ndarray:
    """Returns the penalties to try for `count` samples: 28 from count * 1e-6 to count * 1e3."""
    return np.asarray(count * np.logspace(-6, 3, 28))
