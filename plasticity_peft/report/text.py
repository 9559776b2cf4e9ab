"""A report as text: its heading, the table that `print(report)` prints, and the same table for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from plasticity_peft.components.component import MATRIX_KINDS
from plasticity_peft.report.confidence import SURE, confidence, in_words, overlap, tied
from plasticity_peft.report.cost import Cost
from plasticity_peft.report.forecast import Forecast
from plasticity_peft.report.scores import BaseReport, Score
from plasticity_peft.report.selection import Choice, RankedUnit, Selection, SelectionRule, TopK
from plasticity_peft.report.tables import table

PAIRED = "paired comparison: 95 % intervals overlap"
"""Said of a selection that is sure although a picture of it does not look like it."""


def heading(report: BaseReport) -> str:
    """Returns one line about what was measured."""
    criterion = "Plasticity" if report.criterion == "rate_of_change" else report.title.capitalize()
    protocol = "" if report.inputs is None else f", {report.inputs} inputs"
    return f"{criterion} of {report.model_type}{protocol}, {observed(report)}"


def observed(report: BaseReport) -> str:
    """Returns the samples that the scores are means of, such as "1024 pairs", or "weights"."""
    return "weights" if report.observed == "weights" else f"{report.samples} {report.observed}"


def as_text(report: BaseReport) -> str:
    """Returns the ranking of the kinds as a table of text, and how the measurement ended."""
    notes = [how_it_ended(report), how_sure(report), what_costs_mean(report)]
    notes.append(why_norms_lead(report, report.ranking()[:1]))
    ranking = "\n".join([table(_title(report), _columns(report), _rows(report)), *filter(None, notes)])
    return ranking if report.forecast is None else f"{ranking}\n\n{_decision(report, report.forecast)}"


def as_html(report: BaseReport) -> str:
    """Returns the same table as HTML, without scripts and style sheets. All text is escaped."""
    names = "".join(f"<th>{escape(name)}</th>" for name in _columns(report))
    rows = "".join(f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>" for values in _rows(report))
    notes = [where_from(report), how_it_ended(report), how_sure(report), what_costs_mean(report)]
    notes.append(why_norms_lead(report, report.ranking()[:1]))
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes if note)
    return (
        f"<table><caption>{escape(_title(report))}</caption><thead><tr>{names}</tr></thead>"
        f"<tbody>{rows}</tbody></table>{paragraphs}"
    )


def decision_rows(report: BaseReport, forecast: Forecast) -> list[tuple[str, ...]]:
    """Returns the table of what is to be decided, its header first: the forecast, and the score of each kind."""
    scores = {row.kind: f"{row.mean:.4g}" for row in report.kinds}
    first, *others = forecast.columns()
    rows = [(name, scores.get(name, ""), *values) for name, *values in forecast.rows()]
    return [(first, report.title, *others), *rows]


def _decision(report: BaseReport, forecast: Forecast) -> str:
    columns, *rows = decision_rows(report, forecast)
    title = f"Forecast of finetuning in full, from {forecast.head.images} labeled images"
    return "\n".join([table(title, columns, rows), forecast.advice()])


def where_from(report: BaseReport) -> str:
    """Returns the origin of the images; "" if it is unknown."""
    named = {"Target": report.target_provenance, "Source": report.source_provenance}
    return " ".join(f"{name} images: {value}." for name, value in named.items() if value is not None)


def how_it_ended(report: BaseReport) -> str:
    """Returns whether the selection was settled; "" if all samples were measured regardless of the ranking."""
    ending = report.ending
    if ending is None:
        return ""
    units, promised = ", ".join(ending.units), f"{ending.confidence:.0%} confidence"
    reached = f" Confidence reached: {in_words(None if report.separation is None else report.separation.reached)}."
    if ending.settled:
        return f"Settled after {report.samples} of {ending.planned} {report.observed}: {units} ({promised}).{reached}"
    return f"Not settled: {units} does not stand out from the rest ({promised}).{reached}"


def how_sure(report: BaseReport) -> str:
    """Returns the confidence of each number of kinds; "" if it is known that all of them are exact."""
    ranking = report.ranking()
    names = tuple(row.unit for row in ranking)
    found, paired = [], False
    for choice in (TopK(names, top_k) for top_k in range(1, len(names))):
        sure = confidence_of(report, choice, ranking)
        is_tie = bool(tied(choice, ranking))
        found.append("tie" if is_tie else in_words(sure))
        paired |= not is_tie and (sure or 0) >= SURE and overlap(choice.chosen(names), ranking)
    if report.observed == "weights" and "tie" not in found:
        return ""
    if set(found) == {"unknown"}:
        return "Confidence of each top_k: unknown, because the report is of an older release."
    numbers = ", ".join(map(str, range(1, len(names))))
    return f"Confidence of top_k={numbers}: {', '.join(found)}{f' ({PAIRED})' if paired else ''}."


def is_paired(report: BaseReport, selection: Selection) -> bool:
    """Returns whether a selection is sure although 95 % intervals overlap, because units are compared by pairs.

    It is said, because a reader of a picture would be puzzled otherwise.
    """
    sure = not selection.tied and (selection.confidence or 0) >= SURE
    return sure and overlap(selection.units, report.ranking(selection.granularity))


def sure_in_words(report: BaseReport, selection: Selection) -> str:
    """Returns the confidence of a selection as text, and whether it is that of a paired comparison."""
    paired = f" ({PAIRED})" if is_paired(report, selection) else ""
    return in_words(selection.confidence, selection.tied) + paired


def what_costs_mean(report: BaseReport) -> str:
    """Returns what the columns of costs are; "" if the report does not contain costs."""
    if report.costs is None:
        return ""
    return "Time and memory: of a training step if the kind trains in full, as shares of finetuning everything."


def confidence_of(report: BaseReport, choice: Choice, ranking: Sequence[RankedUnit]) -> float | None:
    """Returns the confidence of what `choice` selects from `ranking`; None if the report does not contain it."""
    names = [row.unit for row in ranking]
    kinds = [row.kind for row in report.kinds]
    units = kinds if names[0] in kinds else [row.id for row in report.scores]
    apart = None if report.separation is None else report.separation.of("kind" if units is kinds else "component")
    if report.separation is None or apart is None:
        return None
    return confidence(choice, names, units, apart, report.separation.looks)


def why_norms_lead(report: BaseReport, units: Iterable[RankedUnit]) -> str:
    """Returns an explanation if layer norms are among the best `units` because the tokens are small; else ""."""
    norms = [row.unit for row in units if row.unit.split(".")[-1] not in MATRIX_KINDS]
    if report.criterion != "rate_of_change" or report.input_std is None or report.input_std >= 1 or not norms:
        return ""
    return (
        f"{norms[0]} ranks high because a layer norm divides by the standard deviation of its input, which is "
        f"{report.input_std:.2g} in the tokens that enter block 0. Its rate of change is its gain divided by that "
        "number, and does not show how well it trains. In seven of the eight experiments of examples/results norms "
        'gained less than attention. criterion="parameter_plasticity" does not depend on this scale, and '
        'candidates=("MHA", "FC1", "FC2") excludes the norms.'
    )


def _title(report: BaseReport) -> str:
    pairs = report.observed == "pairs" and report.criterion != "token_sensitivity"
    of = f" of {'a source and a target image' if report.uses_source else 'two target images'}" if pairs else ""
    of = of if report.batch_size is None else f" of up to {report.batch_size} images"
    skipped = f" ({report.skipped} skipped)" if report.skipped else ""
    return f"{heading(report)}{skipped}{of}, seed {report.seed}"


def _columns(report: BaseReport) -> tuple[str, ...]:
    columns = ("rank", "kind", report.title, "std. error", "lowest block", "highest block", "parameters")
    return columns if report.costs is None else (*columns, "time", "memory")


def _rows(report: BaseReport) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for rank, (kind, score, error) in enumerate(report.ranking(), start=1):
        blocks = sorted(report.rows_of(kind), key=lambda row: row.mean)
        lowest, highest = blocks[0], max(blocks, key=lambda row: row.mean)  # the first one of equals
        parameters = sum(row.parameters for row in blocks)
        numbers = (f"{score:.4f}", f"{error:.4f}", _with_block(lowest), _with_block(highest), f"{parameters:,}")
        cost = _cost_of_kind(report, kind)
        rows.append((str(rank), kind, *numbers, *(() if cost is None else (f"{cost.time:.2f}", f"{cost.memory:.2f}"))))
    return rows


def _cost_of_kind(report: BaseReport, kind: str) -> Cost | None:
    """Returns what it costs to train a kind in full; None if the report does not contain costs."""
    rule = SelectionRule(training="full", candidates=(kind,))
    return None if report.costs is None else rule.cost(report.scores, (kind,), report.costs)


def _with_block(row: Score) -> str:
    return f"{row.mean:.4f} (block {row.block_id})"
