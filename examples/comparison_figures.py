"""The figure of a comparison: accuracy against the time and the memory of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from comparison import Comparison

from plasticity_peft.report.plotting import COLORS, MARKERS

COSTS = {"time": "time of a step", "memory": "memory of a step"}
LOOKS = {"kinds": 0, "depth": 1, "stock": 2, "components": 3, "budgets": 4}
"""Which color and marker each group of methods has."""


def draw_fronts(comparisons: Mapping[str, Comparison], path: Path) -> None:
    """Draws the gain over the fitted head against the cost: a row for each pair, a column for each cost.

    A line joins the methods that no cheaper one equals. They are labeled.
    """
    from matplotlib.figure import Figure

    mpl.use("agg")
    figure = Figure(figsize=(5.2 * len(COSTS), 3.4 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), len(COSTS), squeeze=False, sharey="row")
    for row, (pair, comparison) in zip(axes, comparisons.items(), strict=True):
        for ax, cost in zip(row, COSTS, strict=True):
            _draw_front(ax, comparison, cost)
        row[0].set_title(pair, loc="left", fontsize="medium")
        row[0].set_ylabel("gain over the fitted head, points")
    axes[0][-1].legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=130)


def _draw_front(ax: Any, comparison: Comparison, cost: str) -> None:
    table = comparison.table()
    for group, look in LOOKS.items():
        for training, filled in (("full", True), ("lora", False)):
            rows = table[(table["group"] == group) & (table["training"] == training)]
            if len(rows):
                ax.scatter(
                    rows[cost],
                    100 * rows["gain"],
                    color=COLORS[look],
                    marker=MARKERS[look],
                    facecolor=COLORS[look] if filled else "white",
                    label=f"{group}, {training}",
                    zorder=2,
                )
    front = table.loc[comparison.front(cost)]
    ax.plot(front[cost], 100 * front["gain"], color="black", linewidth=1, zorder=1)
    for name, row in front.iterrows():
        ax.annotate(
            str(name).removesuffix(" (full)").removesuffix(" (lora)"),
            (row[cost], 100 * row["gain"]),
            xytext=(4, -9),
            textcoords="offset points",
            fontsize="x-small",
        )
    ax.axhline(0, color="gray", linewidth=0.8, linestyle=":")
    ax.set_xlabel(f"{COSTS[cost]}, everything in full is 1")
    ax.grid(alpha=0.3)
