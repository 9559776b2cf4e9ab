"""The figures of a comparison: gain against score, and accuracy by learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from comparison import KINDS, Comparison, rank_correlation
from matplotlib.ticker import NullLocator

from plasticity_peft.report.plotting import COLORS, MARKERS, STYLES

SHOWN = ("parameter_plasticity", "rate_of_change-embedding")
"""The default criterion and the paper's measure."""


def draw_gains(comparisons: Mapping[str, Comparison], path: Path) -> None:
    """Draws the gain of each kind over the head alone against its score: one column per pair, one row per
    criterion."""
    import matplotlib.pyplot as plt

    mpl.use("agg")
    shown = [name for name in SHOWN if all(name in one.reports for one in comparisons.values())]
    shown = shown or list(next(iter(comparisons.values())).reports)[:1]
    size = (1.2 + 2.6 * len(comparisons), 2.9 * len(shown))
    figure, axes = plt.subplots(
        len(shown), len(comparisons), figsize=size, sharey="col", squeeze=False, layout="constrained"
    )
    for row, name in zip(axes, shown, strict=True):
        for ax, (pair, comparison) in zip(row, comparisons.items(), strict=True):
            _draw_gains(ax, comparison, name)
            ax.set_title(f"{pair}\n{ax.get_title()}", fontsize=8)
        row[0].set_ylabel("gain, points")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_gains(ax: Any, comparison: Comparison, name: str) -> None:
    scores = {row.kind: row for row in comparison.reports[name].kinds}
    titles = []
    for training, filled in (("full", True), ("lora", False)):
        gains = 100 * comparison.gains(training)
        tau, low, high, _ = rank_correlation([scores[kind].mean for kind in gains], gains.to_numpy())
        titles.append(f"{training}: tau {tau:+.1f} [{low:+.1f}, {high:+.1f}]")
        for index, kind in enumerate(KINDS):
            if kind not in gains or (training == "lora" and kind.startswith("LN")):
                continue
            ax.errorbar(
                scores[kind].mean,
                gains[kind].mean(),
                xerr=1.96 * scores[kind].standard_error,
                yerr=gains[kind].std() if len(gains) > 1 else None,
                fmt=MARKERS[index],
                color=COLORS[index],
                markerfacecolor=COLORS[index] if filled else "white",
                capsize=2,
                label=f"{kind} ({training})",
            )
    ax.set(xscale="log", xlabel=name, title="\n".join(titles))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.3)


def draw_learning_rates(comparison: Comparison, path: Path) -> None:
    """Draws the test accuracy by learning rate, with the range over seeds, one line per kind."""
    import matplotlib.pyplot as plt

    mpl.use("agg")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for ax, training in zip(axes, ("full", "lora"), strict=True):
        runs = comparison.runs[(comparison.runs["group"] == "kind") & (comparison.runs["training"] == training)]
        for index, name in enumerate((*KINDS, "everything", "head only")):
            own = runs[runs["method"] == name].groupby("learning_rate")["test_accuracy"]
            if not len(own):
                continue
            mean = 100 * own.mean()
            look = {"color": COLORS[index % len(COLORS)]}
            marks = {"linestyle": STYLES[index % 5], "marker": MARKERS[index % 5], "markersize": 4}
            ax.plot(mean.index, mean, label=name, **look, **marks)
            ax.fill_between(mean.index, 100 * own.min(), 100 * own.max(), alpha=0.2, linewidth=0, **look)
        rates = sorted(runs["learning_rate"].unique())
        ax.set(xscale="log", xlabel="learning rate", title=f"trained alone, {training}")
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, percent")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
