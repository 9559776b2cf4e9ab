"""Grows a set of components under a budget, by their tangent kernels. This module does not use the model.

The kernel of a set is the sum of the kernels of its components, so a set can grow one component at a time: each time,
by the one with which the leave-one-out error is smallest. What a component gains usually falls as the set grows. So
only those are tried again whose last gain, at first the one alone, is above the best one found (Minoux's lazy greedy
algorithm, 1978).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from plasticity_peft.measuring.kernel_ridge import left_out, squared_error
from plasticity_peft.report.selection import Limited

SMALLEST = 1e-9
"""Lower bound of what a component adds to the price of a set."""


@dataclass(frozen=True, eq=False)
class Greedy:
    """Grows sets for n images."""

    kernels: Mapping[str, np.ndarray]
    """Of each component, by its id: (n, n)."""
    targets: np.ndarray
    """(n, classes)."""
    combined: Callable[[np.ndarray], np.ndarray]
    """Returns the kernel of a set and the head, in units of the penalty, from the sum of the kernels of the set."""

    def within(
        self, limited: Limited, units: Collection[str] | None = None, first: Collection[str] | None = None
    ) -> list[str]:
        """Returns the ids of a set that fits into a budget, in the order in which it grew.

        Two sets grow: one by what a component gains, one by what it gains for what it adds to the price. The one of
        the smaller error is returned. It is empty only if nothing that it may begin with fits.

        Args:
            limited: the budget, and the components that may be chosen. A larger set costs more.
            units: the ids of those that may be chosen; all by default.
            first: the ids of those with which the set may begin; all by default.
        """
        possible = [name for name in limited.units if units is None or name in units]
        begin = [name for name in possible if first is None or name in first]
        grown = [self._grown(limited, possible, begin, by_price) for by_price in (False, True)]
        return min(grown, key=lambda found: found[1])[0]

    def _grown(
        self, limited: Limited, units: Sequence[str], first: Sequence[str], by_price: bool
    ) -> tuple[list[str], float]:
        """Returns a set that begins with one of `first` and goes on with any of `units`, and its error."""
        chosen: list[str] = []
        kernel, error = self._nothing, self._error(self._nothing)
        gains = {name: self._alone[name] for name in units}
        while True:
            paid = limited.price(chosen)
            added = {
                name: max(limited.price([*chosen, name]) - paid, SMALLEST) if by_price else 1.0
                for name in (gains if chosen else first)
                if name not in chosen and limited.fits([*chosen, name])
            }
            tried: dict[str, float] = {}
            for name in sorted(added, key=lambda name: gains[name] / added[name], reverse=True):
                if tried and max(tried.values()) >= gains[name] / added[name]:
                    break
                gains[name] = error - self._error(kernel + self.kernels[name])
                tried[name] = gains[name] / added[name]
            best = max(tried, key=tried.__getitem__, default=None)
            if best is None or (chosen and gains[best] <= 0):
                return chosen, error
            chosen, kernel, error = [*chosen, best], kernel + self.kernels[best], error - gains[best]

    @property
    def _nothing(self) -> np.ndarray:
        """The kernel of no component."""
        return np.zeros((len(self.targets), len(self.targets)))

    @cached_property
    def _alone(self) -> dict[str, float]:
        """What each component gains alone, with which every set begins."""
        error = self._error(self._nothing)
        return {name: error - self._error(kernel) for name, kernel in self.kernels.items()}

    def _error(self, kernel: np.ndarray) -> float:
        return squared_error(left_out(self.combined(kernel), self.targets), self.targets)
