"""Forecasts for any set of components from what was seen of the images. This module does not use the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np

from plasticity_peft.arguments import parse_budget
from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.component import MATRIX_KINDS, Component, block_ids
from plasticity_peft.measuring.predictions import Predictions
from plasticity_peft.measuring.processes import failing_together, gathered, this_process
from plasticity_peft.measuring.rates import times
from plasticity_peft.measuring.short_runs import at_better_rates
from plasticity_peft.report.cost import Costs, Trained
from plasticity_peft.report.forecast import Forecast, PilotRun, SetForecast
from plasticity_peft.report.selection import Limited, SelectionRule

MOST_GROWN = 512
"""Largest number of images by which sets within a budget grow."""
MORE_STEPS = 64
"""Number of steps of another run if a short one gains more than kernels promise."""
MODEL_ERROR = 0.015
"""Standard deviation of the gain of trained models around a forecast, beside the error of its images. It does not
cover models whose features move far."""


@dataclass(frozen=True, eq=False)
class Forecaster:
    """Forecasts from what was seen. The model takes no part."""

    architecture: Architecture
    predictions: Predictions
    costs: Costs | None
    rates: Callable[[Sequence[Component], int], dict[str, float] | None]
    """Returns the recommended rates of some components, beside a head of so many features."""
    pilot: PilotRun | None
    seed: int

    def with_runs(self, run: Callable[[int, float], PilotRun | None]) -> Forecaster:
        """Returns this forecaster with a short run, or with a longer one if it gains more than kernels promise.

        Args:
            run: trains a copy of the model for a number of steps, at a multiple of the recommended rates.
        """
        short = at_better_rates(run)
        if short is not None and self._raised(short) > 0:
            longer = run(MORE_STEPS, short.rate_factor)
            if longer is not None and longer.gain > short.gain:
                short = longer
        return replace(self, pilot=short)

    def grown(self, budgets: Sequence[SelectionRule]) -> dict[str, tuple[Component, ...]]:
        """Returns a set within each budget, by its name. The processes share the work.

        Kernels do not show that features move far, and features move only from the first block that trains on. So if
        the short runs showed it, a set also grows from each block on, and the one of the largest gain is the result.
        Norms alone are left out, because they do not always move the features as far as everything does.
        """
        if not budgets:
            return {}
        greedy = self.predictions.greedy(MOST_GROWN)
        starts = range(len(self._blocks)) if self._raised(self.pilot) > 0 else ()
        tasks = list(product(range(len(budgets)), (None, *starts)))
        share, own = this_process(), {}
        with failing_together(share):
            for task in share.of(range(len(tasks))):
                number, start = tasks[task]
                limited = limited_by(budgets[number], self.architecture, self.costs)
                own[task] = greedy.within(limited, *self._from(start))
        found = {tasks[task]: chosen for each in gathered(share, own) for task, chosen in each.items()}
        sets = {}
        for number, rule in enumerate(budgets):
            grown = [self._members(found[number, start]) for start in starts]
            free = self._members(found[number, None])
            sets[_within(rule)] = max([free, *filter(_has_matrices, grown)], key=self._gain)
        return sets

    def _members(self, ids: Collection[str]) -> tuple[Component, ...]:
        return tuple(part for part in self.architecture.components if part.id in ids)

    def _gain(self, parts: Sequence[Component]) -> float:
        """Returns the forecast gain of a set."""
        return self._by_kernels(parts) + self._raised(self.pilot) * self._depth(parts)

    def _by_kernels(self, parts: Sequence[Component]) -> float:
        """Returns the gain that kernels promise for a set."""
        return float((self.predictions.of(parts).right - self.predictions.alone.right).mean())

    def _from(self, start: int | None) -> tuple[list[str] | None, list[str] | None]:
        """Returns the ids of the components from a block on, and of those in this block; None if any will do."""
        if start is None:
            return None, None
        parts, later = self.architecture.components, self._blocks[start:]
        return (
            [part.id for part in parts if part.block_id in later],
            [part.id for part in parts if part.block_id == self._blocks[start]],
        )

    def forecast(self, wanted: Mapping[str, tuple[Component, ...]]) -> Forecast:
        """Returns the forecast of some sets, by their names."""
        alone, found = self.predictions.alone, map(self.predictions.of, wanted.values())
        smallest = min(found, key=lambda one: float(one.squared.mean())).squared
        sets = tuple(self._of_set(name, parts, smallest) for name, parts in wanted.items())
        return Forecast(
            model_type=self.architecture.model_type,
            seed=self.seed,
            head=self.predictions.fit,
            head_error=_standard_error(alone.right),
            head_squared_error=float(alone.squared.mean()),
            sets=sets,
            pilot=self.pilot,
            raised=self._raised(self.pilot),
        )

    def _raised(self, run: PilotRun | None) -> float:
        """Returns by how much a run gained more than kernels promise for everything; 0 if it may be chance."""
        if run is None:
            return 0.0
        more = run.gain - self._by_kernels(self.architecture.components)
        return more if more > run.gain_error else 0.0

    def _rates(self, parts: Sequence[Component]) -> dict[str, float] | None:
        """Returns the recommended rates, times the factor of the short run."""
        recommended = self.rates(parts, self.predictions.fit.features)
        if recommended is None or self.pilot is None:
            return recommended
        return times(recommended, self.pilot.rate_factor)

    @cached_property
    def _blocks(self) -> list[str]:
        return block_ids(self.architecture.components)

    def _depth(self, parts: Sequence[Component]) -> float:
        """Returns the share of the blocks from the first one in which a set trains. Earlier features do not move."""
        return 1 - min(self._blocks.index(part.block_id) for part in parts) / len(self._blocks)

    def _of_set(self, name: str, parts: Sequence[Component], smallest: np.ndarray) -> SetForecast:
        """Returns the forecast of a set.

        Args:
            name: its name.
            parts: its components.
            smallest: squared error of each image with the set of which it is smallest in the mean.
        """
        fit, alone, found = self.predictions.fit, self.predictions.alone, self.predictions.of(parts)
        gain, share = self._gain(parts), self._depth(parts)
        raised = share * self._raised(self.pilot)
        by_run = share * self.pilot.gain_error if raised and self.pilot is not None else 0.0
        own = float(np.hypot(MODEL_ERROR, by_run))
        rows = {part.id: row for row, part in enumerate(self.architecture.components)}
        trained = [Trained(rows[part.id], part.parameters) for part in parts]
        return SetForecast(
            name=name,
            components=tuple(part.id for part in parts),
            parameters=sum(part.parameters for part in parts),
            accuracy=min(1.0, max(0.0, fit.score + gain)),
            error=float(np.hypot(_standard_error(found.right), own)),
            gain=gain,
            gain_error=float(np.hypot(_standard_error(found.right - alone.right), own)),
            depth=share,
            raised=raised,
            squared_error=float(found.squared.mean()),
            excess_error=_standard_error(found.squared - smallest),
            cost=None if self.costs is None else self.costs.of(trained),
            rates=self._rates(parts),
        )


def _standard_error(values: np.ndarray) -> float:
    return float(np.std(values) / len(values) ** 0.5)


def limited_by(rule: SelectionRule, architecture: Architecture, costs: Costs | None) -> Limited:
    """Returns the budget of a rule, for the components of a model."""
    choice = rule.choice(architecture.components, architecture.parameters, lambda: costs)
    assert isinstance(choice, Limited)
    return choice


def _has_matrices(parts: Sequence[Component]) -> bool:
    return any(part.kind in MATRIX_KINDS for part in parts)


def _within(rule: SelectionRule) -> str:
    """Returns the name of the set that is found within a budget."""
    share, unit = parse_budget("budget", rule.budget)
    return f"within {share:g} of the {unit}"
