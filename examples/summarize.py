"""From finished comparisons to tables and a figure.

compare_components.py calls this for one pair of a model and images. For several pairs, or for the runs that are in the
repository:

    python examples/summarize.py --folders outputs/compare/* --destination examples/results
    python examples/summarize.py --folders examples/results/{demo,dinov2,vit}-* --destination examples/results
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from comparison import COSTS, RATES, Comparison, front, load, means, sorted_by
from comparison_figures import draw_fronts, draw_kinds
from forecasts import SCOPES, advice, errors, orders
from methods import EVERYTHING
from transformers import HfArgumentParser

from plasticity_peft.files import write_text
from plasticity_peft.report.tables import table

ALIKE = {
    "0.17": ("MHA of the first half", "MHA of the last half"),
    "0.33": ("MHA", "FC1", "FC2"),
    "0.50": ("MHA + FC1 of the first half",),
}
"""Methods that train as many weights as a share of those of all usual blocks."""


@dataclass
class Arguments:
    """The comparisons to summarize."""

    folders: list[str] = field(metadata={"help": "Output folders of compare_components.py."})
    destination: str = field(
        default="examples/results", metadata={"help": "Folder to write the tables and the figure to."}
    )


def write(comparison: Comparison, folder: Path) -> None:
    """Writes methods.csv and results.md of one pair into `folder`, and front.png if everything was trained."""
    write_tables(comparison, folder)
    if comparison.everything is not None:
        draw_fronts({folder.name: means({folder.name: comparison})}, folder / "front.png")


def write_tables(comparison: Comparison, folder: Path) -> None:
    """Writes methods.csv and results.md of one pair into `folder`."""
    comparison.whole_table().to_csv(folder / "methods.csv", float_format="%.6g", index_label="name")
    write_text(folder / "results.md", as_markdown(comparison))


def as_markdown(comparison: Comparison) -> str:
    """Returns the tables of one pair: the methods, and the criteria."""
    head = comparison.head
    rows = [("the fitted head alone", "", "", _points(head["test_accuracy"]), "", "", "", "", "", "", "")]
    for _, row in comparison.whole_table().iterrows():
        difference = "" if np.isnan(row["low"]) else f"{_signed(row['low'])} to {_signed(row['high'])}"
        rows.append(
            (
                row["method"],
                row["training"],
                f"{row['parameters']:,}",
                _points(row["test"]),
                "" if np.isnan(row["standard_error"]) else f"{100 * row['standard_error']:.1f}",
                difference,
                _points(row["recommended"]),
                f"{row['best_factor']:.2g}",
                "" if np.isnan(row["range_of_rates"]) else f"{row['range_of_rates']:.3g}",
                *("" if np.isnan(row[name]) else f"{row[name]:.2f}" for name in ("time", "memory")),
            )
        )
    text = table(
        f"Accuracy on {head['test_images']:,} test images in percent, after training on {head['train_images']:,}.\n"
        "Each method has the learning rates that are best on validation images; those without an accuracy were\n"
        "trained at the recommended rates alone. Difference: 95 % interval of the difference to everything in full,\n"
        "paired by seed. Recommended: accuracy at the recommended rates. Factor: the best rates as a multiple of the\n"
        "recommended ones. Range: largest divided by smallest rate within a point of the best on validation images.\n"
        "Time and memory of a training step: everything in full is 1.\n",
        (
            "method",
            "mode",
            "parameters",
            "test",
            "s.e.",
            "difference",
            "recommended",
            "factor",
            "range",
            "time",
            "memory",
        ),
        rows,
    )
    regrets = comparison.regrets()
    if len(regrets) and regrets["kind"].notna().any():
        text += "\n\n" + criteria(regrets)
    return text + "\n"


def criteria(regrets: pd.DataFrame) -> str:
    """Returns the table of the criteria of one pair."""
    shares = [column for column in regrets if column not in ("criterion", "first", "kind")]
    rows = [
        (
            criterion,
            row["first"],
            *("" if pd.isna(row[name]) else f"{row[name]:.1f}" for name in ("kind", *shares)),
        )
        for criterion, row in sorted_by(regrets.set_index("criterion"), "kind").iterrows()
    ]
    return table(
        "Points that each criterion loses: by the kind that it ranks first, against the best kind, at the best\n"
        "rates; and by the components that it ranks first, at a share of the weights, against the best such\n"
        "selection, at the recommended rates.\n",
        ("criterion", "first kind", "kind", *shares),
        rows,
    )


def summary(comparisons: Mapping[str, Comparison]) -> str:
    """Returns the tables over all pairs: the difference to everything, the criteria, and the recommended rates."""
    trained = {pair: one for pair, one in comparisons.items() if one.everything is not None}
    parts = [differences(trained, rates) for rates in RATES] if trained else []
    parts += [fronts(name, table) for name, table in tables_of_means(comparisons).items()]
    kinds = {pair: one.regrets().set_index("criterion")["kind"] for pair, one in comparisons.items() if one.first}
    frame = pd.DataFrame(kinds).dropna(how="all")
    if len(frame):
        frame["mean"], frame["worst"] = frame.mean(axis=1), frame.max(axis=1)
        parts.append(
            as_table(
                "Points lost against the best kind in full by training the kind that a criterion ranks first",
                "criterion",
                sorted_by(frame, "mean"),
            )
        )
    ordered = {pair: one.orders() for pair, one in trained.items() if one.scores}
    if ordered:
        frame = pd.DataFrame(ordered)
        frame["mean"], frame["worst"] = frame.mean(axis=1), frame.min(axis=1)
        parts.append(
            as_table(
                "Kendall's rank correlation of the score of a kind and its accuracy in full, at the best rates: 1 if\n"
                "a criterion orders the five kinds as training does",
                "criterion",
                sorted_by(frame, "mean", ascending=False),
            )
        )
    parts += [selections(pairs, share) for share, pairs in shares(trained).items()]
    parts.append(rates(comparisons))
    forecast = {pair: one for pair, one in comparisons.items() if one.forecasts and one.everything is not None}
    if forecast:
        parts += [forecast_errors(forecast), forecast_advice(forecast)]
    return "\n\n".join(parts) + "\n"


def differences(comparisons: Mapping[str, Comparison], rates: str) -> str:
    """Returns the differences to everything in full, by method and pair, at learning rates of `RATES`.

    Methods at the recommended rates are compared with everything at its best ones.
    """
    tables = {pair: one.table(rates) for pair, one in comparisons.items()}
    tables = {pair: table[table.index.isin(comparisons[pair].table().index)] for pair, table in tables.items()}
    others = "best" if rates == "recommended" else rates
    rival = {pair: one.table(others).loc[f"{EVERYTHING} (full)", "test"] for pair, one in comparisons.items()}
    frame = pd.DataFrame({pair: 100 * (table["test"] - rival[pair]) for pair, table in tables.items()})
    frame["mean"] = frame.mean(axis=1, skipna=False)
    frame["worst"] = frame.drop(columns="mean").min(axis=1, skipna=False)
    costs = pd.concat(tables)[["time", "memory"]].groupby(level=1).mean()
    where = "" if others == rates else ", and everything at its best ones"
    return as_table(
        f"Difference to everything in full in points of test accuracy, each method at\n{RATES[rates]}{where}.\n"
        "Time and memory of a training step are means over the pairs; everything in full is 1.",
        "method",
        sorted_by(frame, "mean", ascending=False).join(costs),
    )


def shares(comparisons: Mapping[str, Comparison]) -> dict[str, dict[str, Comparison]]:
    """Returns the pairs on which components of at least two criteria were trained, by share of the weights.

    Shares of fewer than two pairs are left out.
    """
    found: dict[str, dict[str, Comparison]] = {}
    for pair, one in comparisons.items():
        for share, chosen in one.selected().items():
            if len(chosen) > 1:
                found.setdefault(share, {})[pair] = one
    return {share: found[share] for share in sorted(found) if len(found[share]) > 1}


def selections(comparisons: Mapping[str, Comparison], share: str) -> str:
    """Returns the differences to everything in full of the components that each criterion ranks first, by pair.

    What has as many weights without a criterion is beside them.
    """
    columns = {}
    for pair, comparison in comparisons.items():
        table = comparison.table("recommended")
        names = [name for name in ALIKE.get(share, ()) if f"{name} (full)" in table.index]
        others = {f"({name})": table.loc[f"{name} (full)", "test"] for name in names}
        rival = comparison.table().loc[f"{EVERYTHING} (full)", "test"]
        columns[pair] = 100 * (pd.Series(comparison.selected()[share] | others) - rival)
    frame = pd.DataFrame(columns)
    frame["mean"] = frame.mean(axis=1, skipna=False)
    frame["worst"] = frame.drop(columns="mean").min(axis=1, skipna=False)
    return as_table(
        f"Single components in full that a criterion ranks first, {share} of the weights: difference to everything\n"
        "in full in points of test accuracy, each at the recommended rates, and everything at its best ones. What\n"
        "has as many weights without a criterion is in parentheses.",
        "components",
        sorted_by(frame, "mean", ascending=False),
    )


def tables_of_means(comparisons: Mapping[str, Comparison]) -> dict[str, pd.DataFrame]:
    """Returns means over all pairs, and over those of each model that has more than two, by name.

    Over the pairs of one model there are more methods: those that were not reached on other models.
    """
    trained = {pair: one for pair, one in comparisons.items() if one.everything is not None}
    found = {f"all {len(trained)} pairs": means(trained)} if trained else {}
    for model in dict.fromkeys(one.model for one in trained.values()):
        own = {pair: one for pair, one in trained.items() if one.model == model}
        if 2 < len(own) < len(trained):
            found[f"the {len(own)} pairs of {model}"] = means(own)
    return found


def fronts(name: str, methods: pd.DataFrame) -> str:
    """Returns the methods that no cheaper one equals, for each cost."""
    rows = []
    for cost in COSTS:
        for method in front(methods, cost, "difference"):
            row = methods.loc[method]
            rows.append((cost, f"{row[cost]:.2g}", method, f"{row['difference']:+.1f}", f"{row['worst']:+.1f}"))
    return table(
        f"Methods that no cheaper one equals, of those that were trained on {name}:\n"
        "difference to everything in full in points, each method at its best rates. Costs are ratios to everything.\n",
        ("by", "at most", "best method", "mean", "worst"),
        rows,
    )


def rates(comparisons: Mapping[str, Comparison]) -> str:
    """Returns how often the recommended rates are within a point of the best ones, by pair."""
    rows = []
    for pair, comparison in comparisons.items():
        best = comparison.table()["test"]
        lost = 100 * (best - comparison.table("recommended").loc[best.index, "test"])
        rows.append((pair, str(len(lost)), str(int((lost <= 1).sum())), f"{lost.mean():.1f}", f"{lost.max():.1f}"))
    return table(
        "Points lost by the recommended rates against the best ones\n",
        ("pair", "methods", "within a point", "mean", "largest"),
        rows,
    )


def forecast_errors(comparisons: Mapping[str, Comparison]) -> str:
    """Returns how forecasts compare with what was trained, by pair."""
    rows, found = [], {pair: errors(comparison) for pair, comparison in comparisons.items()}
    found["all"] = pd.concat(found)
    for pair, frame in found.items():
        off, kernels = ((frame[name] - frame["trained"]).abs() for name in ("forecast", "kernels"))
        gain, raised = ("", "")
        if pair in comparisons:
            everything = frame.loc[EVERYTHING]
            gain = f"{everything['trained']:.1f}", f"{everything['forecast']:.1f}"
            raised = f"{100 * comparisons[pair].forecasts['all'].raised:.1f}"
        rows.append(
            (pair, str(len(frame)), *(gain or ("", "")), raised, f"{off.mean():.1f}", f"{kernels.mean():.1f}",
             str(int(frame["contained"].sum())))
        )  # fmt: skip
    errors_table = table(
        "Forecasts of gains over the fitted head, against what was trained at the best rates, in points: that of\n"
        "everything; by how much short runs raised it; the mean absolute error over all sets, and without the runs;\n"
        "and the number of sets whose 80 % interval contains the trained gain.\n",
        ("pair", "sets", "everything trained", "forecast", "raised", "error", "without runs", "contained"),
        rows,
    )
    order = pd.DataFrame({pair: orders(found[pair]) for pair in comparisons}).T
    order.loc["mean"] = order.mean()
    return f"{errors_table}\n\n" + as_table(
        "How forecasts order sets: Spearman's rank correlation, over the same sets, of the trained gain with the\n"
        "forecast, with the squared error (the smaller the better), and with the time of a step alone",
        "pair",
        order,
    )


def forecast_advice(comparisons: Mapping[str, Comparison]) -> str:
    """Returns what it comes to if one trains what the forecast advises."""
    rows = [
        (
            SCOPES[row["scope"]],
            row["choice"],
            f"{row['mean']:+.1f}",
            f"{row['worst']:+.1f}",
            f"{row['time']:.2f}",
            f"{row['memory']:.2f}",
            row["chosen"],
        )
        for _, row in advice(comparisons).iterrows()
    ]
    return table(
        "What the advice of a forecast comes to: difference to everything in full in points, at the best rates, with\n"
        "time and memory of a step by formula, as ratios to everything.\n",
        ("forecast of", "choice", "mean", "worst", "time", "memory", "chosen"),
        rows,
    )


def _points(share: float) -> str:
    return "" if np.isnan(share) else f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def as_table(title: str, index: str, frame: pd.DataFrame) -> str:
    """Returns numbers with the rows' names in a column called `index`; costs to two decimals, others to one."""
    rows = [
        (
            str(name),
            *(
                "" if np.isnan(value) else f"{value:.2f}" if column in ("time", "memory") else f"{value:.1f}"
                for column, value in row.items()
            ),
        )
        for name, row in frame.iterrows()
    ]
    return table(f"{title}\n", (index, *frame.columns), rows)


def main() -> None:
    """Parses the arguments and writes the summary, with the results and tables of each pair."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    folders = {Path(folder).name: Path(folder) for folder in arguments.folders}
    comparisons = {name: load(folder) for name, folder in folders.items()}
    destination = Path(arguments.destination)
    for name, comparison in comparisons.items():
        if folders[name].resolve() != (destination / name).resolve():
            ignored = shutil.ignore_patterns("reports", "*.log", "front.png")
            shutil.copytree(folders[name], destination / name, dirs_exist_ok=True, ignore=ignored)
        write_tables(comparison, destination / name)
    write_text(destination / "summary.md", summary(comparisons))
    methods = tables_of_means(comparisons)
    if methods:
        draw_fronts(methods, destination / "fronts.png")
    scored = {name: one.kinds() for name, one in comparisons.items() if one.scores and one.everything is not None}
    if scored:
        draw_kinds(scored, destination / "kinds.png")


if __name__ == "__main__":
    main()
