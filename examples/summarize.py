"""From finished comparisons to tables and figures.

compare_components.py calls this for one pair of model and dataset. For several pairs:

    python examples/summarize.py --folders outputs/compare/* --destination examples/results
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from comparison import Comparison, load
from comparison_figures import draw_gains, draw_learning_rates
from transformers import HfArgumentParser

from plasticity_peft.files import write_text
from plasticity_peft.report.text import table


@dataclass
class Arguments:
    """The comparisons to summarize."""

    folders: list[str] = field(metadata={"help": "Output folders of compare_components.py."})
    destination: str = field(
        default="examples/results", metadata={"help": "Folder to write the tables and figures to."}
    )


def write(comparison: Comparison, folder: Path) -> None:
    """Writes runs.csv, methods.csv, criteria.csv, results.md and the figures of one pair into `folder`."""
    comparison.runs.to_csv(folder / "runs.csv", index=False, float_format="%.6g")
    comparison.methods.drop(columns=["tests", "seeds"]).to_csv(folder / "methods.csv", float_format="%.6g")
    criteria = comparison.criteria()
    criteria.to_csv(folder / "criteria.csv", index=False, float_format="%.6g")
    write_text(folder / "results.md", as_markdown(comparison, criteria))
    if comparison.has("kind") and comparison.reports:
        draw_gains({folder.name: comparison}, folder / "gain.png")
        draw_learning_rates(comparison, folder / "learning_rates.png")


def as_markdown(comparison: Comparison, criteria: pd.DataFrame) -> str:
    """Returns the tables of the methods and of the criteria, for one pair of model and data."""
    names = {
        method: [c for c, pick in comparison.picks.items() if pick == method] for method in comparison.picks.values()
    }
    rows = []
    for (group, method, training), row in comparison.methods.iterrows():
        shown = ", ".join(names.get(method, [method])) if group == "blocks" else method
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
    seeds = comparison.runs["seed"].nunique()
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


def summary(comparisons: Mapping[str, Comparison]) -> str:
    """Returns tables over all pairs of model and data.

    Regret and rank correlation of each criterion; accuracy at an equal number of parameters.
    """
    pairs = list(comparisons)
    criteria = {pair: comparisons[pair].criteria().set_index(["criterion", "training"]) for pair in pairs}
    names = list(dict.fromkeys(name for pair in pairs for name in comparisons[pair].reports))
    regret = "points lost against the best kind by training the kind that ranks first"
    tau = "Kendall's tau between score and gain over the five kinds"
    blocks = "points lost against the best of these choices of single components, at an equal number of parameters"
    parts = []
    for training, column, what in (
        ("full", "regret_points", regret),
        ("full", "kendall_tau", tau),
        ("lora", "regret_points", regret),
        ("lora", "kendall_tau", tau),
        ("lora", "block_regret_points", blocks),
    ):
        found = {pair: criteria[pair][column].xs(training, level=1) for pair in pairs if column in criteria[pair]}
        frame = pd.DataFrame(found, index=names).dropna(how="all")
        if frame.empty:
            continue
        if column == "kendall_tau":
            frame["mean"] = frame.mean(axis=1)
            frame = frame.sort_values("mean", ascending=False)
        else:
            frame["worst"] = frame.max(axis=1)
            frame = frame.sort_values("worst")
        rows = [
            (name, *("" if np.isnan(value) else f"{value:.1f}" for value in row)) for name, row in frame.iterrows()
        ]
        parts.append(table(f"{training}: {what}\n", ("criterion", *frame.columns), rows))
    return "\n\n".join([*parts, equal_parameters(comparisons)]) + "\n"


def equal_parameters(comparisons: Mapping[str, Comparison]) -> str:
    """Returns a table of the methods with an equal number of parameters, and of those with other numbers."""
    columns = {}
    for pair, comparison in comparisons.items():
        found = {}
        for (group, method, training), row in comparison.methods.iterrows():
            name = re.sub(r" r=\d+$", "", method)
            if group == "default":
                name = f"default criterion, top {method.count('+') + 1} by kind"
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
    return as_table(
        "lora: test accuracy in percent at an equal number of parameters (as near as ranks allow)", "method", frame
    )


def as_table(title: str, index: str, frame: pd.DataFrame) -> str:
    """Returns numbers to one decimal, with the rows' names in a column called `index`; NaN is left empty."""
    rows = [
        (str(name), *("" if np.isnan(value) else f"{value:.1f}" for value in row)) for name, row in frame.iterrows()
    ]
    return table(f"{title}\n", (index, *frame.columns), rows)


def main() -> None:
    """Parses the arguments and writes the summary, with the tables and figures of each pair."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    folders = {Path(folder).name: Path(folder) for folder in arguments.folders}
    comparisons = {name: load(folder) for name, folder in folders.items()}
    destination = Path(arguments.destination)
    for name, comparison in comparisons.items():
        (destination / name).mkdir(parents=True, exist_ok=True)
        write(comparison, destination / name)
        for file in ("settings.json", "picks.json"):
            if (folders[name] / file).is_file():
                shutil.copy(folders[name] / file, destination / name)
    draw_gains(comparisons, destination / "gain.png")
    write_text(destination / "summary.md", summary(comparisons))


if __name__ == "__main__":
    main()
