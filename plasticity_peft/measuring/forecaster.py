"""Forecasts for any set of components from what was seen of the images. This module does not use the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby, product
from operator import attrgetter
from typing import TypeVar

import numpy as np

from plasticity_peft.arguments import parse_budget
from plasticity_peft.components.architecture import Architecture
from plasticity_peft.components.component import MATRIX_KINDS, Component, block_ids
from plasticity_peft.measuring.greedy import Greedy
from plasticity_peft.measuring.head import solve
from plasticity_peft.measuring.kernel_ridge import left_out, squared_error
from plasticity_peft.measuring.pilot import CLASSES, MORE_STEPS, STEPS
from plasticity_peft.measuring.processes import Share, failing_together, gathered, this_process
from plasticity_peft.measuring.ridge import Ridge, Sums
from plasticity_peft.measuring.tangents import Tangents
from plasticity_peft.report.cost import Costs, Trained
from plasticity_peft.report.forecast import Forecast, PilotRun, SetForecast
from plasticity_peft.report.head import HeadFit
from plasticity_peft.report.selection import Limited, SelectionRule

STRENGTHS = tuple(np.logspace(-0.5, 2.5, 13).tolist())
"""Strengths of the kernels to choose from, in units of the noise: the mean over images of the variance that finetuning
everything adds."""
POWER = 0.5
"""The strength of a set is that of everything times the share of its kernel to this power. 1 would be the plain sum of
kernels. Sets of few parameters train at larger rates."""
MOST_GROWN = 512
"""Largest number of images by which sets within a budget grow."""
MODEL_ERROR = 0.015
"""Standard deviation of the gain of trained models around a forecast, beside the error of its images. It does not
cover models whose features move far."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of n images."""

    numbers: np.ndarray
    """Position of each image in the order of drawing: int64 of shape (n,)."""
    features: np.ndarray
    """Input of the head's linear layer: float32 of shape (n, features)."""
    targets: np.ndarray
    """-1 and 1 for each class: float32 of shape (n, classes)."""
    sketches: dict[str, np.ndarray]
    """Sketched gradients of each layer, by path: float32 of shape (n, directions, numbers)."""

    @classmethod
    def together(cls, parts: Sequence[Seen]) -> Seen:
        """Returns the images of all parts, in the order of drawing."""
        order = np.argsort(np.concatenate([part.numbers for part in parts]))

        def ordered(values: Iterable[np.ndarray]) -> np.ndarray:
            return np.asarray(np.concatenate(list(values))[order])

        return cls(
            numbers=ordered(part.numbers for part in parts),
            features=ordered(part.features for part in parts),
            targets=ordered(part.targets for part in parts),
            sketches={path: ordered(part.sketches[path] for part in parts) for path in parts[0].sketches},
        )

    @classmethod
    def of_all(cls, share: Share, own: Sequence[Seen], architecture: Architecture) -> Seen:
        """Returns the images of all processes. `own` has those of this process, if there are any.

        Sketches are exchanged block by block, so that memory never holds messages of all blocks beside the result.
        """

        def all_of(part: Callable[[Seen], T]) -> list[T]:
            return [each for found in gathered(share, list(map(part, own))) for each in found]

        rest = all_of(lambda seen: replace(seen, sketches={}))
        order = np.argsort(np.concatenate([seen.numbers for seen in rest]))
        sketches = {}
        for _, block in groupby(architecture.components, key=attrgetter("block_id")):
            paths = [path for part in block for path in part.modules]
            found = all_of(partial(_of_layers, paths))
            sketches.update({path: np.concatenate([each[path] for each in found])[order] for path in paths})
        return replace(cls.together(rest), sketches=sketches)


def _of_layers(paths: Sequence[str], seen: Seen) -> dict[str, np.ndarray]:
    return {path: seen.sketches[path] for path in paths}


@dataclass(frozen=True, eq=False)
class Forecaster:
    """Forecasts from what was seen. The model takes no part."""

    architecture: Architecture
    seen: Seen
    costs: Costs | None
    rates: Callable[[Sequence[Component], int], dict[str, float] | None]
    """Returns the recommended rates of some components, beside a head of so many features."""
    pilot: PilotRun | None
    seed: int

    def with_runs(self, run: Callable[[int], PilotRun | None]) -> Forecaster:
        """Returns this forecaster with a short run, or with a longer one if the features move far.

        Args:
            run: trains a copy of the model for a number of steps.
        """
        short = run(STEPS)
        if self._raised(short) > 0:
            longer = run(MORE_STEPS)
            if longer is not None and short is not None and longer.gain > short.gain:
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
        some = slice(MOST_GROWN)
        head, targets, strength = self._head[some, some], self.seen.targets[some], self._strength
        greedy = Greedy(
            kernels={name: kernel[some, some] for name, kernel in self._kernels.items()},
            targets=targets,
            combined=lambda kernel: head + _strengthened(kernel, strength),
        )
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
        by_kernels = float((self._left_out(parts).right - self._alone.right).mean())
        return by_kernels + self._raised(self.pilot) * self._depth(parts)

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
        raised = self._raised(self.pilot)
        found = {name: self._left_out(parts) for name, parts in wanted.items()}
        smallest = min(found.values(), key=lambda one: float(one.squared.mean())).squared
        sets = tuple(self._of_set(name, parts, found[name], smallest, raised) for name, parts in wanted.items())
        return Forecast(
            model_type=self.architecture.model_type,
            seed=self.seed,
            head=self._fit,
            head_error=_standard_error(self._alone.right),
            head_squared_error=float(self._alone.squared.mean()),
            sets=sets,
            pilot=self.pilot,
            raised=raised,
        )

    @cached_property
    def _sums(self) -> Sums:
        return Sums.of(self.seen.features, self.seen.targets)

    @cached_property
    def _fit(self) -> HeadFit:
        return solve(self._sums, self.seen.features, self.seen.targets, None, Share(0, 1), CLASSES)

    @cached_property
    def _head(self) -> np.ndarray:
        """The kernel of the fitted head: (n, n), in units of the noise."""
        scaled = (self.seen.features - self._sums.x) / Ridge(self._sums).scale
        return np.asarray(scaled @ scaled.T / self._fit.penalty)

    @cached_property
    def _kernels(self) -> dict[str, np.ndarray]:
        return Tangents(self.seen.sketches).kernels(self.architecture)

    @cached_property
    def _strength(self) -> float:
        """The strength of the kernels at which everything has the smallest error."""
        whole, targets = np.sum(list(self._kernels.values()), axis=0, dtype=np.float64), self.seen.targets
        errors = [squared_error(left_out(self._head + each * whole, targets), targets) for each in STRENGTHS]
        return float(STRENGTHS[int(np.argmin(errors))])

    @cached_property
    def _alone(self) -> _LeftOut:
        return _LeftOut.of(self._head, self.seen.targets)

    @cached_property
    def _promised(self) -> float:
        """The gain that kernels promise for everything."""
        return float((self._left_out(self.architecture.components).right - self._alone.right).mean())

    def _left_out(self, parts: Sequence[Component]) -> _LeftOut:
        kernel = np.asarray(np.sum([self._kernels[part.id] for part in parts], axis=0, dtype=np.float64))
        return _LeftOut.of(self._head + _strengthened(kernel, self._strength), self.seen.targets)

    def _raised(self, run: PilotRun | None) -> float:
        """Returns by how much a run gained more than kernels promise for everything; 0 if it may be chance."""
        if run is None:
            return 0.0
        more = run.gain - self._promised
        return more if more > run.gain_error else 0.0

    @cached_property
    def _blocks(self) -> list[str]:
        return block_ids(self.architecture.components)

    def _depth(self, parts: Sequence[Component]) -> float:
        """Returns the share of the blocks from the first one in which a set trains. Earlier features do not move."""
        return 1 - min(self._blocks.index(part.block_id) for part in parts) / len(self._blocks)

    def _of_set(
        self, name: str, parts: Sequence[Component], found: _LeftOut, smallest: np.ndarray, raised: float
    ) -> SetForecast:
        """Returns the forecast of a set.

        Args:
            name: its name.
            parts: its components.
            found: how images are predicted from the others.
            smallest: squared error of each image with the set of which it is smallest in the mean.
            raised: what would be added to the gain of everything.
        """
        fit, gains = self._fit, found.right - self._alone.right
        share = self._depth(parts)
        raised *= share
        gain = float(gains.mean()) + raised
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
            gain_error=float(np.hypot(_standard_error(gains), own)),
            raised=raised,
            squared_error=float(found.squared.mean()),
            excess_error=_standard_error(found.squared - smallest),
            cost=None if self.costs is None else self.costs.of(trained),
            rates=self.rates(parts, fit.features),
        )


@dataclass(frozen=True, eq=False)
class _LeftOut:
    """How each of n images is predicted from all others."""

    right: np.ndarray
    """1 if its class is predicted, else 0: float64 of shape (n,)."""
    squared: np.ndarray
    """Squared error, sum over the classes: float64 of shape (n,)."""

    @classmethod
    def of(cls, kernel: np.ndarray, targets: np.ndarray) -> _LeftOut:
        """Predicts by a kernel in units of the noise, (n, n)."""
        predicted = left_out(kernel, targets)
        right = predicted.argmax(axis=1) == targets.argmax(axis=1)
        return cls(right.astype(np.float64), np.square(predicted - targets).sum(axis=1, dtype=np.float64))


def _standard_error(values: np.ndarray) -> float:
    return float(np.std(values) / len(values) ** 0.5)


def limited_by(rule: SelectionRule, architecture: Architecture, costs: Costs | None) -> Limited:
    """Returns the budget of a rule, for the components of a model."""
    choice = rule.choice(architecture.components, architecture.parameters, lambda: costs)
    assert isinstance(choice, Limited)
    return choice


def _has_matrices(parts: Sequence[Component]) -> bool:
    return any(part.kind in MATRIX_KINDS for part in parts)


def _strengthened(kernel: np.ndarray, strength: float) -> np.ndarray:
    """Returns the kernel of a set, in units of the noise, from the sum of the kernels of its components."""
    share = float(np.trace(kernel)) / len(kernel)
    return np.asarray(strength * share ** (POWER - 1) * kernel) if share > 0 else kernel


def _within(rule: SelectionRule) -> str:
    """Returns the name of the set that is found within a budget."""
    share, unit = parse_budget("budget", rule.budget)
    return f"within {share:g} of the {unit}"
