"""Figures of comparisons: accuracy against what a method takes, and against the scores of criteria."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from comparison import COSTS, front

from plasticity_peft.report.plotting import COLORS, MARKERS

NAMES = {"parameters": "trained parameters", "time": "time of a step", "memory": "memory of a step"}
LOOKS = {"kinds": 0, "depth": 1, "stock": 2, "components": 3, "budgets": 4}
"""Which color and marker each group of methods has."""
SCORES = {
    "parameter_plasticity": "parameter plasticity, the default",
    "rate_of_change-embedding": "rate of change, embedding",
    "rate_of_change-activation": "rate of change, activation",
}
"""The criteria whose scores are drawn, a row for each: the default, and the paper's measure in both protocols."""
LOWEST = -9.0
"""Lowest difference that is drawn, in points."""
PLACES = [(x, y, side) for y in (4, -10, -3, -16) for x, side in ((5, "left"), (-5, "right"))]
"""Where a label can be: the offset of its lower corner from its point, in points, and which corner it is."""


def draw_fronts(methods: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draws the difference to everything in full against each cost: a row for each table, a column for each cost.

    A line joins the methods that no cheaper one equals. They are labeled.

    Args:
        methods: tables as `comparison.means` returns them, by what they are of.
        path: a .png file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(COSTS), 3.8 * len(methods)), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(methods), len(COSTS), squeeze=False, sharey=True)
    drawn = []
    for row, (name, table) in zip(axes, methods.items(), strict=True):
        table = table[table["difference"] >= LOWEST]
        for ax, cost in zip(row, COSTS, strict=True):
            drawn.append((ax, _draw_front(ax, table, cost), table, cost))
        row[0].set_title(name, loc="left", fontsize="medium")
        row[0].set_ylabel("difference to everything in full, points")
    axes[0][0].legend(fontsize="x-small", loc="lower right")
    canvas.draw()  # from here on, all axes are where they will be
    figure.set_layout_engine("none")
    for each in drawn:
        _label(*each)
    figure.savefig(path)


def _draw_front(ax: Any, table: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Draws all points and the line, and returns the rows of the line."""
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
    ax.axhline(0, color="gray", linewidth=0.8, linestyle=":")
    ax.set_xlabel(f"{NAMES[cost]}, everything in full is 1")
    ax.grid(alpha=0.3)
    return best


def _label(ax: Any, best: pd.DataFrame, points: pd.DataFrame, cost: str) -> None:
    """Labels points of a finished figure, each at the place around it that covers least of other points and labels."""
    from matplotlib.transforms import Bbox

    renderer = ax.figure.canvas.get_renderer()
    centers = ax.transData.transform(points[[cost, "difference"]].to_numpy())
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in centers]
    line = ax.transData.transform(best[[cost, "difference"]].to_numpy())
    for start, end in pairwise(line):
        taken += [Bbox.from_bounds(*(start + share * (end - start)), 1, 1) for share in np.linspace(0, 1, 60)]

    def covered(box: Any) -> float:
        outside = 1 - _overlap(box, ax.bbox) / (box.width * box.height)
        return 1000 * outside + sum(_overlap(box, each) for each in taken)

    for _, row in best.iterrows():
        point = (row[cost], row["difference"])
        text = ax.annotate(row["method"], point, textcoords="offset points", xytext=(0, 0), fontsize="x-small")
        boxes = []
        for x, y, side in PLACES:
            text.set(position=(x, y), horizontalalignment=side)
            boxes.append(text.get_window_extent(renderer))
        place, box = min(zip(PLACES, boxes, strict=True), key=lambda each: covered(each[1]))
        text.set(position=place[:2], horizontalalignment=place[2])
        taken.append(box)


def _overlap(one: Any, other: Any) -> float:
    """Returns the area that two boxes share, in pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0) * max(height, 0))


def draw_kinds(pairs: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draws the accuracy of each kind in full against its score: a row for each of `SCORES`, a column for each pair.

    Error bars are standard errors over the seeds.

    Args:
        pairs: tables as `Comparison.kinds` returns them, by the name of the pair.
        path: a .png file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(2.4 * len(pairs) + 1, 2.4 * len(SCORES)), layout="constrained", dpi=110)
    axes = figure.subplots(len(SCORES), len(pairs), squeeze=False)
    for row, (score, title) in zip(axes, SCORES.items(), strict=True):
        for ax, (name, kinds) in zip(row, pairs.items(), strict=True):
            for look, (kind, one) in enumerate(kinds.iterrows()):
                ax.errorbar(
                    one[score],
                    one["difference"],
                    yerr=one["standard_error"],
                    color=COLORS[look],
                    marker=MARKERS[look],
                    linestyle="none",
                    label=kind,
                )
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.margins(x=0.15)
            ax.set_title(name, fontsize="small")
            ax.grid(alpha=0.3)
            ax.tick_params(which="both", labelsize="x-small")
        row[len(row) // 2].set_xlabel(title)
    axes[len(axes) // 2][0].set_ylabel("difference to everything in full, points")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(path)
