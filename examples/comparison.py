"""From training runs to tables and figures: what each method reached, and how well each criterion foretold it.

compare_components.py calls this for one pair of model and data. For several of them together:

    python examples/comparison.py --folders outputs/compare/* --destination examples/results
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from scipy import stats
from transformers import HfArgumentParser

from plasticity_peft import PlasticityReport
from plasticity_peft.files import write_text
from plasticity_peft.formatting import table
from plasticity_peft.plotting import COLOURS, MARKERS, STYLES

KINDS = ("LN1", "MHA", "LN2", "FC1", "FC2")
HEAD_ONLY = ("kind", "head only", "full")
SHOWN = ("parameter_plasticity", "rate_of_change-embedding")


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
    """Share of right answers on the images that choose the learning rate."""
    test_accuracy: float
    trainable_parameters: int
    """All that trains, the head included."""
    head_parameters: int
    train_loss: float
    """Mean over all steps."""
    gradient_norm_first: float
    """Norm of the gradient of all that trains beside the head, at the first step."""
    gradient_norm_mean: float
    """The same, mean over all steps."""
    gradient_norm_std: float
    """The same, standard deviation over all steps."""
    seconds: float
    """Time of training, evaluation not counted."""


class Comparison:
    """The runs of one pair of model and data, and the scores of the criteria."""

    def __init__(self, runs: Sequence[Run], reports: Mapping[str, PlasticityReport], picks: Mapping[str, str]) -> None:
        """Takes the runs, the report of each criterion, and the name of the method that trains what it picks."""
        self.runs = pd.DataFrame([asdict(run) for run in runs])
        self.reports, self.picks = reports, picks
        self.methods = self._methods()

    def _methods(self) -> pd.DataFrame:
        """Returns a row a method, at the learning rate with the best mean accuracy on the validation images."""
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
        """Returns the gain over the head alone: a row a seed, a column a kind. In mode "lora", norms train in full."""
        columns = {}
        for kind in KINDS:
            mode = "full" if kind.startswith("LN") else training
            if ("kind", kind, mode) in self.methods.index:
                columns[kind] = np.subtract(
                    self.methods.loc[("kind", kind, mode), "tests"], self.methods.loc[HEAD_ONLY, "tests"]
                )
        return pd.DataFrame(columns)

    def criteria(self) -> pd.DataFrame:
        """Returns a row for each criterion and mode of training: its ranking, rank correlation and regret."""
        rows = []
        blocks = self.methods.loc["blocks"]["test_accuracy"].droplevel("training") if self._has("blocks") else None
        for name, report in self.reports.items():
            scores = {row.kind: row.mean for row in report.kinds}
            for training in ("full", "lora") if self._has("kind") else ():
                gains = self.gains(training)
                mean = gains.mean()
                ranking = [row.unit for row in report.ranking()]
                tau, low, high, p = rank_correlation([scores[kind] for kind in gains], gains.to_numpy())
                row = {
                    "criterion": name,
                    "training": training,
                    "ranking": " > ".join(ranking),
                    "truth": " > ".join(mean.sort_values(ascending=False).index),
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

    def _has(self, group: str) -> bool:
        return group in self.methods.index.get_level_values("group")

    def write(self, folder: Path) -> None:
        """Writes runs.csv, methods.csv, criteria.csv, results.md and the figures into `folder`."""
        self.runs.to_csv(folder / "runs.csv", index=False, float_format="%.6g")
        self.methods.drop(columns=["tests", "seeds"]).to_csv(folder / "methods.csv", float_format="%.6g")
        criteria = self.criteria()
        criteria.to_csv(folder / "criteria.csv", index=False, float_format="%.6g")
        write_text(folder / "results.md", self.as_markdown(criteria))
        mpl.use("agg")
        if self._has("kind"):
            self.draw_gains(folder / "gain.png")
            self.draw_learning_rates(folder / "learning_rates.png")

    def as_markdown(self, criteria: pd.DataFrame) -> str:
        """Returns the tables of the methods and of the criteria."""
        names = {method: [c for c, pick in self.picks.items() if pick == method] for method in self.picks.values()}
        rows = []
        for (group, method, training), row in self.methods.iterrows():
            shown = ", ".join(names[method]) if group == "blocks" else method
            rows.append(
                (
                    group,
                    shown,
                    training,
                    f"{row['parameters']:,}",
                    f"{row['learning_rate']:g}" + (" *" if row["at_edge"] else ""),
                    f"{100 * row['test_accuracy']:.1f}",
                    f"{100 * row['test_standard_error']:.1f}",
                    f"{100 * row['gain']:+.1f}" if "gain" in row else "",
                    f"{row['gradient_norm_first']:.2g}",
                    f"{row['seconds']:.0f}",
                )
            )
        seeds = self.runs["seed"].nunique()
        text = table(
            f"Accuracy on test images in percent, {seeds} seeds; each method at its best rate on validation images\n"
            "(* the lowest or highest that was tried). Parameters: what trains beside the head.\n",
            ("group", "method", "mode", "parameters", "rate", "test", "s.e.", "gain", "gradient", "s"),
            rows,
        )
        if len(criteria):
            text += "\n\n" + table(
                "Criteria: Kendall's tau between score and gain over the five kinds (95 % interval over seeds; exact\n"
                "p); regret: points lost against the best kind by training the kind that ranks first; blocks: points\n"
                "lost against the best choice of single components at an equal number of parameters.\n",
                ("criterion", "mode", "ranking", "tau", "interval", "p", "regret", "blocks"),
                [
                    (
                        row["criterion"],
                        row["training"],
                        row["ranking"].replace(" ", ""),
                        f"{row['kendall_tau']:+.1f}",
                        f"{row['tau_low']:+.1f} {row['tau_high']:+.1f}",
                        f"{row['p_value']:.2f}",
                        f"{row['regret_points']:.1f}",
                        f"{row['block_regret_points']:.1f}" if row.get("block_regret_points", np.nan) >= 0 else "",
                    )
                    for _, row in criteria.iterrows()
                ],
            )
        return text + "\n"

    def draw_gains(self, path: Path) -> None:
        """Draws the gain of each kind against its score, for the default and for the paper's measure."""
        import matplotlib.pyplot as plt

        shown = [name for name in SHOWN if name in self.reports] or list(self.reports)[:1]
        figure, axes = plt.subplots(
            1, len(shown), figsize=(4.5 * len(shown), 3.6), sharey=True, squeeze=False, layout="constrained"
        )
        for ax, name in zip(axes[0], shown, strict=True):
            report = self.reports[name]
            scores = {row.kind: row for row in report.kinds}
            lines = []
            for training, filled in (("full", True), ("lora", False)):
                gains = 100 * self.gains(training)
                tau, low, high, _ = rank_correlation([scores[kind].mean for kind in gains], gains.to_numpy())
                lines.append(f"{training}: tau {tau:+.1f} [{low:+.1f}, {high:+.1f}]")
                for index, kind in enumerate(KINDS):
                    if kind not in gains or (training == "lora" and kind.startswith("LN")):
                        continue
                    ax.errorbar(
                        scores[kind].mean, gains[kind].mean(),
                        xerr=1.96 * scores[kind].standard_error, yerr=gains[kind].std() if len(gains) > 1 else None,
                        fmt=MARKERS[index], color=COLOURS[index], capsize=2, label=f"{kind} ({training})",
                        markerfacecolor=COLOURS[index] if filled else "white",
                    )  # fmt: skip
            ax.set(xscale="log", xlabel=f"{report.title} of the kind", title="\n".join([name, *lines]))
            ax.title.set_fontsize(9)
            ax.grid(alpha=0.3)
        axes[0][0].set_ylabel("gain over the head alone, points")
        axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        figure.savefig(path, dpi=130)
        plt.close(figure)

    def draw_learning_rates(self, path: Path) -> None:
        """Draws the test accuracy by learning rate, with the range over seeds, a line a kind."""
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for ax, training in zip(axes, ("full", "lora"), strict=True):
            runs = self.runs[(self.runs["group"] == "kind") & (self.runs["training"] == training)]
            for index, name in enumerate((*KINDS, "everything", "head only")):
                own = runs[runs["method"] == name].groupby("learning_rate")["test_accuracy"]
                if not len(own):
                    continue
                mean = 100 * own.mean()
                look = {"color": COLOURS[index % len(COLOURS)]}
                ax.plot(
                    mean.index, mean, STYLES[index % 5], marker=MARKERS[index % 5], markersize=4, label=name, **look
                )
                ax.fill_between(mean.index, 100 * own.min(), 100 * own.max(), alpha=0.2, linewidth=0, **look)
            ax.set(xscale="log", xlabel="learning rate", title=f"trained alone, {training}")
            ax.grid(alpha=0.3)
        axes[0].set_ylabel("test accuracy, percent")
        axes[0].legend(fontsize=8)
        figure.savefig(path, dpi=130)
        plt.close(figure)


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


@dataclass
class Arguments:
    """Which comparisons are put together."""

    folders: list[str] = field(metadata={"help": "Output folders of compare_components.py."})
    destination: str = field(
        default="examples/results", metadata={"help": "Where the tables and figures are written."}
    )


def summary(comparisons: Mapping[str, Comparison]) -> str:
    """Returns tables over all pairs of model and data.

    Regret and rank correlation of each criterion; accuracy at an equal number of parameters.
    """
    pairs = list(comparisons)
    criteria = {pair: comparisons[pair].criteria().set_index(["criterion", "training"]) for pair in pairs}
    names = list(dict.fromkeys(name for pair in pairs for name in comparisons[pair].reports))
    parts = []
    for training in ("full", "lora"):
        for column, what in (
            ("regret_points", "points lost against the best kind by training the kind that ranks first"),
            ("kendall_tau", "Kendall's tau between score and gain over the five kinds"),
        ):
            rows = []
            for name in names:
                values = [criteria[pair][column].get((name, training), np.nan) for pair in pairs]
                worst = np.nanmax(values) if column == "regret_points" else np.nanmean(values)
                rows.append((worst, (name, *(f"{value:.1f}" for value in values), f"{worst:.1f}")))
            rows.sort(key=lambda row: row[0] if column == "regret_points" else -row[0])
            last = "worst" if column == "regret_points" else "mean"
            parts.append(table(f"{training}: {what}\n", ("criterion", *pairs, last), [row for _, row in rows]))
    return "\n\n".join([*parts, equal_parameters(comparisons)]) + "\n"


def equal_parameters(comparisons: Mapping[str, Comparison]) -> str:
    """Returns a table of the methods with an equal number of parameters, and of what has more or fewer."""
    columns = {}
    for pair, comparison in comparisons.items():
        found = {}
        defaults = 0
        for (group, method, training), row in comparison.methods.iterrows():
            name = re.sub(r" r=\d+$", "", method)
            if group == "default":
                defaults += 1
                name = f"default criterion, top {defaults} by kind"
            elif group == "blocks":
                criteria = [criterion for criterion, pick in comparison.picks.items() if pick == method]
                found |= {f"{criterion}, by block": row["test_accuracy"] for criterion in criteria}
                continue
            elif group == "kind":
                if method not in ("head only", "everything"):
                    continue
                name = f"{method} ({training}; other number)"
            name = re.sub(r"last \d+ blocks?", "last blocks", name)
            found[name] = row["test_accuracy"]
        columns[pair] = 100 * pd.Series(found)
    frame = pd.DataFrame(columns)
    frame["mean"] = frame.mean(axis=1, skipna=False)
    frame = frame.sort_values("mean", ascending=False)
    return table(
        "lora: test accuracy in percent at an equal number of parameters (as near as ranks allow)\n",
        ("method", *frame.columns),
        [(name, *("" if np.isnan(value) else f"{value:.1f}" for value in row)) for name, row in frame.iterrows()],
    )


def main() -> None:
    """Parses the arguments and writes the summary, with the tables and figures of each pair."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    comparisons = {Path(folder).name: load(Path(folder)) for folder in arguments.folders}
    destination = Path(arguments.destination)
    for name, comparison in comparisons.items():
        (destination / name).mkdir(parents=True, exist_ok=True)
        comparison.write(destination / name)
        shutil.copy(Path(arguments.folders[list(comparisons).index(name)]) / "settings.json", destination / name)
    write_text(destination / "summary.md", summary(comparisons))


if __name__ == "__main__":
    main()
