"""From training runs to statistics: the accuracy of each method, and how well each criterion predicted it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from plasticity_peft import PlasticityReport

KINDS = ("LN1", "MHA", "LN2", "FC1", "FC2")
HEAD_ONLY = ("kind", "head only", "full")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    group: str
    """"kind", "default", "blocks" or "stock", as in `methods.Method`."""
    method: str
    training: str
    """"full" or "lora"."""
    learning_rate: float
    seed: int
    validation_accuracy: float
    """Accuracy on the images that are used to choose the learning rate."""
    test_accuracy: float
    trainable_parameters: int
    """Number of parameters that train, including the head."""
    head_parameters: int
    train_loss: float
    """Mean over all steps."""
    gradient_norm_first: float
    """Norm of the gradient of all parameters that train, without the head, at the first step."""
    gradient_norm_mean: float
    """The same, mean over all steps."""
    gradient_norm_std: float
    """The same, standard deviation over all steps."""
    seconds: float
    """Time of training, evaluation not counted."""


class Comparison:
    """The runs of one pair of model and data, and the scores of the criteria."""

    def __init__(self, runs: Sequence[Run], reports: Mapping[str, PlasticityReport], picks: Mapping[str, str]) -> None:
        """Takes the runs, and for each criterion its report and the name of the method that trains its selection."""
        self.runs = pd.DataFrame([asdict(run) for run in runs])
        self.reports, self.picks = reports, picks
        self.methods = self._methods()

    def _methods(self) -> pd.DataFrame:
        """Returns one row per method, at the learning rate with the best mean accuracy on the validation images."""
        rows = []
        for name, runs in self.runs.groupby(["group", "method", "training"], sort=False):
            by_rate = runs.groupby("learning_rate")["validation_accuracy"].mean()
            rate = by_rate.idxmax()
            chosen = runs[runs["learning_rate"] == rate].sort_values("seed")
            test = chosen["test_accuracy"]
            rows.append(
                {
                    "group": name[0],
                    "method": name[1],
                    "training": name[2],
                    "parameters": int((chosen["trainable_parameters"] - chosen["head_parameters"]).iloc[0]),
                    "learning_rate": rate,
                    "at_edge": bool(rate in (by_rate.index.min(), by_rate.index.max())),
                    "validation_accuracy": by_rate.max(),
                    "test_accuracy": test.mean(),
                    "test_standard_error": test.sem() if len(test) > 1 else float("nan"),
                    "gradient_norm_first": chosen["gradient_norm_first"].mean(),
                    "gradient_norm_mean": chosen["gradient_norm_mean"].mean(),
                    "gradient_norm_std": chosen["gradient_norm_std"].mean(),
                    "seconds": chosen["seconds"].mean(),
                    "seeds": tuple(chosen["seed"]),
                    "tests": tuple(test),
                }
            )
        methods = pd.DataFrame(rows).set_index(["group", "method", "training"])
        if HEAD_ONLY in methods.index:
            methods["gain"] = methods["test_accuracy"] - methods.loc[HEAD_ONLY, "test_accuracy"]
        return methods

    def gains(self, training: str) -> pd.DataFrame:
        """Returns the gain over the head alone, (seeds, kinds). In mode "lora", norms train in full."""
        columns = {}
        for kind in KINDS:
            mode = "full" if kind.startswith("LN") else training
            if ("kind", kind, mode) in self.methods.index:
                columns[kind] = np.subtract(
                    self.methods.loc[("kind", kind, mode), "tests"], self.methods.loc[HEAD_ONLY, "tests"]
                )
        return pd.DataFrame(columns)

    def criteria(self) -> pd.DataFrame:
        """Returns one row per criterion and training mode: its ranking, rank correlation and regret."""
        rows = []
        blocks = self.methods.loc["blocks"]["test_accuracy"].droplevel("training") if self.has("blocks") else None
        for name, report in self.reports.items():
            scores = {row.kind: row.mean for row in report.kinds}
            for training in ("full", "lora") if self.has("kind") else ():
                gains = self.gains(training)
                mean = gains.mean().reindex(KINDS)  # NaN for a kind that was not trained
                ranking = [row.unit for row in report.ranking()]
                tau, low, high, p = rank_correlation([scores[kind] for kind in gains], gains.to_numpy())
                row = {
                    "criterion": name,
                    "training": training,
                    "ranking": " > ".join(ranking),
                    "truth": " > ".join(mean.dropna().sort_values(ascending=False).index),
                    "kendall_tau": tau,
                    "tau_low": low,
                    "tau_high": high,
                    "p_value": p,
                    "regret_points": 100 * (mean.max() - mean[ranking[0]]),
                    "regret_points_of_two": 100 * (mean.max() - max(mean[kind] for kind in ranking[:2])),
                }
                if blocks is not None and training == "lora" and name in self.picks:
                    row["block_accuracy"] = blocks[self.picks[name]]
                    row["block_regret_points"] = 100 * (blocks.max() - blocks[self.picks[name]])
                rows.append(row)
        return pd.DataFrame(rows)

    def has(self, group: str) -> bool:
        """Returns whether there are runs of this group of methods."""
        return group in self.methods.index.get_level_values("group")


def rank_correlation(scores: Sequence[float], gains: np.ndarray) -> tuple[float, float, float, float]:
    """Returns Kendall's tau of scores and mean gains, the ends of its 95 % interval over seeds, and its p-value.

    Args:
        scores: (kinds,).
        gains: (seeds, kinds). The interval is the percentile bootstrap over seeds, and NaN for one seed.
    """

    def tau(rows: np.ndarray) -> float:
        return float(stats.kendalltau(scores, gains[rows.astype(int)].mean(axis=0)).statistic)

    everything = np.arange(len(gains))
    p = float(stats.kendalltau(scores, gains.mean(axis=0)).pvalue)
    if len(gains) < 2:
        return tau(everything), float("nan"), float("nan"), p
    interval = stats.bootstrap(
        (everything,), tau, vectorized=False, n_resamples=500, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return tau(everything), float(interval.low), float(interval.high), p


def load(folder: Path) -> Comparison:
    """Returns the comparison whose runs are in `folder`."""
    runs = [Run(**json.loads(path.read_text())) for path in sorted((folder / "runs").glob("*.json"))]
    reports = {path.stem: PlasticityReport.load(path) for path in sorted((folder / "reports").glob("*.json"))}
    picks = folder / "picks.json"
    return Comparison(runs, reports, json.loads(picks.read_text()) if picks.is_file() else {})
