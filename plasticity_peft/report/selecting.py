"""Makes selections from a report, without warnings: `PlasticityReport.select_by` adds them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from plasticity_peft.checks import TRAINING_MODES
from plasticity_peft.report.confidence import tied
from plasticity_peft.report.cost import Trained
from plasticity_peft.report.scores import BaseReport
from plasticity_peft.report.selection import Selection, SelectionRule
from plasticity_peft.report.text import confidence_of


class Selector:
    """Selects from a report by one rule, as much as it is told.

    Args:
        report: the report.
        rule: which units there are, and how they train. Its own `top_k` and `budget` are ignored.
    """

    def __init__(self, report: BaseReport, rule: SelectionRule) -> None:
        self.report, self.rule = report, rule
        self.ranking = report.ranking(rule.granularity, rule.candidates)
        """The units, best first."""

    def select(self, top_k: int | None = None, budget: float | str | None = None) -> Selection:
        """Returns the selection of the best units; see `PlasticityReport.select`."""
        report, rule = self.report, replace(self.rule, top_k=top_k, budget=budget)
        choice = rule.choice(report.scores, report.model_parameters, lambda: report.costs, self._trained)
        names = [row.unit for row in self.ranking]
        choice.check_possible(names)
        units = choice.chosen(names)
        rows = [row for row in report.scores if rule.unit_of(row) in units]
        parts = [part for unit in units for part in self._trained[unit]]
        return Selection(
            granularity=rule.granularity,
            units=units,
            components=tuple(row.id for row in rows),
            modules=tuple(path for row in rows for path in row.modules),
            parameters={mode: sum(self._counts[row.id][mode] for row in rows) for mode in TRAINING_MODES},
            model_parameters=report.model_parameters,
            confidence=confidence_of(report, choice, self.ranking),
            tied=tied(choice, self.ranking),
            cost=None if report.costs is None else report.costs.of(parts),
        )

    def size(self, unit: str) -> int:
        """Returns how many parameters of a unit train."""
        return sum(part.parameters for part in self._trained[unit])

    @cached_property
    def _trained(self) -> dict[str, list[Trained]]:
        return self.rule.trained(self.report.scores)

    @cached_property
    def _counts(self) -> dict[str, dict[str, int]]:
        return {row.id: self.rule.parameters_of(row) for row in self.report.scores}


def selected_by(report: BaseReport, rule: SelectionRule) -> Selection:
    """Returns the selection that `rule` makes, without a warning."""
    return Selector(report, rule).select(rule.top_k, rule.budget)
