"""A report as text: its heading, the table that `print(report)` prints, and the same table for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from plasticity_peft.components.component import MATRIX_KINDS
from plasticity_peft.report.scores import BaseReport, Score
from plasticity_peft.report.selection import RankedUnit


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
    text = table(_title(report), _columns(report), _rows(report))
    return "\n".join(filter(None, [text, how_it_ended(report), why_norms_lead(report, report.ranking()[:1])]))


def as_html(report: BaseReport) -> str:
    """Returns the same table as HTML, without scripts and style sheets. All text is escaped."""
    names = "".join(f"<th>{escape(name)}</th>" for name in _columns(report))
    rows = "".join(f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>" for values in _rows(report))
    notes = [where_from(report), how_it_ended(report), why_norms_lead(report, report.ranking()[:1])]
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes if note)
    return (
        f"<table><caption>{escape(_title(report))}</caption><thead><tr>{names}</tr></thead>"
        f"<tbody>{rows}</tbody></table>{paragraphs}"
    )


def where_from(report: BaseReport) -> str:
    """Returns the origin of the images; "" if it is unknown."""
    named = {"Target": report.target_provenance, "Source": report.source_provenance}
    return " ".join(f"{name} images: {value}." for name, value in named.items() if value is not None)


def how_it_ended(report: BaseReport) -> str:
    """Returns whether the selection was settled; "" if all samples were measured regardless of the ranking."""
    ending = report.ending
    if ending is None:
        return ""
    units, confidence = ", ".join(ending.units), f"{ending.confidence:.0%} confidence"
    if ending.settled:
        return f"Settled after {report.samples} of {ending.planned} {report.observed}: {units} ({confidence})."
    return f"Not settled: {units} does not stand out from the rest ({confidence})."


def why_norms_lead(report: BaseReport, units: Iterable[RankedUnit]) -> str:
    """Returns an explanation if layer norms are among the best `units` because the tokens are small; else ""."""
    norms = [row.unit for row in units if row.unit.split(".")[-1] not in MATRIX_KINDS]
    if report.criterion != "rate_of_change" or report.input_std is None or report.input_std >= 1 or not norms:
        return ""
    return (
        f"{norms[0]} ranks high because a layer norm divides by the standard deviation of its input, which is "
        f"{report.input_std:.2g} in the tokens that enter block 0. Its rate of change is its gain divided by that "
        "number, and does not show how well it trains. In four of the five experiments of examples/results norms "
        'gained less than attention. criterion="parameter_plasticity" does not depend on this scale, and '
        'candidates=("MHA", "FC1", "FC2") excludes the norms.'
    )


def _title(report: BaseReport) -> str:
    pairs = report.observed == "pairs" and report.criterion != "token_sensitivity"
    of = f" of {'a source and a target image' if report.uses_source else 'two target images'}" if pairs else ""
    skipped = f" ({report.skipped} skipped)" if report.skipped else ""
    return f"{heading(report)}{skipped}{of}, seed {report.seed}"


def _columns(report: BaseReport) -> tuple[str, ...]:
    return ("rank", "kind", report.title, "std. error", "lowest block", "highest block", "parameters")


def _rows(report: BaseReport) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for rank, (kind, score, error) in enumerate(report.ranking(), start=1):
        blocks = sorted(report.rows_of(kind), key=lambda row: row.mean)
        lowest, highest = blocks[0], max(blocks, key=lambda row: row.mean)  # the first one of equals
        parameters = sum(row.parameters for row in blocks)
        numbers = (f"{score:.4f}", f"{error:.4f}", _with_block(lowest), _with_block(highest), f"{parameters:,}")
        rows.append((str(rank), kind, *numbers))
    return rows


def _with_block(row: Score) -> str:
    return f"{row.mean:.4f} (block {row.block_id})"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns rows as a Markdown table below a title, with numbers to the right and words to the left.

    Examples:
        >>> print(table("Fruit", ("name", "count"), [("apple", "12"), ("fig", "7")]))
        Fruit
        | name  | count |
        |-------|-------|
        | apple |    12 |
        | fig   |     7 |
    """
    cells = [tuple(columns), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(map(_is_number, filter(None, column[1:]))) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        fitted = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(fitted)} |"

    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([title, line(cells[0]), f"|{rule}|", *map(line, cells[1:])])


def _is_number(text: str) -> bool:
    return text.lstrip("+-")[:1].isdigit()
