"""How sure a selection is: how far apart the units are whose order decides it.

Every two units are compared by a paired t test, sample by sample, because all units see the same samples. The result
is the distance of the two in standard errors of their difference, converted to the normal distribution: it takes the
degrees of freedom into account. The chance of so large a distance, or a larger one, between two equal units is p =
erfc(distance / sqrt(2)). The confidence of a selection is 1 minus the sum of p over all pairs of a selected and
another unit, times the number of looks at the ranking after which measuring could have stopped.

No correction for the selections that could have been made instead is needed: Gutmann & Maymin, "Is the selected
population the best?" (1987), prove this for independent means. For means that vary together, tests/report
simulates it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from math import erfc, isclose, sqrt
from typing import Annotated

from annotated_types import Interval

from plasticity_peft.constraints import Chance, PositiveCount
from plasticity_peft.report.selection import Choice, RankedUnit

FARTHEST = 37.0
"""Largest distance: beyond it p cannot be represented."""
SURE = 0.95
"""Selections below this confidence are warned of."""
NORMAL = 1.96
"""Number of standard errors on both sides of a mean that contain 95 % of a normal distribution."""
MOST_COMPONENTS = 400
"""Number of components up to which a report contains the distances of all pairs of components."""
EQUAL = 1e-12
"""Relative difference up to which two scores are equal: rounding leaves no less."""
MOST_TIED = 4
"""Number of tied units that a text names."""

Distance = Annotated[float, Interval(ge=0, le=FARTHEST)]


@dataclass(frozen=True)
class Separation:
    """How far apart the units of a report are, in standard errors of their difference."""

    kinds: tuple[Distance, ...]
    """Distances of all pairs of kinds, (0, 1), (0, 2), ..., in the order of the kinds in the report."""
    components: tuple[Distance, ...] | None
    """The same of the components; None if there are more than 400."""
    looks: PositiveCount
    """Number of looks at the ranking after which measuring could have stopped."""
    reached: Chance | None = None
    """Confidence of the selection that measuring was to settle; None if there was none."""

    def of(self, granularity: str) -> tuple[float, ...] | None:
        """Returns the distances of the units of a granularity."""
        return self.kinds if granularity == "kind" else self.components


def confidence(
    choice: Choice, ranking: Sequence[str], units: Sequence[str], distances: Sequence[float], looks: int
) -> float:
    """Returns the confidence of what `choice` selects from `ranking`.

    The chance that a selection is wrong and has a confidence of c or more is at most 1 - c. A tie counts as wrong.

    Args:
        choice: how much is selected.
        ranking: the units to select from, those with the highest scores first.
        units: all units, in the order of `distances`.
        distances: distances of all pairs of units, (0, 1), (0, 2), ...
        looks: number of looks at the ranking.

    Examples:
        >>> from plasticity_peft.report.selection import TopK
        >>> round(confidence(TopK(("a", "b"), 1), ("b", "a"), ("a", "b"), [1.96], looks=1), 3)
        0.95
    """
    number = {unit: place for place, unit in enumerate(units)}
    chances = 0.0
    for better, worse in choice.orders(ranking):
        first, second = sorted((number[better], number[worse]))
        before = first * len(units) - first * (first + 1) // 2
        chances += erfc(distances[before + second - first - 1] / sqrt(2))
    return max(0.0, 1.0 - looks * chances)


def tied(choice: Choice, ranking: Sequence[RankedUnit]) -> tuple[str, ...]:
    """Returns the units of equal score whose order decides what `choice` selects from `ranking`, best first.

    Examples:
        >>> from plasticity_peft.report.selection import TopK
        >>> ranking = [RankedUnit("a", 2.0, 0.1), RankedUnit("b", 1.0, 0.1), RankedUnit("c", 1.0, 0.1)]
        >>> tied(TopK(("a", "b", "c"), 1), ranking), tied(TopK(("a", "b", "c"), 2), ranking)
        ((), ('b', 'c'))
    """
    score = {row.unit: row.score for row in ranking}
    equal = (pair for pair in choice.orders(list(score)) if isclose(*map(score.__getitem__, pair), rel_tol=EQUAL))
    found = set(chain.from_iterable(equal))
    return tuple(unit for unit in score if unit in found)


def overlap(units: Collection[str], ranking: Sequence[RankedUnit]) -> bool:
    """Returns whether the 95 % interval of one of `units` overlaps that of another unit below it in the ranking.

    Such units can be told apart all the same, because they are compared by paired samples.

    Examples:
        >>> ranking = [RankedUnit("a", 9.0, 0.1), RankedUnit("b", 2.0, 0.3), RankedUnit("c", 1.0, 0.4)]
        >>> overlap(["a"], ranking), overlap(["a", "b"], ranking)
        (False, True)
    """
    lowest = float("inf")
    for row in ranking:
        if row.unit in units:
            lowest = min(lowest, row.score - NORMAL * row.standard_error)
        elif row.score + NORMAL * row.standard_error > lowest:
            return True
    return False


def in_words(confidence: float | None, tied: Sequence[str] = ()) -> str:
    """Returns a confidence as text, rounded down; for a tie, the units that are tied.

    Examples:
        >>> in_words(0.919), in_words(0.9999), in_words(0.0), in_words(None)
        ('91 %', 'above 99 %', 'below 1 %', 'unknown')
        >>> in_words(0.0, ("LN1", "LN2"))
        'none, because the scores of LN1 and LN2 are equal'
    """
    if tied:
        more = len(tied) - MOST_TIED
        named = [*tied[:MOST_TIED], f"{more} others"] if more > 0 else tied
        return f"none, because the scores of {', '.join(named[:-1])} and {named[-1]} are equal"
    if confidence is None:
        return "unknown"
    percent = 100 * confidence
    if percent > 99 or percent < 1:
        return "above 99 %" if percent > 99 else "below 1 %"
    return f"{int(percent)} %"
