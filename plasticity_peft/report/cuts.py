"""Every cut of a ranking that the page of a report offers, each made by the library's own selection.

A cut ends the ranking at a number of units, or at a budget of parameters, time or memory. The page only looks up what
is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from plasticity_peft.arguments import name_components
from plasticity_peft.checks import GRANULARITIES, TRAINING_MODES
from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import SelectionError
from plasticity_peft.report.scores import BaseReport
from plasticity_peft.report.selecting import Selector
from plasticity_peft.report.selection import Selection, SelectionRule, rounded_up

LIMITS = ("units", "parameters", "time", "memory")
"""What can limit a selection: `top_k`, or a budget of one of three kinds."""
PERCENT = range(5, 101, 5)
"""Budgets of time and memory, in percent of what finetuning everything takes."""


@dataclass(frozen=True)
class Cut:
    """One place at which a ranking can end."""

    limit: int | float | str
    """The `top_k` or the `budget`."""
    selection: Selection


@dataclass(frozen=True)
class Series:
    """The cuts of one ranking by one kind of limit, from small to large."""

    granularity: str
    training: str
    limited: str
    """One of `LIMITS`."""
    cuts: tuple[Cut, ...]

    @property
    def name(self) -> str:
        """Name of the series, such as "kind lora units"."""
        return f"{self.granularity} {self.training} {self.limited}"

    def arguments(self, cut: Cut) -> dict[str, Any]:
        """Returns the arguments of `PlasticityReport.select` that differ from one cut to another."""
        limit = "top_k" if self.limited == "units" else "budget"
        return {limit: cut.limit, "granularity": self.granularity, "training": self.training}


def every_series(report: BaseReport, rule: SelectionRule) -> list[Series]:
    """Returns all series in which there is a cut.

    Args:
        report: the report.
        rule: what is the same in all cuts: candidates, and the options of LoRA.
    """
    found = []
    for granularity in ("component",) if name_components(rule.candidates) else GRANULARITIES:
        for training in TRAINING_MODES:
            selector = Selector(report, replace(rule, granularity=granularity, training=training))
            for limited in LIMITS:
                cuts = tuple(_cuts(selector, limited))
                found += [Series(granularity, training, limited, cuts)] if cuts else []
    return found


def rule_and_series(
    report: BaseReport, rule: SelectionRule, selection: Selection | None
) -> tuple[SelectionRule, list[Series]]:
    """Returns all series, and the rule that they follow, with the granularity of a given selection.

    An adapter does not keep the candidates of which its components were selected. If no cut makes the selection, the
    rule has the candidates among which it is first.

    Args:
        report: the report.
        rule: as in `every_series`.
        selection: a selection of the report, or None.
    """
    found = every_series(report, rule)
    if selection is None:
        return rule, found
    if place_of(found, selection, str(rule.training)):
        return replace(rule, granularity=selection.granularity), found
    rule = replace(rule, granularity=selection.granularity, candidates=_first_among(report, selection))
    return rule, every_series(report, rule)


def place_of(series: Sequence[Series], selection: Selection, training: str) -> tuple[Series, int] | None:
    """Returns a series with a cut that makes a selection, and the place of the cut in it; None if there is none."""
    for one in series:
        if (one.granularity, one.training) == (selection.granularity, training):
            for place, cut in enumerate(one.cuts):
                if set(cut.selection.units) == set(selection.units):
                    return one, place
    return None


def _first_among(report: BaseReport, selection: Selection) -> tuple[str, ...]:
    """Returns the most candidates among which the units of a selection are the first: kinds, and ids of components."""
    ranking = [row.unit for row in report.ranking(selection.granularity)]
    last = max(ranking.index(unit) for unit in selection.units)
    above = set(ranking[:last]) - set(selection.units)
    found = []
    for kind in KINDS:
        rows = [row for row in report.scores if row.kind == kind]
        left = [row.id for row in rows if not row.is_among(above)]
        found += [kind] if left and len(left) == len(rows) else left
    return tuple(found)


def _cuts(selector: Selector, limited: str) -> Iterator[Cut]:
    """Yields the cuts of a series. A parameter budget that selects the same as the one before is left out."""
    before: tuple[str, ...] = ()
    for limit in _limits(selector, limited):
        with suppress(SelectionError):  # no unit fits
            selection = selector.select(top_k=limit) if limited == "units" else selector.select(budget=limit)
            if limited != "parameters" or selection.units != before:
                before = selection.units
                yield Cut(limit, selection)


def _limits(selector: Selector, limited: str) -> list[Any]:
    if limited == "units":
        return list(range(1, len(selector.ranking) + 1))
    if limited == "parameters":
        totals = accumulate(selector.size(row.unit) for row in selector.ranking)
        shares = [rounded_up(total / selector.report.model_parameters) for total in totals]
        return sorted({share for share in shares if share <= 1})
    return [] if selector.report.costs is None else [f"{percent / 100:g} {limited}" for percent in PERCENT]
