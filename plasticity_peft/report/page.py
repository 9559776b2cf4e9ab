"""The page of a report: one HTML file in which a reader moves the cut and sees what is selected and what it costs.

The file needs no network: its charts are drawn by Vega-Lite, which is in the file. Every cut is computed here, by the
library's own selection, and written into the page, whose script only looks it up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from plasticity_peft.components.component import KINDS
from plasticity_peft.extras import require
from plasticity_peft.report.charts import charts, heights
from plasticity_peft.report.cuts import LIMITS, Cut, Series, place_of, rule_and_series
from plasticity_peft.report.forecast import Forecast
from plasticity_peft.report.scores import BaseReport
from plasticity_peft.report.selection import Selection, SelectionRule
from plasticity_peft.report.text import (
    heading,
    how_it_ended,
    how_sure,
    observed,
    sure_in_words,
    where_from,
    why_norms_lead,
)

FOLDER = Path(__file__).parent
LIMIT_NAMES = {
    "units": "number of units",
    "parameters": "budget of parameters",
    "time": "budget of time",
    "memory": "budget of memory",
}


def as_page(
    report: BaseReport,
    rule: SelectionRule,
    *,
    selection: Selection | None = None,
    forecast: Forecast | None = None,
) -> str:
    """Returns the page as HTML; see `PlasticityReport.to_html`.

    Args:
        report: the report.
        rule: the selection that the page shows first, and what is the same in all cuts.
        selection: the selection that was trained, if one was.
        forecast: a forecast to show; by default that of the report.
    """
    forecast = forecast or report.forecast
    scripts = library()  # first: without the extra, the rest is not needed
    rule, series = rule_and_series(report, rule, selection)
    start = _start(series, rule, selection)
    data = {
        "series": {one.name: [_described(report, rule, one, cut) for cut in one.cuts] for one in series},
        "components": [row.id for row in report.scores],
        "charts": charts(report, series, forecast, start),
        "heights": heights(report),
        "start": start,
    }
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (FOLDER / "page.html").read_text("utf-8")
    )
    return page.render(
        title=heading(report),
        notes=list(filter(None, _notes(report))),
        granularities=dict.fromkeys(one.granularity for one in series),
        limits={name: LIMIT_NAMES[name] for name in LIMITS if any(one.limited == name for one in series)},
        trained=None if selection is None else _trained(selection, rule),
        forecast=forecast,
        ranking=report.ranking(),
        rows=report.scores,
        exact=report.observed == "weights",
        costs=report.costs is not None,
        r=rule.r,
        data=_as_json(data),
        library=scripts,
    )


def _notes(report: BaseReport) -> Iterator[str]:
    yield f"Criterion: {report.criterion} ({report.title}), {observed(report)}, seed {report.seed}."
    yield where_from(report)
    yield how_it_ended(report)
    yield how_sure(report)
    yield why_norms_lead(report, report.ranking()[:1])


@lru_cache(maxsize=1)
def library() -> str:
    """Returns the scripts of Vega, Vega-Lite and Vega-Embed, and the page's own after them."""
    vl_convert: Any = require("vl_convert", extra="html", purpose="The page of a report")
    own = (FOLDER / "page.js").read_text("utf-8")
    script: str = vl_convert.javascript_bundle(own)
    # In JavaScript, both can only be in a text or a regular expression, where they mean the same with a backslash.
    return script.replace("</script", r"<\/script").replace("<!--", r"\x3c!--")


def _as_json(values: Any) -> str:
    r"""Returns JSON for an element `script`, which no text in it can end.

    Examples:
        >>> _as_json({"title": "</script>"})
        '{"title":"\\u003c/script>"}'
    """
    return json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", r"\u003c")


def _start(series: Sequence[Series], rule: SelectionRule, selection: Selection | None) -> dict[str, Any]:
    """Returns the cut that the page shows first: what was trained, or the first one of the rule's ranking.

    It is given by the signals of the charts: `series` and `place`, and the `granularity` and the `chosen` of that cut.
    """
    own = (one for one in series if (one.granularity, one.training) == (rule.granularity, rule.training))
    found = None if selection is None else place_of(series, selection, str(rule.training))
    first, place = found or (next(own), 0)
    shown = first.cuts[place].selection
    chosen = [*shown.units, *shown.components]
    return {"series": first.name, "place": place, "granularity": rule.granularity, "chosen": chosen}


def _described(report: BaseReport, rule: SelectionRule, series: Series, cut: Cut) -> dict[str, Any]:
    """Returns what the page shows of a cut: texts, the selected units, and the places of the components."""
    selection, cost = cut.selection, cut.selection.cost
    parameters = selection.parameters[series.training]
    places = {row.id: place for place, row in enumerate(report.scores)}
    unknown = "not in the report"
    return {
        "limit": _limit(series, cut),
        "units": list(selection.units),
        "components": [places[name] for name in selection.components],
        "shown": {
            "brief": _brief(selection, parameters),
            "selected": in_blocks(selection),
            "parameters": f"{parameters:,} ({100 * parameters / selection.model_parameters:.2f} % of the model)",
            "time": unknown if cost is None else f"{cost.time:.2f} of finetuning everything",
            "memory": unknown if cost is None else f"{cost.memory:.2f} of finetuning everything",
            "file": unknown if cost is None else cost.file_size,
            "confidence": sure_in_words(report, selection),
            "call": _call(rule, series, cut),
        },
    }


def _brief(selection: Selection, parameters: int) -> str:
    share = f"{100 * parameters / selection.model_parameters:.3g} % of the parameters"
    cost = selection.cost
    return share if cost is None else f"{share}, {cost.time:.2f} of the time, {cost.memory:.2f} of the memory"


def _limit(series: Series, cut: Cut) -> str:
    if series.limited == "units":
        return f"{cut.limit} of {len(series.cuts)}"
    if series.limited == "parameters":
        return f"at most {100 * float(cut.limit):g} % of the parameters"
    share, what = str(cut.limit).split()
    return f"at most {share} of the {what}"


def _call(rule: SelectionRule, series: Series, cut: Cut) -> str:
    """Returns the code that makes the same selection."""
    shared = {"candidates": rule.candidates, "r": rule.r, "rank_pattern": rule.rank_pattern}
    shared |= {"use_dora": rule.use_dora, "lora_bias": rule.lora_bias}
    usual = {"granularity": "kind", "candidates": KINDS, "r": 8, "rank_pattern": None}
    usual |= {"use_dora": False, "lora_bias": False}
    given = {**series.arguments(cut), **shared}
    return f"report.select({', '.join(f'{n}={v!r}' for n, v in given.items() if n not in usual or v != usual[n])})"


def _trained(selection: Selection, rule: SelectionRule) -> str:
    how = "in full" if rule.training == "full" else "with LoRA"
    return f"{in_blocks(selection)}, {how}, {selection.parameters[str(rule.training)]:,} parameters without the head"


def in_blocks(selection: Selection) -> str:
    """Returns the units of a selection in words; components by kind, with their blocks.

    Examples:
        >>> components = ("0.MHA", "1.MHA", "2.MHA", "2.FC1", "4.MHA")
        >>> counts = {"lora": 0, "full": 0}
        >>> print(in_blocks(Selection("component", components, components, (), counts, 9)))
        MHA in blocks 0 to 2, 4; FC1 in block 2
        >>> print(in_blocks(Selection("kind", ("MHA", "FC1"), components, (), counts, 9)))
        MHA, FC1
    """
    if selection.granularity == "kind":
        return ", ".join(selection.units)
    blocks: dict[str, list[str]] = {}
    for name in selection.components:
        block, kind = name.rsplit(".", 1)
        blocks.setdefault(kind, []).append(block)
    return "; ".join(f"{kind} in {_ranges(blocks[kind])}" for kind in KINDS if kind in blocks)


def _ranges(blocks: Sequence[str]) -> str:
    """Returns blocks in words, three and more that follow each other as a range."""
    runs: list[list[str]] = []
    for block in blocks:
        if runs and _next(runs[-1][-1]) == block:
            runs[-1].append(block)
        else:
            runs.append([block])
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs]
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(texts)}"


def _next(block: str) -> str:
    *stage, number = block.split(".")
    return ".".join([*stage, str(int(number) + 1)])
