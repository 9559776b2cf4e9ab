"""Standard errors of means over samples that share images.

An image is in many pairs, and all pairs of an image vary together. So the mean over pairs varies more than the mean
over as many independent observations. Its variance follows from the sums of the observations of each image, as for
dyadic data (Fafchamps & Gubert, "The formation of risk sharing networks", 2007) and, with a source and a target, for
data that are clustered in two ways (Cameron, Gelbach & Miller, "Robust inference with multiway clustering", 2011).
Which images make which pair is known, and so is by how much the variance would be underestimated because the mean is
estimated from few images: this is corrected for.

Samples that share no images are independent. The test of a difference then takes its skewness into account by the
transformation of Hall, "On the removal of skewness by transformation" (1992): norms of gradients are so skewed that a
t test alone calls differences significant that are not there, twice as often as it should.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from plasticity_peft.measuring.moments import Moments
from plasticity_peft.measuring.processes import Share, gathered, summed

GROUPS = 1024
"""Number of sums per sort of image. With more images, several of them share a sum, at the cost of precision."""
SORTS = 2
"""Sorts of images: target and source."""
HEAVY_TAILS = 1.5
"""By what degrees of freedom are divided: observations have heavier tails than a normal distribution. 1 + k / 2 for an
excess kurtosis of k, which is about 1 for rates of change on the images of `tests/measuring/test_coverage.py`."""
SKEWED = 2.0
"""The same for observations of single images, which are squared norms, and skewed."""


@dataclass(frozen=True, eq=False)
class Observed:
    """Observations of `k` quantities, and the images that they are of: the state of a measurement.

    Examples:
        >>> first = Observed.of(np.array([[1.0]]), np.array([[0, 2]]))
        >>> both = first.merge(Observed.of(np.array([[3.0]]), np.array([[0, 4]])))
        >>> both.moments.mean, both.groups, both.sums.T
        (array([2.]), array([0, 2, 4]), array([[4., 1., 3.]]))
    """

    moments: Moments
    keys: np.ndarray
    """Images of each observation: int64 of shape (n, images per observation), or (n, 0) if observations share none.
    The key of image i is 2 i for a target image and 2 i + 1 for a source image. These 16 bytes per pair are all that
    grows with the number of pairs."""
    groups: np.ndarray
    """Groups of images, each of one sort: int64 of shape (groups,)."""
    sums: np.ndarray
    """Sum of the observations of each group: float64 of shape (groups, k)."""

    @classmethod
    def of(cls, values: np.ndarray, keys: np.ndarray) -> Observed:
        """Returns the state of observations `values`, an array of shape (n, k); `n` may be 0."""
        each = np.repeat(values, keys.shape[1], axis=0)
        return cls(Moments.of(values), keys, *_summed(_group(keys).reshape(-1), each))

    def merge(self, other: Observed) -> Observed:
        """Returns the state of both sets of observations together; neither operand changes."""
        if self.moments.count == 0 or other.moments.count == 0:
            return other if self.moments.count == 0 else self
        groups, sums = (np.concatenate(both) for both in ((self.groups, other.groups), (self.sums, other.sums)))
        keys = np.concatenate([self.keys, other.keys])
        return Observed(self.moments.merge(other.moments), keys, *_summed(groups, sums))

    def of_all(self, share: Share) -> Observed:
        """Returns the state of the observations of all processes, the same in each; this one's does not change.

        The keys alone are received from each process. All else are sums, of one size for any number of processes.
        """
        if share.world_size == 1:
            return self
        moments = self.moments.of_all(share)
        keys = [each for each in gathered(share, self.keys) if len(each)] or [self.keys]
        groups = np.unique(_group(np.concatenate(keys)))
        sums = np.zeros((len(groups), self.sums.shape[1]))
        sums[np.searchsorted(groups, self.groups)] = self.sums
        return Observed(moments, np.concatenate(keys), groups, summed(share, sums)[0] if len(groups) else sums)


def _group(keys: np.ndarray) -> np.ndarray:
    """Returns the group of each image. Up to `GROUPS` images of a sort have a group each."""
    return np.asarray(keys // SORTS % GROUPS * SORTS + keys % SORTS)


def _summed(groups: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the different groups, and the sum of the values of each."""
    different, place = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(different), values.shape[1]))
    np.add.at(sums, place.reshape(-1), values)
    return different, sums


@dataclass(frozen=True, eq=False)
class Spread:
    """Covariance of the means of `k` quantities, from which follow the standard errors of what is linear in them."""

    separate: np.ndarray
    """Covariance if samples shared no image: float64 of shape (k, k)."""
    freedom: float
    """Its degrees of freedom; 0 if the observations do not contain how much they vary."""
    shared: tuple[tuple[np.ndarray, float], ...] = ()
    """For each sort of image that samples share: the covariance if all images but those were the same in all samples,
    and its degrees of freedom."""
    moments: Moments | None = None
    """Moments of the observations, whose skewness is then known, if samples share no image."""

    @classmethod
    def of(cls, observed: Observed) -> Spread:
        """Returns the spread of the means of what was observed, 2 observations or more."""
        moments, count = observed.moments, observed.moments.count
        if not observed.keys.shape[1]:
            return cls(moments.m2 / (count * (count - 1)), (count - 1) / SKEWED, moments=moments)
        design = _Design(observed.keys, count)
        scale, known = design.scale(design.each, design.same)
        if not known:
            return cls(np.zeros_like(moments.m2), 0.0)
        shared = []
        for sort, images in design.shared.items():
            groups = _incidence(_group(design.keys_of(sort)))
            ratio, known = design.scale(groups, images)
            covariance = ratio * _comoments(observed, sort, np.asarray(groups.sum(axis=0)).reshape(-1))
            fewest = min(count, images.shape[1])
            shared.append((covariance, (fewest - 1) / HEAVY_TAILS if known else 0.0))
        independent = None if shared else moments
        return cls(scale * moments.m2, (count - 1) / HEAVY_TAILS, tuple(shared), independent)

    def only(self, columns: slice) -> Spread:
        """Returns the spread of some of the means."""
        shared = tuple((covariance[columns, columns], freedom) for covariance, freedom in self.shared)
        moments = None if self.moments is None else self.moments.only(columns)
        return Spread(self.separate[columns, columns], self.freedom, shared, moments)

    def of_means(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the variance of each mean and its degrees of freedom, both of shape (k,)."""
        return self._combined(np.diag)

    def of_differences(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the same of the differences of all pairs of means, (0, 1), (0, 2), ...: shape (k (k - 1) / 2,)."""
        first, second = np.triu_indices(len(self.separate), 1)

        def of_pairs(covariance: np.ndarray) -> np.ndarray:
            variance = np.diag(covariance)
            apart = variance[first] + variance[second] - 2 * covariance[first, second]
            # What rounding leaves of two equal quantities is not a variance.
            return np.asarray(np.where(apart > 1e-13 * (variance[first] + variance[second]), apart, 0.0))

        return self._combined(of_pairs)

    def skewness_of_differences(self) -> np.ndarray:
        """Returns the skewness of these differences over observations, 0 if it is not known; same shape."""
        first, second = np.triu_indices(len(self.separate), 1)
        moments = self.moments
        if moments is None or moments.count < 3:
            return np.zeros(len(first))
        count, m2, m3 = moments.count, moments.m2, moments.m3
        squares = m2[first, first] + m2[second, second] - 2 * m2[first, second]
        cubes = m3[first, first] - 3 * m3[first, second] + 3 * m3[second, first] - m3[second, second]
        varying = squares > 1e-13 * (m2[first, first] + m2[second, second])
        skewness = np.divide(cubes / count, (np.where(varying, squares, 1.0) / count) ** 1.5)
        # The adjusted Fisher-Pearson coefficient, as scipy.stats.skew(bias=False).
        return np.asarray(np.where(varying, skewness * np.sqrt(count * (count - 1)) / (count - 2), 0.0))

    def _combined(self, variances: Any) -> tuple[np.ndarray, np.ndarray]:
        separate = variances(self.separate)
        if not self.shared:
            return separate, np.full_like(separate, self.freedom)
        each = np.stack([variances(covariance) for covariance, _ in self.shared])
        total = each.sum(axis=0) - (len(each) - 1) * separate
        variance = np.maximum(np.maximum(total, separate), each.max(axis=0))
        freedom = np.array([df for _, df in self.shared])[:, None]
        if not freedom.all():
            return variance, np.zeros_like(variance)
        # Welch & Satterthwaite.
        parts = (each**2 / freedom).sum(axis=0)
        whole = np.broadcast_to(freedom.min(), variance.shape)
        return variance, np.divide(each.sum(axis=0) ** 2, parts, out=whole.copy(), where=parts > 0)


def _comoments(observed: Observed, sort: int, samples: np.ndarray) -> np.ndarray:
    """Returns the comoments of the sums of one sort, around the mean times the number of `samples` in each: (k, k)."""
    apart = observed.sums[observed.groups % SORTS == sort] - np.outer(samples, observed.moments.mean)
    return np.asarray(apart.T @ apart)


class _Design:
    """Which samples share which images, as sparse matrices with a row for each sample: 1 for what it contains."""

    def __init__(self, keys: np.ndarray, count: int) -> None:
        self._keys, self._count = keys, count

    @cached_property
    def each(self) -> Any:
        """A column for each sample."""
        return _incidence(np.arange(self._count).reshape(-1, 1))

    @cached_property
    def same(self) -> Any:
        """A column for each different pair of images: which samples are the same."""
        _, pair = np.unique(np.sort(self._keys, axis=1), axis=0, return_inverse=True)
        return _incidence(pair.reshape(-1, 1))

    @cached_property
    def shared(self) -> dict[int, Any]:
        """For each sort that samples share, a column for each image."""
        sorts = np.unique(self._keys % SORTS).tolist()
        found = {sort: _incidence(self.keys_of(sort)) for sort in sorts}
        per_sample = {sort: self.keys_of(sort).shape[1] for sort in sorts}
        return {sort: each for sort, each in found.items() if _total(each) > per_sample[sort] * _total(self.same)}

    def keys_of(self, sort: int) -> np.ndarray:
        """Returns the images of one sort in each sample: int64 of shape (samples, 1 or 2)."""
        return np.asarray(self._keys[self._keys % SORTS == sort].reshape(self._count, -1))

    def scale(self, form: Any, effects: Any) -> tuple[float, bool]:
        """Returns what turns comoments into the variance of the mean, and whether they contain it.

        Samples are the mean plus independent effects of what they contain, the columns of `effects`, of variance 1. It
        is the variance of the mean of all samples, over the expected sum of squares of the sums of the columns of
        `form`, each around what the mean of all samples makes of it.
        """
        ones, count = np.ones(self._count), self._count
        cross = (form @ (form.T @ ones)) @ (effects @ (effects.T @ ones))
        whole = float((form.T @ effects).power(2).sum())
        expected = whole - 2 / count * float(cross) + _total(form) * _total(effects) / count**2
        if expected <= 1e-9 * whole:
            return 0.0, False
        return _total(effects) / count**2 / expected, True


def _incidence(keys: np.ndarray) -> Any:
    """Returns the sparse matrix of shape (samples, different keys) that is 1 where a sample contains a key."""
    from scipy.sparse import csr_matrix

    _, place = np.unique(keys, return_inverse=True)
    rows = np.repeat(np.arange(len(keys)), keys.shape[1])
    return csr_matrix((np.ones(keys.size), (rows, place.reshape(-1))))


def _total(matrix: Any) -> float:
    """Returns the sum over columns of the squared number of samples in a column."""
    return float((np.asarray(matrix.sum(axis=0)) ** 2).sum())
