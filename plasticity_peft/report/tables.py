"""Tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
