"""The charts of the page of a report, as specifications of Vega-Lite, which draws them in the browser.

A chart shows what is selected by its parameters: `chosen`, the ids of the selected kinds and components, and
`granularity`, `series` and `place`, which name the cut. The script of the page sets them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plasticity_peft.checks import GRANULARITIES
from plasticity_peft.components.component import KINDS
from plasticity_peft.report.confidence import NORMAL
from plasticity_peft.report.cuts import Series
from plasticity_peft.report.forecast import HALF_WIDTH, Forecast
from plasticity_peft.report.plotting import COLORS, is_wide
from plasticity_peft.report.scores import BaseReport

SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down")
"""The markers of `plasticity_peft.report.plotting`, by their names in Vega."""
DASHES: tuple[list[int], ...] = ([], [6, 3], [6, 2, 1, 2], [1, 2], [9, 2, 2, 2, 2, 2])
"""Its styles of lines."""
COST_COLORS = {"time": COLORS[0], "memory": COLORS[1]}
ROW = 17
"""Height of a row of a ranking in pixels."""
MOST_NUMBERS = 12
"""Number of blocks up to which the cells of the heat map contain numbers."""
WIDE_ENOUGH = 560
"""Width in pixels from which these numbers fit."""
SPOKEN = {"field": "spoken"}
"""What a screen reader says of a point."""
SHORT = "datum.score >= 999.5 ? format(datum.score, '.2~s') : format(datum.score, '.3~g')"
"""A score in a cell, such as 1.3k or 0.0329."""
CONFIG: dict[str, Any] = {
    "font": "system-ui, sans-serif",
    "axis": {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal", "labelOverlap": True},
    "legend": {"labelFontSize": 12, "titleFontSize": 12, "orient": "bottom", "symbolSize": 90, "symbolOpacity": 1},
    "view": {"stroke": "#bbb"},
    "scale": {"barBandPaddingInner": 0},
}


def charts(
    report: BaseReport, series: Sequence[Series], forecast: Forecast | None, signals: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Returns the charts by name; those of costs and of a forecast if these are known.

    Args:
        report: the report.
        series: all cuts of the page.
        forecast: a forecast, or None.
        signals: values of the parameters for the cut that the page shows first.
    """
    found = {"ranking": _ranking(report), "depth": _depth(report), "heatmap": _heatmap(report)}
    if report.costs is not None:
        found["cost"] = _cost(series)
    if forecast is not None:
        found["forecast"] = _forecast(forecast)
    parameters = [{"name": name, "value": value} for name, value in signals.items()]
    return {name: {**chart, "params": parameters} for name, chart in found.items()}


def heights(report: BaseReport) -> dict[str, int]:
    """Returns the height of the ranking in pixels, by granularity."""
    return {granularity: ROW * len(report.ranking(granularity)) for granularity in GRANULARITIES}


def _chart(description: str, values: Sequence[dict[str, Any]], height: int, **rest: Any) -> dict[str, Any]:
    return {
        "description": description,
        "width": "container",
        "height": height,
        "config": CONFIG,
        "data": {"values": list(values)},
        **rest,
    }


def _ranking(report: BaseReport) -> dict[str, Any]:
    rows = [
        {"granularity": granularity, "unit": row.unit, "rank": rank, "kind": row.unit.split(".")[-1]}
        | _interval(row.unit, row.score, row.standard_error)
        for granularity in GRANULARITIES
        for rank, row in enumerate(report.ranking(granularity), start=1)
    ]
    bold = {"condition": {"test": "indexof(chosen, datum.value) >= 0", "value": "bold"}, "value": "normal"}
    score = {"title": _unit(report), "scale": _scale(rows)}
    return _chart(
        "Ranking of the kinds or the components by score, the best one on top. Selected ones are filled.",
        rows,
        heights(report)["kind"],
        transform=[{"filter": "datum.granularity == granularity"}, _selected("unit")],
        encoding={
            "y": {
                "field": "unit",
                "type": "nominal",
                "sort": {"field": "rank"},
                "axis": {"title": None, "labelFontWeight": bold, "labelOverlap": False},
            },
            "color": _by_kind(COLORS, legend=False),
        },
        layer=[
            {"mark": {"type": "rule", "aria": False}, "encoding": _from_low_to_high("x", score)},
            *_points("x", score, _by_kind(SHAPES, legend=False), "unit", "rank"),
        ],
    )


def _depth(report: BaseReport) -> dict[str, Any]:
    rows = _components(report)
    score = {"title": _unit(report), "scale": _scale(rows)}
    line = {"y": {"field": "score", "type": "quantitative", **score}, "strokeDash": _by_kind(DASHES, legend=False)}
    return _chart(
        "Scores over depth, one line for each kind. The points of selected components are filled.",
        rows,
        300,
        transform=[_selected("id")],
        encoding={"x": _blocks(report), "color": _by_kind(COLORS)},
        layer=[
            {"mark": {"type": "area", "opacity": 0.2, "aria": False}, "encoding": _from_low_to_high("y", score)},
            {"mark": {"type": "line", "aria": False}, "encoding": line},
            *_points("y", score, _by_kind(SHAPES), "id"),
        ],
    )


def _heatmap(report: BaseReport) -> dict[str, Any]:
    rows = _components(report)
    low, high = min(row["score"] for row in rows), max(row["score"] for row in rows)
    wide = is_wide([low, high])
    middle = (low * high) ** 0.5 if wide else (low + high) / 2
    numbers = len(rows) <= MOST_NUMBERS * len(KINDS)
    color = {
        "field": "score",
        "type": "quantitative",
        "scale": {"scheme": "cividis", "type": "log" if wide else "linear", "domain": [low, high]},
        "legend": {"title": _unit(report), "gradientLength": 200, "titleLimit": 320},
    }
    text = {"condition": {"test": f"width > {WIDE_ENOUGH}", "field": "short"}, "value": ""}
    ink = {"condition": {"test": f"datum.score < {middle!r}", "value": "white"}, "value": "black"}
    frames = [_frame("white", 4), _frame("black", 1.5)]
    return _chart(
        "Score of every block and kind: low scores are dark, high ones light. Selected components are framed.",
        rows,
        34 * len(KINDS),
        transform=[_selected("id"), {"calculate": SHORT, "as": "short"}],
        encoding={
            "x": _blocks(report),
            "y": {"field": "kind", "type": "nominal", "sort": list(KINDS), "axis": {"title": None}},
        },
        layer=[
            {"mark": {"type": "rect"}, "encoding": {"color": color, "tooltip": _tooltip("id"), "description": SPOKEN}},
            *frames,
            *(
                [{"mark": {"type": "text", "aria": False}, "encoding": {"text": text, "color": ink}}]
                if numbers
                else []
            ),
        ],
    )


def _frame(color: str, width: float) -> dict[str, Any]:
    mark = {"type": "rect", "filled": False, "aria": False, "stroke": color, "strokeWidth": width}
    size = {"width": {"band": 0.88}, "height": {"band": 0.88}}
    return {"transform": [{"filter": "datum.selected"}], "mark": {**mark, **size}}


def _cost(series: Sequence[Series]) -> dict[str, Any]:
    names = list(COST_COLORS)
    what = {"field": "what", "type": "nominal", "sort": names, "title": None}
    color, shape, dash = (
        {**what, "scale": {"domain": names, "range": list(each)}}
        for each in (COST_COLORS.values(), SHAPES[:2], DASHES[:2])
    )
    tooltip = [{"field": "what", "title": "what"}, {"field": "text", "title": "share"}]
    return _chart(
        "Time and memory of a training step for the cuts of this limit, as shares of finetuning everything, over the "
        "parameters that train. The current cut is filled.",
        _costs_of(series),
        240,
        transform=[{"filter": "datum.series == series"}],
        encoding={
            "x": {"field": "share", "type": "quantitative", "title": "parameters that train, % of the model"},
            "y": {"field": "ratio", "type": "quantitative", "title": "share of finetuning everything"},
            "color": color,
        },
        layer=[
            {"mark": {"type": "line", "aria": False}, "encoding": {"order": {"field": "place"}, "strokeDash": dash}},
            {"mark": {"type": "point", "fill": "white", "size": 30, "aria": False}, "encoding": {"shape": shape}},
            {
                "transform": [{"filter": "datum.place == place"}],
                "mark": {"type": "point", "filled": True, "opacity": 1, "size": 160},
                "encoding": {"shape": shape, "tooltip": tooltip, "description": SPOKEN},
            },
        ],
    )


def _costs_of(series: Sequence[Series]) -> list[dict[str, Any]]:
    rows = []
    for one in series:
        for place, cut in enumerate(one.cuts):
            selection = cut.selection
            share = 100 * selection.parameters[one.training] / selection.model_parameters
            for what in COST_COLORS:
                ratio = getattr(selection.cost, what)
                text = f"{ratio:.2f}"
                place_of = {"series": one.name, "place": place, "share": share, "what": what}
                rows.append({**place_of, "ratio": ratio, "text": text, "spoken": f"{what}: {text}"})
    return rows


def _forecast(forecast: Forecast) -> dict[str, Any]:
    chosen = forecast.recommended
    rows = [
        {
            "set": one.name,
            "order": place,
            "gain": 100 * one.gain,
            "low": 100 * (one.gain - HALF_WIDTH * one.gain_error),
            "high": 100 * (one.gain + HALF_WIDTH * one.gain_error),
            "text": f"{100 * one.gain:+.1f} points",
            "spoken": f"{one.name}: {100 * one.gain:+.1f} points",
            "recommended": one is chosen,
        }
        for place, one in enumerate(forecast.sets)
    ]
    x = {"title": "gain over the fitted head, points"}
    fill = {"condition": {"test": "datum.recommended", "value": COLORS[0]}, "value": "white"}
    return _chart(
        "Forecast of the accuracy that each set gains over the fitted head, with 80 % intervals. The recommended set "
        "is filled.",
        rows,
        22 * len(rows),
        encoding={
            "y": {"field": "set", "type": "nominal", "sort": {"field": "order"}, "axis": {"title": None}},
            "tooltip": [{"field": "set", "title": "set"}, {"field": "text", "title": "gain"}],
            "description": SPOKEN,
        },
        layer=[
            {
                "mark": {"type": "rule", "aria": False, "strokeDash": [3, 3]},
                "encoding": {"x": {"datum": 0, **x}, "y": None},
            },
            {"mark": {"type": "rule", "aria": False, "color": COLORS[0]}, "encoding": _from_low_to_high("x", x)},
            {
                "mark": {"type": "point", "color": COLORS[0], "opacity": 1, "size": 90},
                "encoding": {"x": {"field": "gain", "type": "quantitative", **x}, "fill": fill},
            },
        ],
    )


def _components(report: BaseReport) -> list[dict[str, Any]]:
    return [
        {"id": row.id, "kind": row.kind, "block": row.block_id} | _interval(row.id, row.mean, row.standard_error)
        for row in report.scores
    ]


def _interval(unit: str, score: float, error: float) -> dict[str, Any]:
    """Returns a score and its 95 % interval, which stays positive for a logarithmic scale, as numbers and as text."""
    ends = {"low": max(score - NORMAL * error, score / 10), "high": score + NORMAL * error}
    text = f"{score:.4g}" + (f" ± {NORMAL * error:.2g}" if error else "")
    return {"score": score, **ends, "text": text, "spoken": f"{unit}: {text}"}


def _selected(field: str) -> dict[str, Any]:
    return {"calculate": f"indexof(chosen, datum.{field}) >= 0", "as": "selected"}


def _by_kind(values: Sequence[Any], *, legend: bool = True) -> dict[str, Any]:
    scale = {"domain": list(KINDS), "range": list(values)}
    encoding = {"field": "kind", "type": "nominal", "scale": scale, "title": None}
    return encoding if legend else {**encoding, "legend": None}


def _points(axis: str, shared: dict[str, Any], shape: dict[str, Any], *fields: str) -> list[dict[str, Any]]:
    """Returns two layers: a hollow point for each score, and a filled one for each that is selected."""
    look = {"type": "point", "opacity": 1, "strokeWidth": 1.5}
    score = {"field": "score", "type": "quantitative", **shared}
    encoding = {axis: score, "shape": shape, "tooltip": _tooltip(*fields), "description": SPOKEN}
    return [
        {"mark": {**look, "fill": "white", "size": 45}, "encoding": encoding},
        {
            "transform": [{"filter": "datum.selected"}],
            "mark": {**look, "filled": True, "size": 110, "aria": False},
            "encoding": encoding,
        },
    ]


def _from_low_to_high(axis: str, shared: dict[str, Any]) -> dict[str, Any]:
    return {axis: {"field": "low", "type": "quantitative", **shared}, f"{axis}2": {"field": "high"}}


def _tooltip(*fields: str) -> list[dict[str, Any]]:
    """Returns a tooltip of some fields and the score. A title must not be "image", which the tooltip would load."""
    return [*({"field": field, "title": field} for field in fields), {"field": "text", "title": "score"}]


def _blocks(report: BaseReport) -> dict[str, Any]:
    staged = report.scores[0].stage is not None
    title = "stage.block" if staged else "block"
    return {"field": "block", "type": "ordinal", "sort": None, "title": title, "axis": {"labelAngle": 0}}


def _unit(report: BaseReport) -> str:
    return f"{report.title} (no unit)"


def _scale(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the scale of an axis that contains all intervals, so that it stays if the cut moves."""
    log = is_wide([row["score"] for row in rows])
    ends = [min(row["low"] for row in rows), max(row["high"] for row in rows)]
    scale: dict[str, Any] = {"type": "log" if log else "linear", "domain": ends, "padding": 8}
    return scale if log else {**scale, "zero": False}
