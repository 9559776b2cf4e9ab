"""Rows as a table of text. It knows nothing of reports, so that a report can print itself through it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

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
