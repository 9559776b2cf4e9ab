"""How much two reports agree: rank correlations of their scores, and the overlap of their best units."""

from __future__ import annotations

from typing import Any

import numpy as np

from plasticity_peft.checks import check_count
from plasticity_peft.errors import ReportError
from plasticity_peft.report.report import PlasticityReport


def check_comparable(first: PlasticityReport, second: PlasticityReport, names: tuple[str, str]) -> None:
    """Raises ReportError unless both reports score the same components, by canonical id."""
    ids = [{row.id for row in report.scores} for report in (first, second)]
    if ids[0] != ids[1]:
        contents = " and ".join(
            f"{name} scores the {len(own)} components of {report.model_type!r}, {report.scores[0].id} to "
            f"{report.scores[-1].id}"
            for name, own, report in zip(names, ids, (first, second), strict=True)
        )
        raise ReportError(f"The reports are of models with different components, and cannot be compared: {contents}.")


def agreement(
    first: PlasticityReport, second: PlasticityReport, *, granularity: str, top_k: int | None = None
) -> dict[str, Any]:
    """Returns how much two rankings agree: Spearman's rho, Kendall's tau-b, and which of the best units are the same.

    A correlation is None if all scores of a report are equal.

    Args:
        first: a report.
        second: a report of a model with the same components.
        granularity: "kind" or "component".
        top_k: number of best units to compare. By default a fifth of the units, and at least one.

    Raises:
        ConfigError: there are fewer than `top_k` units.
    """
    rankings = [report.ranking(granularity) for report in (first, second)]
    units = sorted(row.unit for row in rankings[0])
    top_k = max(1, len(units) // 5) if top_k is None else top_k
    check_count("top_k", top_k, 1, len(units), f", the number of units by {granularity}")
    scores = [{row.unit: row.score for row in ranking} for ranking in rankings]
    orders = [_order(np.array([found[unit] for unit in units])) for found in scores]
    best = [[row.unit for row in ranking[:top_k]] for ranking in rankings]
    shared = [unit for unit in best[0] if unit in best[1]]
    return {
        "granularity": granularity,
        "units": len(units),
        "spearman": _cosine(*(order.sum(axis=1) for order in orders)),
        "kendall": _cosine(*orders),
        "top_k": top_k,
        "shared": len(shared),
        "overlap": len(shared) / top_k,
        "best_of_both": shared,
        "best_of_first": best[0],
        "best_of_second": best[1],
    }


# scipy.stats has both correlations, but importing it takes longer than the rest of `plasticity-peft compare`. From the
# order of every pair of scores they are one line: the sum of a row is twice the centered rank, ties averaged.


def _order(scores: np.ndarray) -> np.ndarray:
    """Returns 1, 0 or -1 for every pair of scores: float64 of shape (units, units)."""
    order: np.ndarray = np.sign(np.subtract.outer(scores, scores))
    return order


def _cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    """Returns the cosine of the angle between two arrays; None if one of them is zero."""
    norm = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum() / norm) if norm else None
