"""Predictions of each image from all others, for any set of components. This module does not use the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.component import Component
from plasticity_peft.measuring.greedy import Greedy
from plasticity_peft.measuring.head import solve
from plasticity_peft.measuring.kernel_ridge import left_out, squared_error
from plasticity_peft.measuring.pilot import CLASSES
from plasticity_peft.measuring.processes import Share
from plasticity_peft.measuring.ridge import Ridge, Sums
from plasticity_peft.measuring.seen import Seen
from plasticity_peft.measuring.tangents import Tangents
from plasticity_peft.report.head import HeadFit

STRENGTHS = tuple(np.logspace(-0.5, 2.5, 13).tolist())
"""Strengths of the kernels to choose from, in units of the noise: the mean over images of the variance that finetuning
everything adds."""
POWER = 0.5
"""The strength of a set is that of everything times the share of its kernel to this power. 1 would be the plain sum of
kernels. Sets of few parameters train at larger rates."""


@dataclass(frozen=True, eq=False)
class LeftOut:
    """How each of n images is predicted from all others."""

    right: np.ndarray
    """1 if its class is predicted, else 0: float64 of shape (n,)."""
    squared: np.ndarray
    """Squared error, sum over the classes: float64 of shape (n,)."""

    @classmethod
    def of(cls, kernel: np.ndarray, targets: np.ndarray) -> LeftOut:
        """Predicts by a kernel in units of the noise, (n, n)."""
        predicted = left_out(kernel, targets)
        right = predicted.argmax(axis=1) == targets.argmax(axis=1)
        return cls(right.astype(np.float64), np.square(predicted - targets).sum(axis=1, dtype=np.float64))


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predicts n images by the kernel of the fitted head and those of the components that train."""

    architecture: Architecture
    seen: Seen

    @cached_property
    def fit(self) -> HeadFit:
        """The fitted head."""
        return solve(self._sums, self.seen.features, self.seen.targets, None, Share(0, 1), CLASSES)

    @cached_property
    def alone(self) -> LeftOut:
        """The predictions of the fitted head alone."""
        return LeftOut.of(self._head, self.seen.targets)

    def of(self, parts: Sequence[Component]) -> LeftOut:
        """Returns the predictions with a set of components. They are computed once."""
        ids = frozenset(part.id for part in parts)
        if ids not in self._known:
            kernel = np.asarray(np.sum([self._kernels[part.id] for part in parts], axis=0, dtype=np.float64))
            combined = self._head + _strengthened(kernel, self._strength)
            self._known[ids] = LeftOut.of(combined, self.seen.targets)
        return self._known[ids]

    def greedy(self, most: int) -> Greedy:
        """Returns what grows sets by the kernels of the first images, at most so many."""
        some = slice(most)
        head, strength = self._head[some, some], self._strength
        return Greedy(
            kernels={name: kernel[some, some] for name, kernel in self._kernels.items()},
            targets=self.seen.targets[some],
            combined=lambda kernel: head + _strengthened(kernel, strength),
        )

    @cached_property
    def _known(self) -> dict[frozenset[str], LeftOut]:
        return {}

    @cached_property
    def _sums(self) -> Sums:
        return Sums.of(self.seen.features, self.seen.targets)

    @cached_property
    def _head(self) -> np.ndarray:
        """The kernel of the fitted head: (n, n), in units of the noise."""
        scaled = (self.seen.features - self._sums.x) / Ridge(self._sums).scale
        return np.asarray(scaled @ scaled.T / self.fit.penalty)

    @cached_property
    def _kernels(self) -> dict[str, np.ndarray]:
        """The kernel of each component, by its id: (n, n)."""
        return Tangents(self.seen.sketches).kernels(self.architecture)

    @cached_property
    def _strength(self) -> float:
        """The strength of the kernels at which everything has the smallest error."""
        whole, targets = np.sum(list(self._kernels.values()), axis=0, dtype=np.float64), self.seen.targets
        errors = [squared_error(left_out(self._head + each * whole, targets), targets) for each in STRENGTHS]
        return float(STRENGTHS[int(np.argmin(errors))])


def _strengthened(kernel: np.ndarray, strength: float) -> np.ndarray:
    """Returns the kernel of a set, in units of the noise, from the sum of the kernels of its components."""
    share = float(np.trace(kernel)) / len(kernel)
    return np.asarray(strength * share ** (POWER - 1) * kernel) if share > 0 else kernel
