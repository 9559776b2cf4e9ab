"""From training runs to statistics: accuracy and cost of each method, and how well each criterion chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forecasts
import numpy as np
import pandas as pd
from methods import EVERYTHING, KINDS
from scipy import stats

from plasticity_peft.report.forecast import Forecast

LORA = "LoRA on all linear layers, r=8"
CONFIDENCE = 0.95
COSTS = ("parameters", "time", "memory")
"""What a method takes, as a ratio to everything in full."""
RATES = {
    "best": "the rates that are best on validation images with one seed",
    "confirmed": "of these and the recommended rates, those with the better mean validation accuracy over all seeds",
    "recommended": "the recommended rates",
}
"""At which learning rates methods are compared."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    factor: float
    """The learning rates, as a multiple of the recommended ones."""
    seed: int
    """Seed of the order of the images, and of LoRA."""
    steps: list[int]
    """Numbers of the steps after which the accuracy was computed; the last one is the end of training."""
    validation: list[float]
    """Accuracy on validation images after each of these steps."""
    test: list[float]
    """Accuracy on test images after each of these steps."""
    gradient_norm_first: float
    """Norm of the gradient of all parameters that train, at the first step."""
    gradient_norm_mean: float
    """The same, mean over all steps."""
    gradient_norm_std: float
    """The same, standard deviation over all steps."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The runs of one method, and its cost."""

    group: str
    """One of `methods.GROUPS`."""
    method: str
    training: str
    """"full" or "lora"."""
    units: list[str]
    """The components that train, if they are whole components."""
    modules: int
    """Number of modules that train; 0: the whole model."""
    parameters: int
    """Number of parameters that train, without the head."""
    rates: dict[str, float]
    """Recommended learning rate of each group of parameters."""
    best_factor: float
    """Multiple of the recommended rates that is best on validation images, with one seed."""
    tuned: list[Run]
    """One run at each multiple that was tried; empty if only the recommended rates were."""
    runs: list[Run]
    """Runs of all seeds at the best multiple, and at the recommended rates."""
    formula: dict[str, float]
    """Cost by formula: "time", "activations" and "memory" as ratios to everything; empty if there is none."""
    cost: dict[str, Any] = field(default_factory=dict)
    """The same ratios as measured, the seconds of a step, and bytes of memory; empty if it was not measured."""

    def factor(self, rates: str = "best") -> float:
        """Returns the learning rates as a multiple of the recommended ones; `rates` is one of `RATES`."""
        if rates != "confirmed":
            return 1.0 if rates == "recommended" else self.best_factor
        found: dict[float, list[float]] = {self.best_factor: []}
        for run in self.runs:
            found.setdefault(run.factor, []).append(run.validation[-1])
        return max(found, key=lambda factor: np.mean(found[factor]))

    def accuracy(self, rates: str = "best") -> float:
        """Returns the mean test accuracy over the seeds, at learning rates of `RATES`."""
        return float(np.mean(list(self.tests(self.factor(rates)).values())))

    def tests(self, factor: float) -> dict[int, float]:
        """Returns the test accuracy at the end of the runs at a multiple of the recommended rates, by seed."""
        return {run.seed: run.test[-1] for run in self.runs if run.factor == factor}


class Comparison:
    """The results of one pair of a model and images."""

    def __init__(
        self,
        results: Sequence[Result],
        first: Mapping[str, str],
        picks: Mapping[str, str],
        head: Mapping[str, float],
        model: str,
        forecasts: Mapping[str, Forecast],
        scores: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Keeps what was found.

        Args:
            results: the result of each method.
            first: the kind that each criterion ranks first, by the name of the criterion.
            picks: the name under which each method was trained. Some methods train the same modules.
            head: accuracies of the fitted head, and numbers of images.
            model: name of the model.
            forecasts: what was forecast, by scope; see `forecasts.SCOPES`.
            scores: the score of each kind, by the name of the criterion.
        """
        self.model = model
        self.results = {f"{result.method} ({result.training})": result for result in results}
        self.first, self.picks, self.head, self.forecasts, self.scores = first, picks, head, forecasts, scores
        self.everything = next((result for result in results if result.method == EVERYTHING), None)
        self.tuned = any(result.tuned for result in results)
        """Whether rates were tuned. If not, the best rates that are known are the recommended ones."""

    def table(self, rates: str = "best") -> pd.DataFrame:
        """Returns one row per method, by name, at learning rates of `RATES`.

        If some methods were tuned, those that were not are in the table of the recommended rates alone.
        """
        rows = {}
        for name, result in self.results.items():
            if self.tuned and not result.tuned and rates != "recommended":
                continue
            tests = result.tests(result.factor(rates))
            low, high = self.difference(result, rates)
            cost = result.cost or result.formula or dict.fromkeys(COSTS, 1.0 if result is self.everything else np.nan)
            rows[name] = {
                "group": result.group,
                "method": result.method,
                "training": result.training,
                "parameters": result.parameters,
                "best_factor": result.best_factor,
                "test": result.accuracy(rates),
                "standard_error": stats.sem(list(tests.values())) if len(tests) > 1 else np.nan,
                "gain": result.accuracy(rates) - self.head["test_accuracy"],
                "low": low,
                "high": high,
                "time": cost.get("time", np.nan),
                "activations": cost.get("activations", np.nan),
                "memory": cost.get("memory", np.nan),
                "range_of_rates": range_of_rates(result),
            }
        return sorted_by(pd.DataFrame.from_dict(rows, orient="index"), "test", ascending=False)

    def difference(self, result: Result, rates: str = "best") -> tuple[float, float]:
        """Returns the interval of the difference to everything in full, paired by seed; NaN if there is none."""
        if self.everything is None:
            return np.nan, np.nan
        own, other = (one.tests(one.factor(rates)) for one in (result, self.everything))
        return interval([own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())])

    def whole_table(self) -> pd.DataFrame:
        """Returns the table at the best rates, with a column "recommended": the accuracy at the recommended rates.

        Methods whose rates were not tuned have no other accuracy. They come last.
        """
        best, found = self.table(), self.table("recommended")
        whole = best.reindex([*best.index, *found.index.difference(best.index, sort=False)])
        same = ["group", "method", "training", "parameters", "best_factor", "time", "activations", "memory"]
        whole[same] = found.loc[whole.index, same]
        return whole.assign(recommended=found["test"])

    def regrets(self) -> pd.DataFrame:
        """Returns the points that each criterion loses: by the kind that it ranks first, and by its components.

        The kind is compared with the best kind in full, at the best rates. Components are compared with the best
        selection of the same share of the weights, random ones among them, at the recommended rates.
        """
        kinds = {row["method"]: row["test"] for _, row in self.table().iterrows() if row["method"] in KINDS}
        rows, selected = [], self.selected()
        for criterion, first in self.first.items():
            row: dict[str, Any] = {"criterion": criterion, "first": first}
            row["kind"] = 100 * (max(kinds.values(), default=np.nan) - kinds.get(first, np.nan))
            for share, found in selected.items():
                if criterion in found:
                    row[share] = 100 * (max(found.values()) - found[criterion])
            rows.append(row)
        return pd.DataFrame(rows)

    def kinds(self) -> pd.DataFrame:
        """Returns one row per kind that was trained in full: "difference" to everything, "standard_error", and scores.

        The difference is in points, at the best rates, with its standard error over the seeds. There is a column for
        each criterion.
        """
        found = self.table()
        rows = found[found["method"].isin(KINDS) & (found["training"] == "full")].set_index("method")
        everything = found.loc[f"{EVERYTHING} (full)", "test"]
        columns = {
            "difference": 100 * (rows["test"] - everything),
            "standard_error": 100 * rows["standard_error"],
            **{name: pd.Series(scores) for name, scores in self.scores.items()},
        }
        return pd.DataFrame(columns).reindex([kind for kind in KINDS if kind in rows.index])

    def orders(self) -> pd.Series:
        """Returns Kendall's rank correlation of the score of a kind and its accuracy, by criterion."""
        kinds = self.kinds()
        return pd.Series(
            {name: stats.kendalltau(kinds[name], kinds["difference"]).statistic for name in self.scores}, dtype=float
        )

    def selected(self) -> dict[str, dict[str, float]]:
        """Returns the accuracy of the components that each criterion ranks first, at the recommended rates.

        It is by share of the weights, and by criterion. Criteria whose components were not trained are left out.
        """
        trained = {one.method: one.accuracy("recommended") for one in self.results.values() if one.training == "full"}
        found: dict[str, dict[str, float]] = {}
        for name, method in self.picks.items():
            criterion, _, share = name.rpartition(", ")
            if share.startswith("0.") and method in trained:
                found.setdefault(share, {})[criterion] = trained[method]
        return found


def sorted_by(frame: pd.DataFrame, column: str, ascending: bool = True) -> pd.DataFrame:
    """Returns the rows in the order of a column, and by their names where its values are equal but for rounding."""
    by_name = frame.sort_index()
    return by_name.sort_values(column, ascending=ascending, kind="stable", key=lambda values: values.round(9))


def front(methods: pd.DataFrame, cost: str, value: str) -> list[str]:
    """Returns the methods that no cheaper one equals, cheapest first.

    Examples:
        >>> methods = pd.DataFrame({"time": [1.0, 0.5, 0.7, np.nan], "test": [0.9, 0.8, 0.7, 1.0]}, list("abcd"))
        >>> front(methods, "time", "test")
        ['b', 'a']
    """
    best, found = -np.inf, []
    for name, row in methods.dropna(subset=[cost]).sort_values([cost, value], ascending=[True, False]).iterrows():
        if row[value] > best:
            best = row[value]
            found.append(str(name))
    return found


def means(comparisons: Mapping[str, Comparison]) -> pd.DataFrame:
    """Returns one row per method that was trained on all of some pairs, best first.

    Columns: "group", "method" and "training"; "difference" to everything in full at the best rates, in points, mean
    over the pairs, and the "worst" one; "parameters", "time" and "memory", means of the ratios to everything in full.
    """
    tables = {}
    for pair, comparison in comparisons.items():
        table = comparison.table()
        everything = table.loc[f"{EVERYTHING} (full)"]
        table["difference"] = 100 * (table["test"] - everything["test"])
        table["parameters"] = table["parameters"] / everything["parameters"]
        tables[pair] = table
    names = [
        name for name in next(iter(tables.values())).index if all(name in table.index for table in tables.values())
    ]
    rows = {}
    for name in names:
        own = pd.DataFrame([table.loc[name] for table in tables.values()])
        rows[name] = {
            **own.iloc[0][["group", "method", "training"]],
            "difference": own["difference"].mean(),
            "worst": own["difference"].min(),
            **{cost: own[cost].mean(skipna=False) for cost in COSTS},
        }
    return sorted_by(pd.DataFrame.from_dict(rows, orient="index"), "difference", ascending=False)


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Returns the ends of Student's interval of a mean difference; NaN for fewer than two.

    Examples:
        >>> [round(end, 2) for end in interval([1.0, 2.0, 3.0])]
        [-0.48, 4.48]
    """
    if len(differences) < 2:
        return np.nan, np.nan
    mean, error = float(np.mean(differences)), float(stats.sem(differences))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
    return mean - half, mean + half


def range_of_rates(result: Result) -> float:
    """Returns the largest rate within a point of the best validation accuracy, divided by the smallest such rate.

    It is NaN if no rates were tried.
    """
    if not result.tuned:
        return np.nan
    best = max(run.validation[-1] for run in result.tuned)
    near = [run.factor for run in result.tuned if run.validation[-1] >= best - 0.01]
    return max(near) / min(near)


def load(folder: Path) -> Comparison:
    """Returns the comparison whose results are in `folder`."""
    results = []
    for path in sorted((folder / "runs").glob("*.json")):
        values = json.loads(path.read_text())
        runs = {key: [Run(**run) for run in values.pop(key)] for key in ("tuned", "runs")}
        cost = folder / "costs" / path.name
        values["cost"] = json.loads(cost.read_text()) if cost.is_file() else {}
        results.append(Result(**values, **runs))
    names = ("criteria", "picks", "head", "settings")
    first, picks, head, settings = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    found = forecasts.load(folder / "forecast.json")
    path = folder / "scores.json"
    scores = json.loads(path.read_text()) if path.is_file() else {}
    return Comparison(results, first, picks, head, settings["model_name_or_path"], found, scores)
