"""Pictures of a report: the scores over depth, as a ranking, or as a heat map.

matplotlib is in the extra `plot`, and is imported on use. Figures are made without pyplot, so that they do not stay in
the user's pyplot state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from math import isclose
from textwrap import fill
from typing import Any

from plasticity_peft.checks import check_choice
from plasticity_peft.components.component import KINDS
from plasticity_peft.errors import ConfigError
from plasticity_peft.report.confidence import EQUAL, MOST_TIED, NORMAL, in_words
from plasticity_peft.report.forecast import HALF_WIDTH
from plasticity_peft.report.scores import BaseReport
from plasticity_peft.report.selection import RankedUnit, Selection
from plasticity_peft.report.text import PAIRED, heading, is_paired

# Most are from Okabe & Ito's palette, and darker, for contrast with white. All stay apart for the color-blind.
# Markers and line styles distinguish the kinds in grayscale.
COLORS = ("#0072B2", "#C24F00", "#008A63", "#A8467C", "#4D2E00")
STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
MOST_UNITS = 20
"""Number of units of a ranking that are shown, unless more are selected."""
MOST_TICKS = 12


def draw(report: BaseReport, view: str, *, selection: Selection | None = None, ax: Any = None) -> Any:
    """Returns the matplotlib axes of a picture; see `PlasticityReport.plot`."""
    check_choice("view", view, VIEWS)
    if view == "overview":
        return _draw_overview(report, selection, ax)
    if ax is None:
        ax = _figure((7, 4)).subplots()
    elif not hasattr(ax, "plot"):
        raise ConfigError(f'ax of the view "{view}" must be matplotlib axes. Got {type(ax).__name__}.')
    DRAWN[view](ax, report, selection)
    ax.set_title(f"{fill(heading(report), 60)}\n{ax.get_title()}", fontsize="medium")
    return ax


def png(report: BaseReport, selection: Selection | None = None) -> bytes:
    """Returns the overview as a PNG file."""
    file = BytesIO()
    draw(report, "overview", selection=selection)[0].figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _draw_overview(report: BaseReport, selection: Selection | None, axes: Any) -> Any:
    import numpy as np

    if axes is None:
        height = max(4.4, 1.8 + 0.21 * len(_shown(report, selection)))
        figure = _figure((11, height))
        axes = figure.subplots(1, 2, width_ratios=(3, 2))
        figure.suptitle(heading(report))
    axes = np.ravel(np.asarray(axes, dtype=object))
    if len(axes) != 2 or not all(hasattr(ax, "plot") for ax in axes):
        raise ConfigError(
            'The view "overview" needs two axes: figure.subplots(1, 2), or view="depth", "ranking" or "heatmap" '
            f"for one. Got {len(axes)}."
        )
    for ax, view in zip(axes, ("depth", "ranking"), strict=True):
        DRAWN[view](ax, report, selection)
        ax.set_title(ax.get_title(), fontsize="medium")
    return axes


def _draw_depth(ax: Any, report: BaseReport, selection: Selection | None) -> None:
    """Draws one line per kind over the blocks. The legend marks the selected kinds."""
    chosen = set(selection.components) if selection else set()
    blocks = [row.block_id for row in report.rows_of(KINDS[0])]
    ringed: list[tuple[int, float]] = []
    for index, kind in enumerate(KINDS):
        rows = report.rows_of(kind)
        means, errors = [row.mean for row in rows], [NORMAL * row.standard_error for row in rows]
        look = {"color": COLORS[index], "linestyle": STYLES[index], "marker": MARKERS[index], "markersize": 4.5}
        label = f"{kind} (selected)" if chosen and {row.id for row in rows} <= chosen else kind
        ax.plot(range(len(rows)), means, label=label, markevery=max(1, len(rows) // MOST_TICKS), **look)
        lower = [max(mean - error, mean / 10) for mean, error in zip(means, errors, strict=True)]
        upper = [mean + error for mean, error in zip(means, errors, strict=True)]
        ax.fill_between(range(len(rows)), lower, upper, color=COLORS[index], alpha=0.25, linewidth=0)
        if not {row.id for row in rows} <= chosen:
            ringed += [(place, row.mean) for place, row in enumerate(rows) if row.id in chosen]
    if ringed:
        ax.plot(*zip(*ringed, strict=True), "o", color="black", markersize=10, fillstyle="none", label="selected")
    _label_blocks(ax, report, blocks)
    ax.set(
        ylabel=_unit(report),
        title=f"over depth\n{_certainty(report, 'bands')}{_ties(report.ranking())}{_sure(report, selection)}",
    )
    _scale(ax.yaxis, [row.mean for row in report.scores])
    ax.grid(alpha=0.3)
    _add_legend(ax)


def _add_legend(ax: Any) -> None:
    """Puts the legend below the labels of the axis, so that it does not hide a line."""
    from matplotlib.transforms import ScaledTranslation

    below = ax.transAxes + ScaledTranslation(0, -32 / 72, ax.figure.dpi_scale_trans)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below}
    ax.legend(fontsize="small", ncols=6, columnspacing=1.2, **place)


def _draw_ranking(ax: Any, report: BaseReport, selection: Selection | None) -> None:
    """Draws the units, the best one on top. Selected units are filled and their names bold; others are hollow."""
    units = _shown(report, selection)
    ranking = report.ranking(_granularity(selection))
    chosen = selection.units if selection else ()
    for place, row in enumerate(units):
        index = KINDS.index(row.unit.split(".")[-1])
        fill_color = "white" if chosen and row.unit not in chosen else COLORS[index]
        ax.errorbar(
            row.score,
            place,
            xerr=[[min(NORMAL * row.standard_error, 0.9 * row.score)], [NORMAL * row.standard_error]],
            fmt=MARKERS[index],
            color=COLORS[index],
            markerfacecolor=fill_color,
            markersize=7,
            capsize=3,
        )
    ax.set_yticks(range(len(units)), [row.unit for row in units])
    for label, row in zip(ax.get_yticklabels(), units, strict=True):
        label.set_fontweight("bold" if row.unit in chosen else "normal")
    ax.set_ylim(len(units) - 0.5, -0.5)
    _scale(ax.xaxis, [row.score for row in units])
    what = "ranking" if len(units) == len(ranking) else f"ranking, the best {len(units)} of {len(ranking)}"
    marked = "; selected: filled, bold" if chosen else ""
    title = f"{what}\n{_certainty(report, 'intervals')}{marked}{_ties(ranking)}{_sure(report, selection)}"
    ax.set(xlabel=_unit(report), title=title)
    ax.grid(alpha=0.3)


def _draw_forecast(ax: Any, report: BaseReport, selection: Selection | None) -> None:
    """Draws the expected gain of each set against the time of a step; the recommended set is filled."""
    if report.forecast is None:
        raise ConfigError(
            'The view "forecast" needs a report with a forecast. Measure with forecast=True, or --labels.'
        )
    forecast = report.forecast
    for place, one in enumerate(forecast.sets):
        chosen = one is forecast.recommended
        color = COLORS[KINDS.index(one.name)] if one.name in KINDS else "black"
        ax.errorbar(
            100 * one.gain,
            place,
            xerr=100 * HALF_WIDTH * one.gain_error,
            fmt=MARKERS[KINDS.index(one.name)] if one.name in KINDS else "*",
            color=color,
            markerfacecolor=color if chosen else "white",
            markersize=7,
            capsize=3,
        )
    names = [one.name if one.cost is None else f"{one.name} ({one.cost.time:.2f})" for one in forecast.sets]
    ax.set_yticks(range(len(names)), names)
    for label, one in zip(ax.get_yticklabels(), forecast.sets, strict=True):
        label.set_fontweight("bold" if one is forecast.recommended else "normal")
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.axvline(0, color="gray", linewidth=0.8, linestyle=":")
    ax.set(
        xlabel="expected gain over the fitted head, points",
        title="forecast of finetuning in full (time of a step)\n80 % intervals; recommended: filled, bold",
    )
    ax.grid(alpha=0.3)


def _draw_heatmap(ax: Any, report: BaseReport, selection: Selection | None) -> None:
    """Draws every kind and block as a cell; low scores are dark. Selected components are framed."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    rows = [[row.mean for row in report.rows_of(kind)] for kind in KINDS]
    values = [value for row in rows for value in row]
    norm = (LogNorm if is_wide(values) else Normalize)(min(values), max(values))
    image = ax.imshow(rows, cmap="cividis", norm=norm, aspect="auto")
    bar = ax.figure.colorbar(image, ax=ax, label=_unit(report))
    _scale(bar.ax.yaxis, values)
    ax.set_yticks(range(len(KINDS)), KINDS)
    if len(rows[0]) <= MOST_TICKS:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                color = "white" if norm(value) < 0.5 else "black"
                ax.text(x, y, _short(value), ha="center", va="center", fontsize="x-small", color=color)
    blocks = [row.block_id for row in report.rows_of(KINDS[0])]
    _label_blocks(ax, report, blocks)
    chosen = selection.components if selection else ()
    for name in chosen:
        block, kind = name.rsplit(".", 1)
        corner = (blocks.index(block) - 0.44, KINDS.index(kind) - 0.44)
        for color, width in (("white", 3.5), ("black", 1.5)):
            width *= 1 if len(blocks) <= MOST_TICKS else 0.6
            ax.add_patch(Rectangle(corner, 0.88, 0.88, fill=False, edgecolor=color, linewidth=width))
    ax.set_title(f"every block and kind{'; selected: framed' if chosen else ''}{_sure(report, selection)}")


def _short(value: float) -> str:
    """Returns a number in at most six characters, so that it fits into a cell."""
    from matplotlib.ticker import EngFormatter

    if value >= 999.5:
        return EngFormatter(places=1, sep="").format_eng(value)
    return f"{value:.0e}" if 0 < value < 0.001 else f"{value:.3g}"


def draw_agreement(
    reports: tuple[BaseReport, BaseReport], names: tuple[str, str], found: Sequence[Mapping[str, Any]]
) -> Any:
    """Returns the matplotlib figure of two reports against each other.

    Args:
        reports: reports of models with the same components.
        names: their names, for the axes.
        found: what `agreement` returns of them, one panel for each.
    """
    figure = _figure((5.5 * len(found), 4.8))
    for ax, one in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        _draw_agreement(ax, reports, one)
        for axis, report, name in zip((ax.xaxis, ax.yaxis), reports, names, strict=True):
            name = fill(name, 40)
            axis.set_label_text(f"{name}\n{_unit(report)}" if axis is ax.xaxis else f"{_unit(report)}\n{name}")
            _scale(axis, [row.score for row in report.ranking(one["granularity"])])
    return figure


def _draw_agreement(ax: Any, reports: tuple[BaseReport, BaseReport], found: Mapping[str, Any]) -> None:
    """Draws every unit by its score in both reports. Those among the best of both are filled."""
    first, second = ({row.unit: row.score for row in report.ranking(found["granularity"])} for report in reports)
    for kind, color, marker in zip(KINDS, COLORS, MARKERS, strict=True):
        units = [unit for unit in first if unit.split(".")[-1] == kind]
        look = {"color": color, "marker": marker, "linestyle": "none", "markersize": 7}
        for label, shown, inside in (
            (kind, units, "white"),
            (None, [unit for unit in units if unit in found["best_of_both"]], color),
        ):
            x, y = ([scores[unit] for unit in shown] for scores in (first, second))
            ax.plot(x, y, label=label, markerfacecolor=inside, **look)
    names = [name for name in ("Spearman", "Kendall") if found[name.lower()] is not None]
    correlations = [f"{name} {found[name.lower()]:.2f}" for name in names]
    shared = f"in common {found['shared']} of the best {found['top_k']}: filled"
    ax.set_title(f"by {found['granularity']}\n{', '.join([*correlations, shared])}", fontsize="medium")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", handletextpad=0.3)


DRAWN: dict[str, Callable[[Any, BaseReport, Selection | None], None]] = {
    "depth": _draw_depth,
    "ranking": _draw_ranking,
    "heatmap": _draw_heatmap,
    "forecast": _draw_forecast,
}
VIEWS = ("overview", *DRAWN)


def _sure(report: BaseReport, selection: Selection | None) -> str:
    """Returns a further line of a title, if there is a selection."""
    if selection is None:
        return ""
    if selection.tied:
        named = [*selection.tied[:MOST_TIED], *(["..."] if len(selection.tied) > MOST_TIED else [])]
        return f"\nselection: a tie of {len(selection.tied)} equal scores ({', '.join(named)})"
    paired = f"\n({PAIRED})" if is_paired(report, selection) else ""
    return f"\nselection: confidence {in_words(selection.confidence)}{paired}"


def _ties(ranking: Sequence[RankedUnit]) -> str:
    """Returns a further line of a title, if units have equal scores. One of their lines may hide another."""
    pairs = pairwise(ranking)
    equal = {row.unit for pair in pairs if isclose(pair[0].score, pair[1].score, rel_tol=EQUAL) for row in pair}
    named = [row.unit for row in ranking if row.unit in equal]
    if not named:
        return ""
    return f"\nequal scores: {', '.join(named) if len(named) <= MOST_TIED else f'{len(named)} of {len(ranking)}'}"


def _granularity(selection: Selection | None) -> str:
    return selection.granularity if selection else "kind"


def _shown(report: BaseReport, selection: Selection | None) -> list[Any]:
    """Returns the best units: `MOST_UNITS`, or up to twice as many to include the selected ones."""
    ranking = report.ranking(_granularity(selection))
    chosen = selection.units if selection else ()
    last = max((place for place, row in enumerate(ranking, start=1) if row.unit in chosen), default=0)
    return ranking[: min(max(MOST_UNITS, last + 1), 2 * MOST_UNITS)]


def _label_blocks(ax: Any, report: BaseReport, blocks: Sequence[str]) -> None:
    """Labels the blocks, or some of many, by their ids, and draws lines between the stages."""
    step = -(-len(blocks) // MOST_TICKS)
    ax.set_xticks(range(0, len(blocks), step), blocks[::step])
    stages = [row.stage for row in report.rows_of(KINDS[0])]
    for place in range(1, len(stages)):
        if stages[place] != stages[place - 1]:
            ax.axvline(place - 0.5, color="0.4", linewidth=0.8)
    ax.set_xlabel("block" if stages[0] is None else "stage.block")


def _unit(report: BaseReport) -> str:
    """Returns the label of an axis of scores. Scores are ratios of like quantities and have no unit."""
    return f"{report.title} (no unit)"


def _certainty(report: BaseReport, shown_as: str) -> str:
    return "exact" if report.observed == "weights" else f"95 % confidence {shown_as}"


def is_wide(values: Sequence[float]) -> bool:
    """Returns whether values need a logarithmic scale: they are positive, and the highest is 5 times the lowest."""
    return min(values) > 0 and max(values) > 5 * min(values)


def _scale(axis: Any, values: Sequence[float]) -> None:
    """Makes an axis logarithmic if the values need it, with ticks at 1, 2, 5, 10, ... in plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    if not is_wide(values):
        return
    if axis.get_scale() != "log":
        (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 500 * min(values) else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
