"""How forecasts compare with the runs: the error of each gain, and what following the advice comes to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from methods import EVERYTHING, KINDS
from scipy import stats

from plasticity_peft.report.forecast import HALF_WIDTH, Forecast, SetForecast

if TYPE_CHECKING:
    from comparison import Comparison, Result

SCOPES = {"kinds": "default sets", "all": "all sets"}
"""What was forecast: the sets that `forecast_finetuning` has by default, and all that were trained."""


def load(path: Path) -> dict[str, Forecast]:
    """Returns the forecasts that compare_components.py wrote, by scope; none if there is no such file."""
    values = json.loads(path.read_text()) if path.is_file() else {}
    return {scope: Forecast.from_dict(found) for scope, found in values.items()}


def errors(comparison: Comparison) -> pd.DataFrame:
    """Returns one row per set that was forecast and trained, by the name of the method.

    Columns, in points: "forecast" and "trained" gain over the fitted head, at the best rates; "kernels", the forecast
    without short runs; "contained", whether the interval of the forecast contains the trained gain; the leave-one-out
    "squared_error"; and the "time" of a step, as a ratio to everything.
    """
    forecast, rows = comparison.forecasts["all"], {}
    for one in forecast.sets:
        result = trained(comparison, one)
        if result is not None:
            gain = result.accuracy() - comparison.head["test_accuracy"]
            rows[result.method] = {
                "forecast": 100 * one.gain,
                "trained": 100 * gain,
                "kernels": 100 * (one.gain - one.raised),
                "contained": abs(one.gain - gain) <= HALF_WIDTH * one.gain_error,
                "squared_error": np.nan if one.squared_error is None else one.squared_error,
                "time": np.nan if one.cost is None else one.cost.time,
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def orders(frame: pd.DataFrame) -> dict[str, float]:
    """Returns Spearman's rank correlation of the trained gain with the forecast, -squared_error, and the time.

    Args:
        frame: a table as `errors` returns it.
    """
    predictors = {
        "forecast": frame["forecast"],
        "squared error": -frame["squared_error"],
        "time of a step": frame["time"],
    }
    return {name: float(stats.spearmanr(values, frame["trained"]).statistic) for name, values in predictors.items()}


def trained(comparison: Comparison, one: SetForecast) -> Result | None:
    """Returns the runs in which exactly the components of a set trained in full; None if there are none."""
    if one.name == EVERYTHING:
        return comparison.everything
    found = (
        result for result in comparison.results.values() if result.units and set(result.units) == set(one.components)
    )
    return next(found, None)


def choices(comparison: Comparison, forecast: Forecast) -> dict[str, SetForecast | None]:
    """Returns what a forecast advises: None if finetuning is not expected to pay."""
    methods = [(one, trained(comparison, one)) for one in forecast.sets]
    kinds = [one for one, result in methods if result is not None and result.method in KINDS]
    best = {"kind of the largest gain": max(kinds, key=lambda one: one.gain)} if kinds else {}
    return {"recommended": forecast.recommended, "safest": forecast.safest, **best}


def advice(comparisons: Mapping[str, Comparison]) -> pd.DataFrame:
    """Returns what the advice of forecasts comes to, one row for each choice and scope.

    Columns: "scope", "choice"; the "mean" and the "worst" difference to everything in full at the best rates, in
    points; the mean "time" and "memory" of a step by formula, as ratios to everything; the number of "pairs"; and
    "chosen", how often each set was. If a forecast says that finetuning does not pay, the head alone is chosen.
    """
    rows = []
    for scope in SCOPES:
        found: dict[str, list[tuple[str, float, float, float]]] = {}
        for comparison in comparisons.values():
            if scope not in comparison.forecasts or comparison.everything is None:
                continue
            for choice, one in choices(comparison, comparison.forecasts[scope]).items():
                result = None if one is None else trained(comparison, one)
                if one is not None and result is None:
                    continue  # it was not trained
                accuracy = comparison.head["test_accuracy"] if result is None else result.accuracy()
                lost = 100 * (accuracy - comparison.everything.accuracy())
                name = "nothing but the head" if result is None else result.method
                cost = (np.nan, np.nan) if one is None or one.cost is None else (one.cost.time, one.cost.memory)
                found.setdefault(choice, []).append((name, lost, *cost))
        for choice, each in found.items():
            names, lost, time, memory = zip(*each, strict=True)
            times = {
                name: names.count(name) for name in sorted(set(names), key=lambda name: (-names.count(name), name))
            }
            rows.append(
                {
                    "scope": scope,
                    "choice": choice,
                    "mean": np.mean(lost),
                    "worst": np.min(lost),
                    "time": pd.Series(time).mean(),
                    "memory": pd.Series(memory).mean(),
                    "pairs": len(each),
                    "chosen": ", ".join(f"{count} x {name}" for name, count in times.items()),
                }
            )
    return pd.DataFrame(rows)
