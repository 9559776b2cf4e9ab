"""Lines with error bands as a picture. It knows nothing of reports, so that a report can draw itself through it.

matplotlib is the extra `plots`, and imported where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# Okabe & Ito's palette, told apart by the colour-blind; line styles and markers tell the lines apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", "-")
MARKERS = ("o", "s", "^", "D", "v")


class Line(NamedTuple):
    """One line of a picture: `y` with its `error` on both sides, at 0, 1, 2, ..."""

    name: str
    y: Sequence[float]
    error: Sequence[float]


def draw_lines(lines: Iterable[Line], *, title: str, xlabel: str, ylabel: str, ax: Any = None) -> Any:
    """Returns the matplotlib axes on which the lines were drawn: `ax`, or new ones."""
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for index, line in enumerate(lines):
        low, high = ([y + sign * e for y, e in zip(line.y, line.error, strict=True)] for sign in (-1, 1))
        look = {"color": COLOURS[index % len(COLOURS)]}
        x = range(len(line.y))
        ax.plot(x, line.y, STYLES[index % 5], marker=MARKERS[index % 5], markersize=4, label=line.name, **look)
        ax.fill_between(x, low, high, alpha=0.25, linewidth=0, **look)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax
