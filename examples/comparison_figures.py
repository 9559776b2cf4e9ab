"""Figures of comparisons: accuracy against what a method takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from comparison import COSTS, front

from plasticity_peft.report.plotting import COLORS, MARKERS

NAMES = {"parameters": "trained parameters", "time": "time of a step", "memory": "memory of a step"}
LOOKS = {"kinds": 0, "depth": 1, "stock": 2, "components": 3, "budgets": 4}
"""Which color and marker each group of methods has."""
LOWEST = -9.0
"""Lowest difference that is drawn, in points."""


def draw_fronts(methods: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draws the difference to everything in full against each cost: a row for each table, a column for each cost.

    A line joins the methods that no cheaper one equals. They are labeled.

    Args:
        methods: tables as `comparison.means` returns them, by what they are of.
        path: a .png file.
    """
    from matplotlib.figure import Figure

    mpl.use("agg")
    figure = Figure(figsize=(4.4 * len(COSTS), 3.8 * len(methods)), layout="constrained")
    axes = figure.subplots(len(methods), len(COSTS), squeeze=False, sharey=True)
    for row, (name, table) in zip(axes, methods.items(), strict=True):
        for ax, cost in zip(row, COSTS, strict=True):
            _draw_front(ax, table, cost)
        row[0].set_title(name, loc="left", fontsize="medium")
        row[0].set_ylabel("difference to everything in full, points")
    axes[0][0].legend(fontsize="x-small", loc="lower right")
    figure.savefig(path, dpi=110)


def _draw_front(ax: Any, table: pd.DataFrame, cost: str) -> None:
    table = table[table["difference"] >= LOWEST]
    for group, look in LOOKS.items():
        for training, filled in (("full", True), ("lora", False)):
            rows = table[(table["group"] == group) & (table["training"] == training)]
            if len(rows):
                ax.scatter(
                    rows[cost],
                    rows["difference"],
                    color=COLORS[look],
                    marker=MARKERS[look],
                    facecolor=COLORS[look] if filled else "white",
                    label=f"{group}, {training}",
                    zorder=2,
                )
    if cost == "parameters":
        ax.set_xscale("log")
    best = table.loc[front(table, cost, "difference")]
    ax.plot(best[cost], best["difference"], color="black", linewidth=1, zorder=1)
    for _, row in best.iterrows():
        point = (row[cost], row["difference"])
        across = ax.transAxes.inverted().transform(ax.transData.transform(point))[0]
        side = "left" if across < 0.4 else "right"  # where there is room
        ax.annotate(
            row["method"],
            point,
            xytext=(5, -10) if side == "left" else (-4, 4),
            textcoords="offset points",
            fontsize="x-small",
            horizontalalignment=side,
        )
    ax.axhline(0, color="gray", linewidth=0.8, linestyle=":")
    ax.set_xlabel(f"{NAMES[cost]}, everything in full is 1")
    ax.grid(alpha=0.3)
