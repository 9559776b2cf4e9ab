"""A measurement in words: the heading, the table that `print(report)` shows, and the same for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from io import StringIO

from plasticity_peft.components.component import MATRIX_KINDS
from plasticity_peft.report.scores import Measurement, Score
from plasticity_peft.report.selection import RankedUnit


def heading(measured: Measurement) -> str:
    """Returns what was measured, in a line."""
    criterion = "Plasticity" if measured.criterion == "rate_of_change" else measured.title.capitalize()
    protocol = "" if measured.inputs is None else f", {measured.inputs} inputs"
    return f"{criterion} of {measured.model_type}{protocol}, {observed(measured)}"


def observed(measured: Measurement) -> str:
    """Returns what the scores were averaged over: "1024 pairs", or "weights"."""
    return "weights" if measured.observed == "weights" else f"{measured.pairs} {measured.observed}"


def as_text(measured: Measurement) -> str:
    """Returns the ranking of the kinds as a table of text, with how measuring ended."""
    text = table(_title(measured), _columns(measured), _rows(measured))
    return "\n".join(filter(None, [text, how_it_ended(measured), why_norms_lead(measured, measured.ranking()[:1])]))


def as_html(measured: Measurement) -> str:
    """Returns the same as HTML: text of others is escaped, and there is neither script nor style sheet in it."""
    names = "".join(f"<th>{escape(name)}</th>" for name in _columns(measured))
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>" for values in _rows(measured)
    )
    notes = [where_from(measured), how_it_ended(measured), why_norms_lead(measured, measured.ranking()[:1])]
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes if note)
    return (
        f"<table><caption>{escape(_title(measured))}</caption><thead><tr>{names}</tr></thead>"
        f"<tbody>{rows}</tbody></table>{paragraphs}"
    )


def where_from(measured: Measurement) -> str:
    """Returns where the images came from; "" where that was not noted."""
    named = {"Target": measured.target_data, "Source": measured.source_data}
    return " ".join(f"{name} images: {value}." for name, value in named.items() if value is not None)


def how_it_ended(measured: Measurement) -> str:
    """Returns whether the choice was settled; "" where all was looked at in any case."""
    ending = measured.ending
    if ending is None:
        return ""
    units, confidence = ", ".join(ending.units), f"{ending.confidence:.0%} confidence"
    if ending.settled:
        return f"Settled after {measured.pairs} of {ending.most} {measured.observed}: {units} ({confidence})."
    return f"Not settled: {units} does not stand out from the rest ({confidence})."


def why_norms_lead(measured: Measurement, units: Iterable[RankedUnit]) -> str:
    """Returns an explanation where norms are among `units`, the best, because the tokens are small; else ""."""
    norms = [row.unit for row in units if row.unit.split(".")[-1] not in MATRIX_KINDS]
    if measured.criterion != "rate_of_change" or measured.input_std is None or measured.input_std >= 1 or not norms:
        return ""
    return (
        f"{norms[0]} ranks high because a layer norm divides by the spread of its input, which is "
        f"{measured.input_std:.2g} in the tokens that enter block 0: its rate of change is its gain over that, and "
        "says little about how well it trains. In four of the five experiments of examples/results norms gained "
        'less than attention. criterion="parameter_plasticity" does not depend on this scale, and '
        'candidates=("MHA", "FC1", "FC2") leaves the norms out.'
    )


def _title(measured: Measurement) -> str:
    pairs = measured.observed == "pairs" and measured.criterion != "token_sensitivity"
    of = f" of {'a source and a target image' if measured.source else 'two target images'}" if pairs else ""
    skipped = f" ({measured.skipped} skipped)" if measured.skipped else ""
    return f"{heading(measured)}{skipped}{of}, seed {measured.seed}"


def _columns(measured: Measurement) -> tuple[str, ...]:
    return ("rank", "kind", measured.title, "std. error", "lowest block", "highest block", "parameters")


def _rows(measured: Measurement) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for rank, (kind, score, error) in enumerate(measured.ranking(), start=1):
        blocks = sorted(measured.rows_of(kind), key=lambda row: row.mean)
        lowest, highest = blocks[0], max(blocks, key=lambda row: row.mean)  # both the first of equals
        parameters = sum(row.parameters for row in blocks)
        numbers = (f"{score:.4f}", f"{error:.4f}", _with_block(lowest), _with_block(highest), f"{parameters:,}")
        rows.append((str(rank), kind, *numbers))
    return rows


def _with_block(row: Score) -> str:
    return f"{row.mean:.4f} (block {row.block_id})"


WIDTH = 119
"""Columns that a table may take: the same wherever it is printed, so that it can be compared with a stored text."""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], width: int = WIDTH) -> str:
    """Returns the rows as a Markdown table below its title: numbers to the right, words to the left.

    What does not fit into `width` columns is cut off.

    Examples:
        >>> print(table("Fruit", ("name", "count"), [("apple", "12"), ("fig", "7")]))
        Fruit
        | name  | count |
        |-------|-------|
        | apple |    12 |
        | fig   |     7 |
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = [tuple(row) for row in rows]
    grid = Table(box=box.MARKDOWN)
    for index, name in enumerate(columns):
        numeric = all(row[index].lstrip("+-")[:1].isdigit() for row in rows if row[index])
        grid.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    text = StringIO()
    # In a notebook rich would display the table by itself, and leave `text` empty.
    console = Console(
        file=text,
        width=width,
        color_system=None,
        markup=False,
        emoji=False,
        highlight=False,
        force_jupyter=False,
    )
    console.print(grid)
    return "\n".join([title, *(line.rstrip() for line in text.getvalue().splitlines() if line.strip())])
